//! The admin console of one PgBouncer: the few commands that a hold needs, and its tables as values.
//!
//! Invariant: every command is bounded but PAUSE, which its caller ends; a table that lacks a column is an error, never a
//! default.

use std::time::Duration;

use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

use crate::config;
use crate::config::Endpoint;
use crate::config::members::Address;
use crate::dial;

/// Everything but PAUSE is answered from memory.
const ANSWER: Duration = Duration::from_secs(2);
/// Between two looks at server connections that are closing.
const LOOK: Duration = Duration::from_millis(5);
/// Its own console, which has connections too.
const CONSOLE: &str = "pgbouncer";

/// Why PgBouncer did not do something.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// It can't be reached, or went away.
    #[error("PgBouncer is away: {0}")]
    Away(String),
    /// It answered with an error.
    #[error("PgBouncer: {command}: {words}")]
    Refused {
        /// What was asked.
        command: String,
        /// Its words.
        words: String,
    },
    /// It said something else than expected.
    #[error("PgBouncer: {0}")]
    Answer(String),
}

/// A logged-in admin.
pub struct Console(Client);

/// Where a database of it points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pointed {
    /// Host, port and name on the server.
    pub address: Address,
    /// `session`, `transaction` or `statement`; empty where its default counts.
    pub pool_mode: String,
}

/// Who keeps a PAUSE from completing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// The server process.
    pub server_pid: String,
    /// The client: user, address and application.
    pub client: String,
}

impl Console {
    /// Logs in.
    pub async fn open(endpoint: &Endpoint) -> Result<Console, ConsoleError> {
        let client = dial::dial(endpoint, "proxyctl").await;
        client.map(Console).map_err(|error| ConsoleError::Away(format!("{}: {error}", endpoint.describe())))
    }

    /// Whether it is known to be gone.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    async fn ask(&self, command: &str) -> Result<Vec<SimpleQueryRow>, ConsoleError> {
        let answer = tokio::time::timeout(ANSWER, self.0.simple_query(command)).await;
        let answer = answer.map_err(|_| ConsoleError::Away(format!("{command}: no answer within {ANSWER:?}")))?;
        rows(command, answer)
    }

    /// Where `database` points.
    pub async fn pointed(&self, database: &str) -> Result<Pointed, ConsoleError> {
        let rows = self.ask("SHOW DATABASES").await?;
        let row = rows.iter().find(|row| row.get("name") == Some(database));
        let row = row.ok_or_else(|| ConsoleError::Answer(format!("it declares no database '{database}'")))?;
        let port = cell(row, "port")?;
        let port = port.parse().map_err(|_| ConsoleError::Answer(format!("port '{port}'")))?;
        // A Unix socket has no host in this table.
        let (host, dbname) = (row.get("host").unwrap_or_default().to_owned(), cell(row, "database")?.to_owned());
        let pool_mode = row.get("pool_mode").unwrap_or_default().to_owned();
        Ok(Pointed { address: Address { host, port, dbname }, pool_mode })
    }

    /// The value of a setting.
    pub async fn setting(&self, key: &str) -> Result<String, ConsoleError> {
        let rows = self.ask("SHOW CONFIG").await?;
        let row = rows.iter().find(|row| row.get("key") == Some(key));
        row.and_then(|row| row.get("value"))
            .map(str::to_owned)
            .ok_or_else(|| ConsoleError::Answer(format!("it has no setting '{key}'")))
    }

    /// Transactions of a database since it was started.
    pub async fn transactions(&self, database: &str) -> Result<u64, ConsoleError> {
        let rows = self.ask("SHOW STATS").await?;
        let row = rows.iter().find(|row| row.get("database") == Some(database));
        // One that nobody has used yet has no row.
        let Some(row) = row else { return Ok(0) };
        let count = cell(row, "total_xact_count")?;
        count.parse().map_err(|_| ConsoleError::Answer(format!("total_xact_count '{count}'")))
    }

    /// A digest of what it runs with: its settings. Where its databases point changes with every cutover.
    pub async fn config_digest(&self) -> Result<String, ConsoleError> {
        let rows = self.ask("SHOW CONFIG").await?;
        let settings = rows.iter().map(|row| format!("{:?}={:?}", row.get("key"), row.get("value")));
        Ok(config::digest(&settings.collect::<Vec<_>>().join("\n")))
    }

    /// Changes a setting until the next RELOAD.
    pub async fn set(&self, key: &str, value: &str) -> Result<(), ConsoleError> {
        self.ask(&format!("SET {key} = '{value}'")).await.map(drop)
    }

    /// Reads its files again.
    pub async fn reload(&self) -> Result<(), ConsoleError> {
        self.ask("RELOAD").await.map(drop)
    }

    /// Lets everybody go; one that is not paused is what was wanted.
    pub async fn resume(&self) -> Result<(), ConsoleError> {
        match self.ask("RESUME").await {
            Err(ConsoleError::Refused { words, .. }) if words.contains("not paused") => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// Holds everybody; returns once no server connection is left. Ended by the transactions' ends or by whoever drops it,
    /// who has to RESUME on another connection: PgBouncer stays paused. One that is paused `already` is an error unless that
    /// was our own doing.
    pub async fn pause(self, already: Already) -> Result<Console, ConsoleError> {
        match rows("PAUSE", self.0.simple_query("PAUSE").await) {
            Err(ConsoleError::Refused { words, .. }) if words.contains("already") && already == Already::Ours => {}
            answer => drop(answer?),
        }
        // The answer alone proves nothing: one WAIT_CLOSE ever sent makes PAUSE answer at once.
        while !self.is_empty().await? {
            // reason: closing connections have no event; ended by the caller's drain deadline.
            tokio::time::sleep(LOOK).await;
        }
        Ok(self)
    }

    /// Its server connections of all databases.
    async fn servers(&self) -> Result<Vec<SimpleQueryRow>, ConsoleError> {
        let mut rows = self.ask("SHOW SERVERS").await?;
        rows.retain(|row| row.get("database") != Some(CONSOLE));
        Ok(rows)
    }

    /// Whether it has no server connection: then nobody was served since it was paused.
    pub async fn is_empty(&self) -> Result<bool, ConsoleError> {
        Ok(self.servers().await?.is_empty())
    }

    /// Whether a server connection waits for its client to close it: it leads where nothing points any more.
    pub async fn is_closing(&self) -> Result<bool, ConsoleError> {
        Ok(self.servers().await?.iter().any(|row| row.get("close_needed") == Some("1")))
    }

    /// The server processes of its connections for a database.
    pub async fn server_pids(&self, database: &str) -> Result<Vec<i32>, ConsoleError> {
        let rows = self.servers().await?;
        let ours = rows.iter().filter(|row| row.get("database") == Some(database));
        Ok(ours.filter_map(|row| row.get("remote_pid")?.parse().ok()).collect())
    }

    /// Clients that are linked to a server: a PAUSE waits for each of them.
    pub async fn blockers(&self) -> Result<Vec<Blocker>, ConsoleError> {
        let (servers, clients) = (self.servers().await?, self.ask("SHOW CLIENTS").await?);
        let linked = servers.iter().filter_map(|server| {
            let link = server.get("link").filter(|link| !link.is_empty())?;
            let client = clients.iter().find(|client| client.get("ptr") == Some(link))?;
            let text = |key: &str| client.get(key).unwrap_or_default().to_owned();
            let (user, addr, port) = (text("user"), text("addr"), text("port"));
            let client = format!("{user} from {addr}:{port} ({})", text("application_name"));
            Some(Blocker { server_pid: server.get("remote_pid").unwrap_or_default().to_owned(), client })
        });
        Ok(linked.collect())
    }
}

/// Whose pause it is if there is one already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Already {
    /// A keeper's that died since.
    Ours,
    /// An operator's.
    Foreign,
}

fn rows(
    command: &str,
    answer: Result<Vec<SimpleQueryMessage>, tokio_postgres::Error>,
) -> Result<Vec<SimpleQueryRow>, ConsoleError> {
    let messages = answer.map_err(|error| match error.as_db_error() {
        Some(db) => ConsoleError::Refused { command: command.to_owned(), words: db.message().to_owned() },
        None => ConsoleError::Away(format!("{command}: {}", dial::words(&error))),
    })?;
    // What is left out: RowDescription and CommandComplete.
    let row = |message| if let SimpleQueryMessage::Row(row) = message { Some(row) } else { None };
    Ok(messages.into_iter().filter_map(row).collect())
}

fn cell<'a>(row: &'a SimpleQueryRow, column: &str) -> Result<&'a str, ConsoleError> {
    row.try_get(column).ok().flatten().ok_or_else(|| ConsoleError::Answer(format!("a table without {column}")))
}
