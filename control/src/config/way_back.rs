//! `[way_back]`, and what a move back reads out of the configuration of the move there.
//!
//! Invariant: a configuration that was turned round names the same servers and proxies.

use std::fmt;

use tokio_postgres::config::Host;

use crate::config::section::{Checked, Section, wrong};
use crate::config::{Config, Endpoint, Replication, Side, TlsMode};

/// Whether a way back is prepared within the stall and attached after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WayBack {
    /// If so, the target needs `wal_level = logical` and a free replication slot, and proxyctl's role on the source has to be
    /// able to subscribe.
    pub enabled: bool,
}

/// Reads the section. On unless it says otherwise: who finds out that the new server does not do wants to go back, and
/// then it is too late to prepare it. Where it can't be had preflight is red, so that nobody only believes to have it. Nothing
/// follows a promoted standby back.
pub(super) fn way_back(section: Option<Section>, replication: &Replication) -> Checked<WayBack> {
    let possible = *replication != Replication::Physical;
    let Some(mut section) = section else { return Ok(WayBack { enabled: possible }) };
    let enabled = section.flag("enabled")?.unwrap_or(possible);
    if enabled && !possible {
        let reason = "must be false with replication.kind = 'physical': rebuild the old server as a standby of the new one \
                      (pg_rewind or pg_basebackup), swap [source] and [target], and run another cutover";
        return Err(wrong(section.key("enabled"), reason));
    }
    section.finish()?;
    Ok(WayBack { enabled })
}

impl Config {
    /// The same move the other way round, fed by this subscription, or by the way back that is there.
    #[must_use]
    pub fn turned(mut self, subscription: Option<String>) -> Config {
        std::mem::swap(&mut self.source, &mut self.target);
        for bouncer in &mut self.bouncers {
            std::mem::swap(&mut bouncer.source, &mut bouncer.target);
        }
        match &mut self.replication {
            Replication::Logical { subscriptions } => *subscriptions = subscription.into_iter().collect(),
            Replication::Physical => {}
        }
        self
    }
}

impl Side {
    /// How the other server reaches this one: libpq's words.
    pub fn conninfo(&self) -> String {
        self.replication_dsn.clone().unwrap_or_else(|| conninfo(&self.endpoint))
    }
}

/// Without the password of `replication_dsn`.
impl fmt::Debug for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Side({}, {:?})", self.backend, self.endpoint)
    }
}

/// A connection string that libpq reads. Where root certificates lie on the server is the server's own affair.
fn conninfo(endpoint: &Endpoint) -> String {
    let pg = &endpoint.pg;
    let host = |host: &Host| match host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(path) => path.display().to_string(),
    };
    let joined = |words: Vec<String>| words.join(",");
    let sslmode = match endpoint.tls {
        TlsMode::Disable => "disable",
        TlsMode::Prefer => "prefer",
        TlsMode::Require => "require",
        TlsMode::VerifyCa => "verify-ca",
        TlsMode::VerifyFull => "verify-full",
    };
    let password = pg.get_password().map(|password| String::from_utf8_lossy(password).into_owned());
    let words = [
        ("host", joined(pg.get_hosts().iter().map(host).collect())),
        ("hostaddr", joined(pg.get_hostaddrs().iter().map(ToString::to_string).collect())),
        ("port", joined(pg.get_ports().iter().map(ToString::to_string).collect())),
        ("user", pg.get_user().unwrap_or_default().to_owned()),
        ("password", password.unwrap_or_default()),
        ("dbname", pg.get_dbname().unwrap_or_default().to_owned()),
        ("sslmode", sslmode.to_owned()),
    ];
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('\'', "\\'");
    let given = words.iter().filter(|(_, text)| !text.is_empty());
    given.map(|(word, text)| format!("{word}='{}'", quoted(text))).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(target: &str) -> Config {
        let text = format!(
            "database = 'app'\n[source]\nbackend = 'blue'\ndsn = 'host=a user=u dbname=app'\n\
             [target]\nbackend = 'green'\n{target}\n[[proxies]]\nname = 'p1'\ndsn = 'host=p'\n"
        );
        Config::parse(Path::new("/etc/cutover.toml"), &text).unwrap()
    }

    #[test]
    fn the_other_server_reaches_a_side_as_proxyctl_does_unless_told_otherwise() {
        let derived = config(r#"dsn = '''host=b port=5434 user=u password='it\'s' dbname=app sslmode=require'''"#);
        let expected = r"host='b' port='5434' user='u' password='it\'s' dbname='app' sslmode='require'";
        assert_eq!(derived.target.conninfo(), expected);
        let told = config("dsn = 'host=b user=u'\nreplication_dsn = 'host=10.0.0.2 user=u dbname=app'");
        assert_eq!(told.target.conninfo(), "host=10.0.0.2 user=u dbname=app");
    }

    #[test]
    fn turned_round_twice_is_as_before_but_for_what_feeds_it() {
        let there = config("dsn = 'host=b user=u'");
        let back = there.clone().turned(Some("s".to_owned()));
        assert_eq!((back.source.backend.as_str(), back.target.backend.as_str()), ("green", "blue"));
        assert_eq!(back.replication, Replication::Logical { subscriptions: vec!["s".to_owned()] });
        assert_eq!(back.turned(None).source.backend, there.source.backend);
    }
}
