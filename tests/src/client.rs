//! A connection of the PostgreSQL driver together with the task that drives it.
//!
//! Invariant: the task ends with the client; what the server says besides answers (notices) is dropped.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::task::JoinHandle;
use tokio_postgres::{Config, NoTls, SimpleQueryMessage, SimpleQueryRow};

/// How long a login may take before a harness gives up on it: far above any login, below a test's patience.
const LOGIN_LIMIT: Duration = Duration::from_secs(30);

/// A connection; derefs to the driver's client.
#[derive(Debug)]
pub struct Client {
    client: tokio_postgres::Client,
    /// Sends Terminate and ends by itself once `client` is gone.
    driver: JoinHandle<()>,
}

impl Client {
    /// Connects without TLS.
    ///
    /// # Errors
    /// As the driver says them.
    pub async fn connect(config: &Config) -> Result<Client, tokio_postgres::Error> {
        let mut config = config.clone();
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(LOGIN_LIMIT);
        }
        let (client, connection) = config.connect(NoTls).await?;
        // Ends when the client is dropped or the connection breaks; the error shows in the next query.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok(Client { client, driver })
    }

    /// Breaks the connection without a word, as a client that dies does.
    pub fn sever(self) {
        self.driver.abort();
    }

    /// The rows of a simple query.
    ///
    /// # Errors
    /// The query failed; the message names it.
    pub async fn rows(&self, sql: &str) -> Result<Vec<SimpleQueryRow>> {
        let messages = self.simple_query(sql).await.with_context(|| sql.to_owned())?;
        Ok(messages
            .into_iter()
            .filter_map(|message| if let SimpleQueryMessage::Row(row) = message { Some(row) } else { None })
            .collect())
    }

    /// The first column of the first row as text; `None` for NULL.
    ///
    /// # Errors
    /// The query failed or gave no row.
    pub async fn text(&self, sql: &str) -> Result<Option<String>> {
        let rows = self.rows(sql).await?;
        let row = rows.first().with_context(|| format!("no row: {sql}"))?;
        Ok(row.get(0).map(str::to_owned))
    }

    /// The first column of the first row as a number.
    ///
    /// # Errors
    /// The query failed, gave no row, NULL or no number.
    pub async fn number(&self, sql: &str) -> Result<i64> {
        let text = self.text(sql).await?.with_context(|| format!("NULL: {sql}"))?;
        text.parse().with_context(|| format!("{text} is no number: {sql}"))
    }

    /// Statements without results.
    ///
    /// # Errors
    /// One failed; the message names them.
    pub async fn run(&self, sql: &str) -> Result<()> {
        self.batch_execute(sql).await.with_context(|| sql.to_owned())
    }

    /// Asks `sql` (first column a boolean) again and again until it says true.
    ///
    /// # Errors
    /// The query failed, or it did not become true within `limit`.
    pub async fn until(&self, sql: &str, limit: Duration) -> Result<()> {
        let asking = async {
            while self.text(sql).await?.as_deref() != Some("t") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(limit, asking).await.with_context(|| format!("not true within {limit:?}: {sql}"))?
    }
}

impl Deref for Client {
    type Target = tokio_postgres::Client;

    fn deref(&self) -> &tokio_postgres::Client {
        &self.client
    }
}

impl DerefMut for Client {
    fn deref_mut(&mut self) -> &mut tokio_postgres::Client {
        &mut self.client
    }
}
