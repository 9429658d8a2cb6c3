//! A PgBouncer that takes part in cutovers: in proxyctl's configuration, and with its keeper beside it.
//!
//! Invariant: the keeper runs with its own copy of the configuration and with the least login that the README grants it; it ends
//! before its PgBouncer.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use toml::{Table, Value};

use crate::bouncer::Bouncer;
use crate::control::{Control, Running};
use crate::pair::{DATABASE, PGCUTOVER, PROXY, Pair, password};
use crate::proxy::ADMIN;
use crate::stage::Stage;

/// For what takes milliseconds on a quiet machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A PgBouncer and its keeper. Fields end in this order.
#[derive(Debug)]
pub struct Kept {
    /// The keeper, while it runs.
    pub keeper: Option<Running>,
    /// PgBouncer itself.
    pub bouncer: Bouncer,
    /// What the keeper runs with.
    beside: Control,
    name: String,
}

impl Kept {
    /// Puts a PgBouncer with these lines of configuration before the source, names it to the stage's proxyctl, and starts its
    /// keeper with the budgets that are set there.
    ///
    /// # Errors
    /// Something does not start, or the keeper does not enrol.
    pub async fn start(stage: &mut Stage, name: &str, lines: &str) -> Result<Kept> {
        let bouncer = Bouncer::with(stage.pair.source.port(), lines).await?;
        let entry = entry(name, &bouncer, &stage.pair)?;
        let listed = stage.control.config.entry("pgbouncer").or_insert_with(|| Value::Array(Vec::new()));
        listed.as_array_mut().context("[[pgbouncer]] is no list")?.push(Value::Table(entry));
        let objects = stage.control.run(&["objects"], LIMIT).await?;
        ensure!(objects.code == Some(0), "{}", objects.story());
        let mut kept = Kept { keeper: None, bouncer, beside: beside(&stage.control)?, name: name.to_owned() };
        kept.keep(&stage.pair).await?;
        Ok(kept)
    }

    /// Starts the keeper, and waits until it has enrolled on the side that its PgBouncer serves: on `pair`'s source, unless it
    /// has moved.
    ///
    /// # Errors
    /// It does not start or enrol.
    pub async fn keep(&mut self, pair: &Pair) -> Result<()> {
        self.keeper = Some(self.beside.spawn(&["watch-pgbouncer", &self.name])?);
        let seen = format!(
            "SELECT EXISTS (SELECT FROM pgcutover.member WHERE instance = '{}' AND seen_at > now() - interval '1 s')",
            self.name
        );
        let (source, target) = (pair.source.superuser(DATABASE).await?, pair.target.superuser(DATABASE).await?);
        tokio::select! {
            seen = source.until(&seen, LIMIT) => seen.map(drop),
            seen = target.until(&seen, LIMIT) => seen.map(drop),
        }
    }

    /// Runs the keeper's proxyctl once, beside the keeper.
    ///
    /// # Errors
    /// It does not end.
    pub async fn once(&self) -> Result<crate::control::Finished> {
        self.beside.run(&["watch-pgbouncer", &self.name], LIMIT).await
    }
}

/// `[[pgbouncer]]`, with a template made of the file as it is.
fn entry(name: &str, bouncer: &Bouncer, pair: &Pair) -> Result<Table> {
    let (file, template) = (bouncer.dir().join("pgbouncer.ini"), bouncer.dir().join("pgbouncer.template"));
    let now = fs::read_to_string(&file)?;
    let line = format!("host=127.0.0.1 port={}", pair.source.port());
    ensure!(now.contains(&line), "{now}");
    fs::write(&template, now.replace(&line, "host={host} port={port}"))?;
    let (port, secret) = (bouncer.port(), password(ADMIN));
    let words = [
        ("name", name.to_owned()),
        ("dsn", format!("host=127.0.0.1 port={port} user={ADMIN} password={secret} dbname=pgbouncer")),
        ("template", template.display().to_string()),
        ("file", file.display().to_string()),
    ];
    Ok(words.into_iter().map(|(key, value)| (key.to_owned(), Value::from(value))).collect())
}

/// The same file for another login, with a directory of its own.
fn beside(control: &Control) -> Result<Control> {
    let mut beside = Control::bare()?;
    beside.config = control.config.clone();
    beside.config.insert("journal_dir".to_owned(), beside.dir().join("runs").display().to_string().into());
    let words = |login| format!("user={login} password={}", password(login));
    for side in ["source", "target"] {
        let dsn = control.config[side]["dsn"].as_str().context("a dsn")?.replace(&words(PGCUTOVER), &words(PROXY));
        beside.set(side, "dsn", dsn);
    }
    Ok(beside)
}
