//! What a session-pooled client keeps in its session: settings, prepared statements, a channel it listens on.
//!
//! Invariant: whoever has them at the end had one session all the time, or was moved with all of it.

use std::collections::HashMap;

use tokio_postgres::types::Type;
use tokio_postgres::{Error, Statement};

use crate::client::Client;

/// Named statements that each session has, those of its transactions among them.
pub const STATEMENTS: usize = 20;

/// Settings, none of them a default; as SHOW says them.
const SETTINGS: [(&str, &str); 3] = [("work_mem", "5MB"), ("statement_timeout", "61s"), ("DateStyle", "SQL, DMY")];

/// A session's state, as its client remembers it.
pub(crate) struct Belongings {
    channel: String,
    of_transactions: HashMap<&'static str, Statement>,
    /// The statement at `i` adds `i` to its parameter.
    others: Vec<Statement>,
}

impl Belongings {
    /// Sets, listens, prepares; `statements` are those of the client's transactions.
    pub(crate) async fn acquire(
        client: &Client,
        id: i32,
        statements: &[(&'static str, &[Type])],
    ) -> Result<Belongings, Error> {
        let channel = format!("load_{id}");
        let settings: Vec<String> = SETTINGS.iter().map(|(name, value)| format!("SET {name} TO '{value}';")).collect();
        client.batch_execute(&format!("{} LISTEN {channel}", settings.concat())).await?;
        let mut of_transactions = HashMap::new();
        for (sql, types) in statements {
            of_transactions.insert(*sql, client.prepare_typed(sql, types).await?);
        }
        let mut others = Vec::new();
        for number in 0..STATEMENTS.saturating_sub(of_transactions.len()) {
            others.push(client.prepare_typed(&format!("SELECT $1 + {number}"), &[Type::INT4]).await?);
        }
        Ok(Belongings { channel, of_transactions, others })
    }

    /// The named statement of this text.
    pub(crate) fn statement(&self, sql: &str) -> Option<&Statement> {
        self.of_transactions.get(sql)
    }

    /// Looks at all of it, uses every statement: what is missing, in words.
    pub(crate) async fn missing(&self, client: &Client) -> Result<Vec<String>, Error> {
        let mut missing = Vec::new();
        for (name, value) in SETTINGS {
            let now: String = client.query_one(&format!("SELECT current_setting('{name}')"), &[]).await?.get(0);
            if now != value {
                missing.push(format!("{name} is {now}, not {value}"));
            }
        }
        let channels: Vec<String> =
            client.query("SELECT pg_listening_channels()", &[]).await?.iter().map(|row| row.get(0)).collect();
        if channels != [self.channel.as_str()] {
            missing.push(format!("listens on {channels:?}, not on {}", self.channel));
        }
        for (number, statement) in (0..).zip(&self.others) {
            let sum: i32 = client.query_one(statement, &[&100]).await?.get(0);
            if sum != 100 + number {
                missing.push(format!("statement {number} says {sum}"));
            }
        }
        Ok(missing)
    }
}
