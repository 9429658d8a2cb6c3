//! The keys of `[pgcutover]` as an operator sees and sets them at run time.
//!
//! Invariant: every key of the file is here, and says whether SET, RELOAD or only a restart changes it. There is no
//! password among them.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::{AuthType, ClientTls, Config, General, PoolMode};
use crate::console::{Refusal, SettingRow, Why};

/// One key.
struct Setting {
    key: &'static str,
    show: fn(&General) -> String,
    change: Change,
}

/// What changes it.
enum Change {
    /// SET and RELOAD.
    Set(fn(&mut General, &str) -> Result<(), String>),
    /// RELOAD.
    Reload,
    /// A restart: this carries the running value over.
    Restart(fn(&General, &mut General)),
}

macro_rules! change {
    (set $key:ident $parse:ident) => {
        Change::Set(|general, text| {
            general.$key = $parse(text)?;
            Ok(())
        })
    };
    (reload $key:ident) => {
        Change::Reload
    };
    (restart $key:ident) => {
        Change::Restart(|running, new| new.$key.clone_from(&running.$key))
    };
}

/// Each line: the key, how it is shown, what changes it, and for SET how a value is read.
macro_rules! settings {
    ($($key:ident: $show:ident, $change:ident $($parse:ident)?;)+) => {
        const SETTINGS: &[Setting] = &[$(
            Setting {
                key: stringify!($key),
                show: |general| $show(&general.$key),
                change: change!($change $key $($parse)?),
            }
        ),+];
    };
}

settings! {
    listen_addr: list, restart;
    listen_port: plain, restart;
    unix_socket_dir: file, restart;
    instance: optional, restart;
    peer_id: plain, reload;
    state_dir: directory, restart;
    auth_type: auth_type, reload;
    auth_file: file, reload;
    auth_query: plain, reload;
    auth_user: optional, reload;
    auth_dbname: optional, reload;
    admin_users: list, reload;
    stats_users: list, reload;
    pool_mode: pool_mode, set pool_mode_of;
    default_pool_size: plain, set number;
    min_pool_size: plain, set number;
    max_client_conn: plain, set number;
    max_db_connections: plain, set number;
    max_user_connections: plain, set number;
    max_prepared_statements: plain, set number;
    client_login_timeout: seconds, set duration;
    query_wait_timeout: seconds, set duration;
    server_connect_timeout: seconds, set duration;
    server_login_retry: seconds, set duration;
    server_idle_timeout: seconds, set duration;
    server_lifetime: seconds, set duration;
    dns_max_ttl: seconds, set duration;
    dns_nxdomain_ttl: seconds, set duration;
    server_reset_query: plain, set words;
    client_tls_sslmode: client_tls, reload;
    client_tls_key_file: file, reload;
    client_tls_cert_file: file, reload;
    client_tls_ca_file: file, reload;
    http_addr: optional, restart;
    log_level: plain, restart;
    drain_timeout: seconds, set duration;
    pause_lease: seconds, set duration;
    hold_budget: seconds, set duration;
    pause_lease_default: seconds, set duration;
    workers: plain, restart;
}

/// SHOW CONFIG.
pub(super) fn rows(config: &Config) -> Vec<SettingRow> {
    let defaults = Config::parse("", Path::new("")).ok();
    let row = |setting: &Setting| SettingRow {
        key: setting.key.to_owned(),
        value: (setting.show)(&config.general),
        default: defaults.as_ref().map_or_else(String::new, |defaults| (setting.show)(&defaults.general)),
        changeable: match setting.change {
            Change::Set(_) | Change::Reload => true,
            Change::Restart(_) => false,
        }
        .into(),
    };
    SETTINGS.iter().map(row).collect()
}

/// SET: the configuration with another value of one key, checked as a file is.
pub(super) fn set(config: &Config, key: &str, value: &str) -> Result<Config, Refusal> {
    let Some(setting) = SETTINGS.iter().find(|setting| setting.key.eq_ignore_ascii_case(key)) else {
        return Err(Refusal::new(Why::Unknown, format!("unknown parameter: {key}")).with_hint("SHOW CONFIG lists them"));
    };
    let fixed = |hint: &'static str| {
        Err(Refusal::new(Why::WrongState, format!("{} can't be changed by SET", setting.key)).with_hint(hint))
    };
    match setting.change {
        Change::Set(write) => {
            let mut general = config.general.clone();
            write(&mut general, value)
                .map_err(|reason| Refusal::new(Why::WrongState, format!("{} = {value}: {reason}", setting.key)))?;
            config.with_general(general).map_err(|reason| Refusal::new(Why::WrongState, reason))
        }
        Change::Reload => fixed("change it in the file and RELOAD"),
        Change::Restart(_) => fixed("change it in the file and restart"),
    }
}

/// What only a restart changes stays as it runs; each difference is told.
pub(super) fn keep_fixed(running: &General, new: &mut General) {
    for setting in SETTINGS {
        let Change::Restart(keep) = setting.change else { continue };
        let (now, wanted) = ((setting.show)(running), (setting.show)(new));
        if now != wanted {
            tracing::warn!(key = setting.key, running = now, file = wanted, "this key changes with a restart only");
        }
        keep(running, new);
    }
}

fn plain(value: &impl Display) -> String {
    value.to_string()
}

fn optional(value: &Option<String>) -> String {
    value.clone().unwrap_or_default()
}

fn list(value: &[String]) -> String {
    value.join(",")
}

fn directory(value: &Path) -> String {
    value.display().to_string()
}

fn file(value: &Option<PathBuf>) -> String {
    value.as_deref().map_or_else(String::new, directory)
}

/// PgBouncer's plain seconds.
fn seconds(value: &Duration) -> String {
    value.as_secs_f64().to_string()
}

fn pool_mode(value: &PoolMode) -> String {
    value.as_str().to_owned()
}

fn auth_type(value: &AuthType) -> String {
    let word = match value {
        AuthType::Scram => "scram-sha-256",
        AuthType::Md5 => "md5",
        AuthType::Plain => "plain",
        AuthType::Trust => "trust",
        AuthType::Cert => "cert",
    };
    word.to_owned()
}

fn client_tls(value: &ClientTls) -> String {
    let word = match value {
        ClientTls::Disable => "disable",
        ClientTls::Allow => "allow",
        ClientTls::Prefer => "prefer",
        ClientTls::Require => "require",
        ClientTls::VerifyCa => "verify-ca",
        ClientTls::VerifyFull => "verify-full",
    };
    word.to_owned()
}

fn number(text: &str) -> Result<u32, String> {
    text.parse().map_err(|error| format!("{error}"))
}

/// As in the file: plain seconds, or words such as `500ms`.
fn duration(text: &str) -> Result<Duration, String> {
    let parsed = match text.parse() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string()),
        Err(_) => humantime::parse_duration(text).map_err(|error| error.to_string()),
    };
    parsed.map_err(|why| format!("not a duration: {why}; write 2.5 or '2500ms'"))
}

fn words(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

fn pool_mode_of(text: &str) -> Result<PoolMode, String> {
    [PoolMode::Session, PoolMode::Transaction]
        .into_iter()
        .find(|mode| mode.as_str().eq_ignore_ascii_case(text))
        .ok_or_else(|| "write session or transaction".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Config {
        Config::parse(text, Path::new("/etc/pgcutover.toml")).unwrap()
    }

    /// The file's own error lists the keys it knows.
    #[test]
    fn every_key_of_the_file_is_shown() {
        let error = Config::parse("[pgcutover]\nno_such_key_at_all = 1", Path::new("x")).unwrap_err().to_string();
        let (_, list) = error.split_once("expected one of ").unwrap();
        let mut known: Vec<&str> = list.split('`').skip(1).step_by(2).collect();
        let mut shown: Vec<&str> = SETTINGS.iter().map(|setting| setting.key).collect();
        known.sort_unstable();
        shown.sort_unstable();
        assert!(known.len() > 30, "{error}");
        assert_eq!(shown, known);
    }

    #[test]
    fn config_is_shown_with_its_defaults() {
        let rows = rows(&parse("[pgcutover]\ndrain_timeout = '500ms'\nlog_level = 'debug'"));
        let row = |key: &str| rows.iter().find(|row| row.key == key).unwrap();
        assert_eq!((row("drain_timeout").value.as_str(), row("drain_timeout").default.as_str()), ("0.5", "2"));
        assert_eq!(row("max_client_conn").value, "100");
        assert_eq!((bool::from(row("auth_file").changeable), bool::from(row("log_level").changeable)), (true, false));
    }

    #[test]
    fn set_changes_one_key_of_a_copy() {
        let config = parse("");
        let changed = set(&config, "query_wait_timeout", "2.5").unwrap();
        assert_eq!(changed.general.query_wait_timeout, Duration::from_millis(2500));
        assert_eq!(config.general.query_wait_timeout, Duration::from_secs(120));
        assert_eq!(set(&config, "Default_Pool_Size", "7").unwrap().general.default_pool_size, 7);
        assert_eq!(set(&config, "pool_mode", "transaction").unwrap().general.pool_mode, PoolMode::Transaction);
        assert_eq!(set(&config, "hold_budget", "1m").unwrap().general.hold_budget, Duration::from_secs(60));
    }

    #[test]
    fn set_keeps_the_deadlines_in_order() {
        for (key, value) in [("drain_timeout", "3s"), ("pause_lease", "14"), ("hold_budget", "5")] {
            let refusal = set(&parse(""), key, value).unwrap_err();
            assert!(refusal.message.contains("pgcutover."), "{refusal:?}");
        }
    }

    #[test]
    fn set_says_what_it_can_not_change_and_why() {
        let refused = |key: &str, value: &str| set(&parse(""), key, value).unwrap_err();
        assert_eq!(refused("no_such_key", "1").why, Why::Unknown);
        assert!(refused("auth_file", "x").hint.unwrap().contains("RELOAD"));
        assert!(refused("listen_port", "1").hint.unwrap().contains("restart"));
        assert!(refused("default_pool_size", "many").message.contains("default_pool_size = many"));
        assert_eq!(refused("default_pool_size", "0").why, Why::WrongState);
        assert!(refused("pause_lease", "-1").message.contains("not a duration"));
    }

    #[test]
    fn a_reload_keeps_what_needs_a_restart() {
        let running = parse("[pgcutover]\nlisten_port = 7000\nworkers = 3").general;
        let mut new = parse("[pgcutover]\nlisten_port = 7001\ndefault_pool_size = 5").general;
        keep_fixed(&running, &mut new);
        assert_eq!((new.listen_port, new.workers, new.default_pool_size), (7000, 3, 5));
    }
}
