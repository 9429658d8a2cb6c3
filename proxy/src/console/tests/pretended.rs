//! A proxy of two databases whose gates exist only in name.
//!
//! Invariant: its verbs keep the promises that [`Admin`] makes about waiting and about being dropped.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use pgcutover_api::command::{PauseWith, PrepareSwitch, Renew, ResumeWith, Scope, Shutdown, Switch, Transplant};
use pgcutover_api::epoch::Epoch;
use pgcutover_api::rows::{
    BackendRow, BlockerRow, Fate, GateRow, GateState, PauseRow, PoolMode, PrepareRow, SessionRow, SwitchRow,
    TransplantRow, Verdict, YesNo,
};
use tokio::sync::Notify;

use super::DEADLINE;
use crate::console::admin::*;
use crate::metrics::{DatabaseTraffic, Traffic};

/// A gate that exists only in name.
#[derive(Debug, Clone, Default)]
pub(super) struct PretendedGate {
    pub(super) paused: bool,
    pub(super) open_transactions: u32,
}

/// A proxy with two databases.
#[derive(Debug)]
pub(super) struct Pretended {
    gates: Mutex<BTreeMap<String, PretendedGate>>,
    calls: Mutex<Vec<String>>,
    changed: Notify,
}

/// Opens what a PAUSE shut, unless it completed.
struct Undo<'a> {
    proxy: &'a Pretended,
    databases: Vec<String>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        for database in &self.databases {
            self.proxy.note(format!("undo {database}"));
            self.proxy.set(database, |gate| gate.paused = false);
        }
    }
}

impl Pretended {
    pub(super) fn new() -> Arc<Self> {
        let gates = ["app", "other"].map(|name| (name.to_owned(), PretendedGate::default()));
        Arc::new(Self {
            gates: Mutex::new(gates.into_iter().collect()),
            calls: Mutex::new(Vec::new()),
            changed: Notify::new(),
        })
    }

    fn gates(&self) -> MutexGuard<'_, BTreeMap<String, PretendedGate>> {
        self.gates.lock().unwrap()
    }

    pub(super) fn set(&self, database: &str, change: impl FnOnce(&mut PretendedGate)) {
        change(self.gates().get_mut(database).unwrap());
        self.changed.notify_waiters();
    }

    pub(super) fn is_paused(&self, database: &str) -> bool {
        self.gates()[database].paused
    }

    fn note(&self, call: impl Into<String>) {
        self.calls.lock().unwrap().push(call.into());
        self.changed.notify_waiters();
    }

    pub(super) fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    /// Waits until it is so.
    pub(super) async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let waiting = async {
            loop {
                let changed = self.changed.notified();
                if is_so(self) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("not in time: {what}"));
    }

    fn names(&self, scope: Scope) -> Result<Vec<String>, Refusal> {
        match scope {
            Scope::All => Ok(self.gates().keys().cloned().collect()),
            Scope::Database(name) if self.gates().contains_key(&name) => Ok(vec![name]),
            Scope::Database(name) => Err(Refusal::unknown_database(&name)),
        }
    }

    async fn drained(&self, databases: &[String]) -> Result<(), Refusal> {
        loop {
            let changed = self.changed.notified();
            for database in databases {
                if !self.is_paused(database) {
                    return Err(Refusal::resumed(database));
                }
            }
            if databases.iter().all(|database| self.gates()[database].open_transactions == 0) {
                return Ok(());
            }
            changed.await;
        }
    }

    fn done(&self, call: impl Into<String>) -> Result<(), Refusal> {
        self.note(call);
        Ok(())
    }
}

impl Admin for Pretended {
    async fn pause(&self, by: &Visitor, scope: Scope) -> Result<(), Refusal> {
        let databases = self.names(scope)?;
        if databases.iter().any(|database| self.is_paused(database)) {
            return Err(Refusal::new(Why::WrongState, "already suspended/paused"));
        }
        self.note(format!("pause {} by {by}", databases.join(",")));
        for database in &databases {
            self.set(database, |gate| gate.paused = true);
        }
        let mut undo = Undo { proxy: self, databases: databases.clone() };
        let drained = self.drained(&databases).await;
        undo.databases.clear();
        drained
    }

    async fn pause_with(&self, _by: &Visitor, pause: PauseWith) -> Result<(), Refusal> {
        if pause.epoch.is_none() {
            return Err(Refusal::not_drained(&pause.database, 3, Duration::from_secs(2)));
        }
        self.note("epoch pause");
        self.set(&pause.database, |gate| gate.paused = true);
        self.drained(&[pause.database]).await
    }

    async fn resume(&self, scope: Scope) -> Result<(), Refusal> {
        let mut databases = self.names(scope)?;
        databases.retain(|database| self.is_paused(database));
        if databases.is_empty() {
            return Err(Refusal::new(Why::WrongState, "pooler is not paused/suspended"));
        }
        for database in databases {
            self.set(&database, |gate| gate.paused = false);
        }
        Ok(())
    }

    async fn resume_with(&self, _: ResumeWith) -> Result<(), Refusal> {
        Err(Refusal::new(Why::WrongState, "the pause is of another run"))
    }

    async fn switch(&self, switch: Switch) -> Result<(), Refusal> {
        Err(Refusal::new(Why::Unknown, format!("no such backend: {}", switch.backend)).with_hint("SHOW BACKENDS"))
    }

    async fn renew(&self, renew: Renew) -> Result<(), Refusal> {
        Err(Refusal::new(Why::Undecided, format!("{} is not decided", renew.claim)))
    }

    async fn prepare(&self, prepare: PrepareSwitch) -> Result<Vec<PrepareRow>, Refusal> {
        let row = |user: &str, status| PrepareRow {
            user: user.to_owned(),
            wanted: prepare.connections.unwrap_or(1),
            open: 0,
            status,
            sqlstate: "28P01".to_owned(),
            message: "password authentication failed".to_owned(),
        };
        Ok(vec![row("alice", Verdict::Refused), row("bob", Verdict::Unknown)])
    }

    async fn transplant(&self, transplant: Transplant) -> Result<Vec<TransplantRow>, Refusal> {
        let row = |client_id| TransplantRow {
            client_id,
            user: "alice".to_owned(),
            verdict: Fate::Refused,
            reason: format!("{} is pretended", transplant.backend),
            probe_us: 100,
            restore_us: 0,
        };
        Ok(vec![row(1), row(2)])
    }

    async fn reconnect(&self, scope: Scope) -> Result<(), Refusal> {
        self.done(format!("reconnect {}", self.names(scope)?.join(",")))
    }

    async fn wait_close(&self, scope: Scope) -> Result<(), Refusal> {
        self.done(format!("wait_close {}", self.names(scope)?.join(",")))
    }

    async fn kill(&self, _by: &Visitor, scope: Scope) -> Result<(), Refusal> {
        for database in self.names(scope)? {
            self.set(&database, |gate| gate.paused = true);
        }
        Ok(())
    }

    async fn kill_client(&self, id: u64) -> Result<(), Refusal> {
        self.done(format!("kill_client {id}"))
    }

    async fn set_admits(&self, database: &str, admits: YesNo) -> Result<(), Refusal> {
        self.done(format!("admits {database} {admits}"))
    }

    async fn reload(&self) -> Result<(), Refusal> {
        Err(Refusal::new(Why::Failed, "pgcutover.toml: databases.app.active: no such backend"))
    }

    async fn set(&self, key: &str, value: &str) -> Result<(), Refusal> {
        self.done(format!("set {key} {value}"))
    }

    async fn shutdown(&self, how: Shutdown) -> Result<(), Refusal> {
        self.done(format!("shutdown {how}"))
    }

    async fn databases(&self) -> Vec<DatabaseRow> {
        let row = |(name, gate): (&String, &PretendedGate)| DatabaseRow {
            name: name.clone(),
            host: "127.0.0.1".to_owned(),
            port: 5433,
            dbname: "app".to_owned(),
            force_user: None,
            pool_size: 20,
            min_pool_size: 0,
            server_lifetime_s: 3600,
            pool_mode: Some(PoolMode::Transaction),
            max_connections: 0,
            current_connections: 2,
            max_client_connections: 0,
            current_client_connections: 3,
            paused: gate.paused.into(),
            disabled: YesNo::No,
        };
        self.gates().iter().map(row).collect()
    }

    async fn pools(&self) -> Vec<PoolRow> {
        vec![PoolRow {
            database: "app".to_owned(),
            user: "alice".to_owned(),
            cl_active: 1,
            cl_waiting: 2,
            cancels: Forwards { cl_active: 3, cl_waiting: 4, sv_active: 5, sv_being_canceled: 6 },
            sv_active: 7,
            sv_idle: 8,
            sv_used: 9,
            sv_tested: 10,
            sv_login: 11,
            maxwait: Duration::from_micros(12_000_013),
            pool_mode: PoolMode::Transaction,
        }]
    }

    async fn clients(&self) -> Vec<SocketRow> {
        let states = [
            SocketState::Client(ClientState::Active),
            SocketState::Client(ClientState::Idle),
            SocketState::Client(ClientState::WaitingCancelReq),
            SocketState::Login(LoginState::Authenticating),
        ];
        states.into_iter().zip(1..).map(socket).collect()
    }

    async fn servers(&self) -> Vec<SocketRow> {
        vec![socket((SocketState::Server(ServerState::New), 9))]
    }

    async fn users(&self) -> Vec<UserRow> {
        vec![UserRow {
            name: "alice".to_owned(),
            pool_size: None,
            pool_mode: None,
            max_user_connections: 0,
            current_connections: 2,
            current_client_connections: 3,
        }]
    }

    async fn settings(&self) -> Vec<SettingRow> {
        let row = |key: &str, value: &str| SettingRow {
            key: key.to_owned(),
            value: value.to_owned(),
            default: value.to_owned(),
            changeable: YesNo::Yes,
        };
        vec![row("max_client_conn", "1000"), row("max_user_connections", "0")]
    }

    async fn census(&self) -> Census {
        Census { databases: 2, used_clients: 3, ..Census::default() }
    }

    async fn dns_hosts(&self) -> Vec<DnsRow> {
        vec![DnsRow { hostname: "db.example".to_owned(), ttl_s: 15, addrs: "10.0.0.1".to_owned() }]
    }

    async fn peers(&self) -> Vec<Peer> {
        vec![Peer { peer_id: 2, host: "10.0.0.2".to_owned(), port: 6432 }]
    }

    async fn traffic(&self) -> Vec<DatabaseTraffic> {
        let row = |database: &str, count, xact_time_us| DatabaseTraffic {
            database: database.to_owned(),
            total: Traffic { xact_count: count * 10, ..Traffic::default() },
            average: Traffic { xact_count: count, xact_time_us, ..Traffic::default() },
        };
        vec![row("app", 3, 100), row("other", 1, 500)]
    }

    async fn gates(&self) -> Vec<GateRow> {
        let row = |(database, gate): (&String, &PretendedGate)| GateRow {
            database: database.clone(),
            state: match (gate.paused, gate.open_transactions) {
                (false, _) => GateState::Open,
                (true, 0) => GateState::Paused,
                (true, _) => GateState::Pausing,
            },
            owner: String::new(),
            run: None,
            epoch: None,
            mode: None,
            lease_ms: None,
            drained: YesNo::from(gate.paused && gate.open_transactions == 0),
            open_transactions: gate.open_transactions,
            held_clients: 0,
            held_ms_max: Duration::ZERO,
            backend: "blue".to_owned(),
            route_epoch: Epoch::ZERO,
            control: YesNo::No,
        };
        self.gates().iter().map(row).collect()
    }

    async fn backends(&self) -> Vec<BackendRow> {
        Vec::new()
    }

    async fn sessions(&self) -> Vec<SessionRow> {
        Vec::new()
    }

    async fn blockers(&self, scope: Scope) -> Result<Vec<BlockerRow>, Refusal> {
        self.names(scope).map(|_| Vec::new())
    }

    async fn switches(&self) -> Vec<SwitchRow> {
        Vec::new()
    }

    async fn pauses(&self) -> Vec<PauseRow> {
        Vec::new()
    }
}

fn socket((state, id): (SocketState, u64)) -> SocketRow {
    SocketRow {
        state,
        id,
        link: None,
        user: Some("alice".to_owned()),
        database: Some("app".to_owned()),
        replication: crate::message::Replication::No,
        addr: Some(SocketAddr::from(([127, 0, 0, 1], 40_000))),
        local_addr: None,
        connect_time: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        request_time: None,
        wait: Duration::ZERO,
        close_needed: YesNo::No,
        remote_pid: 7,
        tls: String::new(),
        application_name: "psql".to_owned(),
        prepared_statements: 0,
    }
}
