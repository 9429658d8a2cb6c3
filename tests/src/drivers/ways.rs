//! Every driver in each of its ways, as the tests, the matrix and its table in README.md name them.
//!
//! Invariant: an id names one way; what is listed is tried or its absence is said.

use crate::drivers::kits::Language;

/// How a way is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Player {
    /// A program of `tests/drivers`.
    Program {
        /// What runs it.
        language: Language,
        /// Its file, or for compiled ones its name.
        name: &'static str,
        /// Debian's package, where the driver does not know its own version.
        package: Option<&'static str>,
    },
    /// pgbench with `tests/drivers/pgbench.sql`.
    Pgbench,
    /// psql, spoken to over its stdin.
    Psql,
    /// In this process.
    TokioPostgres,
    /// In this process.
    Sqlx,
}

/// One driver in one of its ways.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// Short name, such as `psycopg-pipeline`.
    pub id: &'static str,
    /// The driver's name, as its users say it.
    pub driver: &'static str,
    /// The way, for people.
    pub words: &'static str,
    /// The way, for the program.
    pub mode: &'static str,
    /// How it is run.
    pub player: Player,
}

impl Way {
    /// The way of this id.
    pub fn of(id: &str) -> Option<&'static Way> {
        WAYS.iter().find(|way| way.id == id)
    }

    /// Its first number in the ledger; it may use the next nine too.
    pub fn client(&self) -> i32 {
        let place = WAYS.iter().position(|way| way.id == self.id).unwrap_or_default();
        i32::try_from(place).map_or(CLIENTS, |place| CLIENTS + 10 * place)
    }
}

/// Above all clients of the ordinary load.
pub const CLIENTS: i32 = 5000;

const fn program(language: Language, name: &'static str) -> Player {
    Player::Program { language, name, package: None }
}

const PSYCOPG2: Player = program(Language::Python, "with_psycopg2.py");
const PSYCOPG: Player = program(Language::Python, "with_psycopg.py");
const ASYNCPG: Player = program(Language::Python, "with_asyncpg.py");
const PG: Player = program(Language::Node, "node/with_pg.cjs");
const POSTGRES: Player = program(Language::Node, "node/with_postgres.cjs");
const JDBC: Player = program(Language::Java, "Course");
const RUBY: Player = program(Language::Ruby, "with_ruby_pg.rb");
const PQ: Player = Player::Program { language: Language::Go, name: "pq", package: Some("golang-github-lib-pq-dev") };
const PGX: Player =
    Player::Program { language: Language::Go, name: "pgx", package: Some("golang-github-jackc-pgx-v4-dev") };

const fn way(id: &'static str, driver: &'static str, words: &'static str, mode: &'static str, player: Player) -> Way {
    Way { id, driver, words, mode, player }
}

/// All of them, in the order of the table.
pub const WAYS: &[Way] = &[
    way("psql", "psql", "simple; in session pooling SQL-level `PREPARE`", "", Player::Psql),
    way("pgbench-simple", "pgbench", "simple", "simple", Player::Pgbench),
    way("pgbench-extended", "pgbench", "extended", "extended", Player::Pgbench),
    way("pgbench-prepared", "pgbench", "prepared", "prepared", Player::Pgbench),
    way("psycopg2", "psycopg2", "simple", "", PSYCOPG2),
    way("psycopg-plain", "psycopg 3", "extended, unnamed", "plain", PSYCOPG),
    way("psycopg-prepared", "psycopg 3", "prepared from the first use", "prepared", PSYCOPG),
    way("psycopg-binary", "psycopg 3", "prepared, binary", "binary", PSYCOPG),
    way("psycopg-pipeline", "psycopg 3", "prepared, pipeline mode", "pipeline", PSYCOPG),
    way("asyncpg-cache", "asyncpg", "statement cache on", "cache", ASYNCPG),
    way("asyncpg-no-cache", "asyncpg", "`statement_cache_size=0`", "no-cache", ASYNCPG),
    way("node-postgres", "node-postgres", "unnamed", "plain", PG),
    way("node-postgres-named", "node-postgres", "named", "named", PG),
    way("postgres.js", "postgres.js", "prepared", "prepared", POSTGRES),
    way("postgres.js-unprepared", "postgres.js", "`prepare: false`", "unprepared", POSTGRES),
    way("pgjdbc", "pgJDBC", "`prepareThreshold=1` (server-side)", "server", JDBC),
    way("pgjdbc-client", "pgJDBC", "`prepareThreshold=0`", "client", JDBC),
    way("ruby-pg", "ruby-pg", "`exec_params`", "plain", RUBY),
    way("ruby-pg-prepared", "ruby-pg", "`exec_prepared`", "prepared", RUBY),
    way("lib-pq", "Go lib/pq", "unnamed, Parse and Bind in two trips", "plain", PQ),
    way("lib-pq-binary", "Go lib/pq", "`binary_parameters=yes`", "binary", PQ),
    way("lib-pq-prepared", "Go lib/pq", "`db.Prepare`", "prepared", PQ),
    way("pgx", "Go pgx", "statement cache, prepared", "cache", PGX),
    way("pgx-describe", "Go pgx", "statement cache, `describe`", "describe", PGX),
    way("pgx-simple", "Go pgx", "`PreferSimpleProtocol`", "simple", PGX),
    way("tokio-postgres", "tokio-postgres", "prepared", "prepared", Player::TokioPostgres),
    way("tokio-postgres-typed", "tokio-postgres", "`query_typed` (unnamed)", "typed", Player::TokioPostgres),
    way("sqlx", "sqlx", "persistent (named)", "persistent", Player::Sqlx),
    way("sqlx-unprepared", "sqlx", "`persistent(false)`", "unprepared", Player::Sqlx),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn an_id_names_one_way() {
        assert_eq!(WAYS.iter().map(|way| way.id).collect::<BTreeSet<_>>().len(), WAYS.len());
        assert_eq!(WAYS.iter().map(Way::client).collect::<BTreeSet<_>>().len(), WAYS.len());
        assert!(WAYS.iter().all(|way| Way::of(way.id).unwrap().client() == way.client()));
    }
}
