//! The console over a duplex stream, with a proxy of pretended gates behind it.
//!
//! Invariant: what is tested here is the console's part: what it answers, to whom, and which waits it drops.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use bytes::{Buf, BytesMut};
use pgcutover_api::command::{PauseWith, PrepareSwitch, Renew, ResumeWith, Scope, Shutdown, Switch};
use pgcutover_api::epoch::Epoch;
use pgcutover_api::rows::{
    BackendRow, BlockerRow, GateRow, GateState, PoolMode, PrepareRow, Row, SessionRow, SwitchRow, Verdict, YesNo,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::frame;
use crate::message;
use crate::metrics::{DatabaseTraffic, Traffic, page};

/// Every wait of these tests ends here at the latest.
const DEADLINE: Duration = Duration::from_secs(10);

/// A gate that exists only in name.
#[derive(Debug, Clone, Default)]
struct PretendedGate {
    paused: bool,
    open_transactions: u32,
}

/// A proxy with two databases.
#[derive(Debug)]
struct Pretended {
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
    fn new() -> Arc<Self> {
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

    fn set(&self, database: &str, change: impl FnOnce(&mut PretendedGate)) {
        change(self.gates().get_mut(database).unwrap());
        self.changed.notify_waiters();
    }

    fn is_paused(&self, database: &str) -> bool {
        self.gates()[database].paused
    }

    fn note(&self, call: impl Into<String>) {
        self.calls.lock().unwrap().push(call.into());
        self.changed.notify_waiters();
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    /// Waits until it is so.
    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
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
}

fn socket((state, id): (SocketState, u64)) -> SocketRow {
    SocketRow {
        state,
        id,
        link: None,
        user: Some("alice".to_owned()),
        database: Some("app".to_owned()),
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

/// What a console sent in answer to one query.
#[derive(Debug, Default)]
struct Heard {
    /// Name, type and size.
    columns: Vec<(String, u32, i16)>,
    rows: Vec<Vec<Option<String>>>,
    tag: Option<String>,
    /// Fields of the ErrorResponse by code.
    error: Option<BTreeMap<char, String>>,
    notice: Option<BTreeMap<char, String>>,
    /// Tags of the messages in order.
    tags: String,
}

impl Heard {
    fn column(&self, name: &str) -> (u32, Vec<Option<&str>>) {
        let at = self.columns.iter().position(|(column, ..)| column == name);
        let at = at.unwrap_or_else(|| panic!("no column {name} in {:?}", self.columns));
        (self.columns[at].1, self.rows.iter().map(|row| row[at].as_deref()).collect())
    }

    fn error(&self, code: char) -> &str {
        self.error.as_ref().and_then(|fields| fields.get(&code)).map_or("", String::as_str)
    }
}

/// A visitor's end of the stream.
struct Guest {
    stream: DuplexStream,
    inbox: BytesMut,
    cancels: Arc<Notify>,
    closing: CancellationToken,
    served: JoinHandle<io::Result<()>>,
}

/// Enters as an admin, past the welcome.
async fn enter(proxy: &Arc<Pretended>) -> Guest {
    enter_as(proxy, Authority::Admin).await.0
}

async fn enter_as(proxy: &Arc<Pretended>, authority: Authority) -> (Guest, Vec<(String, String)>) {
    let (ours, theirs) = tokio::io::duplex(4096);
    let visit = Visit {
        visitor: Visitor { user: "admin".to_owned(), addr: Some(SocketAddr::from(([127, 0, 0, 1], 9))) },
        authority,
        key: CancelKey { pid: 5, secret: Box::new([1, 2, 3, 4]) },
        cancels: Arc::new(Notify::new()),
        closing: CancellationToken::new(),
    };
    let (cancels, closing) = (Arc::clone(&visit.cancels), visit.closing.clone());
    let proxy = Arc::clone(proxy);
    let served = tokio::spawn(async move { serve(theirs, &visit, &*proxy).await });
    let mut guest = Guest { stream: ours, inbox: BytesMut::new(), cancels, closing, served };
    let mut parameters = Vec::new();
    loop {
        let (tag, body) = guest.message().await.expect("the welcome");
        match tag {
            b'S' => {
                let (name, value) = message::parameter_status(&body).unwrap();
                parameters.push((String::from_utf8_lossy(name).into(), String::from_utf8_lossy(value).into()));
            }
            b'K' => assert_eq!(message::backend_key_data(&body).unwrap().pid, 5),
            other => {
                assert_eq!(other, b'Z');
                return (guest, parameters);
            }
        }
    }
}

impl Guest {
    async fn message(&mut self) -> Option<(u8, BytesMut)> {
        let reading = async {
            loop {
                if let Some(found) = frame::next(&self.inbox, 1 << 20).unwrap() {
                    let (tag, total) = (found.tag, found.len_bytes());
                    let mut body = self.inbox.split_to(total);
                    body.advance(frame::HEADER_BYTES);
                    return Some((tag, body));
                }
                if self.stream.read_buf(&mut self.inbox).await.unwrap() == 0 {
                    return None;
                }
            }
        };
        tokio::time::timeout(DEADLINE, reading).await.expect("an answer in time")
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    async fn say(&mut self, query: &str) {
        let mut out = BytesMut::new();
        message::put_query(&mut out, query.as_bytes());
        self.send(&out).await;
    }

    /// Everything up to ReadyForQuery, or the end of the stream.
    async fn hear(&mut self) -> Heard {
        let mut heard = Heard::default();
        while let Some((tag, body)) = self.message().await {
            heard.tags.push(char::from(tag));
            match tag {
                b'T' => heard.columns = columns(body),
                b'D' => {
                    let cells = message::data_row(&body).unwrap();
                    let text = |cell: &[u8]| String::from_utf8(cell.to_vec()).unwrap();
                    heard.rows.push(cells.into_iter().map(|cell| cell.map(text)).collect());
                }
                b'C' => heard.tag = Some(String::from_utf8_lossy(&body[..body.len() - 1]).into()),
                b'E' => heard.error = Some(fields(&body)),
                b'N' => heard.notice = Some(fields(&body)),
                b'Z' => break,
                other => assert_eq!(other, b'I'),
            }
        }
        heard
    }

    async fn ask(&mut self, query: &str) -> Heard {
        self.say(query).await;
        self.hear().await
    }
}

fn columns(mut body: BytesMut) -> Vec<(String, u32, i16)> {
    let count = body.get_u16();
    let column = |_| {
        let end = body.iter().position(|byte| *byte == 0).unwrap();
        let name = String::from_utf8(body.split_to(end).to_vec()).unwrap();
        body.advance(1 + 4 + 2);
        let (oid, size) = (body.get_u32(), body.get_i16());
        body.advance(4 + 2);
        (name, oid, size)
    };
    (0..count).map(column).collect()
}

fn fields(body: &[u8]) -> BTreeMap<char, String> {
    let field = |field: &[u8]| (char::from(field[0]), String::from_utf8_lossy(&field[1..]).into_owned());
    body.split(|byte| *byte == 0).filter(|field| !field.is_empty()).map(field).collect()
}

#[tokio::test]
async fn the_welcome_is_pgbouncers() {
    let (_guest, parameters) = enter_as(&Pretended::new(), Authority::Stats).await;
    let version = format!("{}/bouncer", env!("CARGO_PKG_VERSION"));
    for (name, value) in [("server_version", &*version), ("DateStyle", "ISO"), ("TimeZone", "GMT")] {
        assert!(parameters.contains(&(name.to_owned(), value.to_owned())), "{name}: {parameters:?}");
    }
    assert_eq!(parameters.len(), 7);
}

/// What pgbouncer_exporter sends on each scrape, and what it needs of each answer.
#[tokio::test]
async fn a_scrape_of_pgbouncer_exporter_is_answered() {
    const TEXT: u32 = 25;
    const INT4: u32 = 23;
    const NUMERIC: u32 = 1700;
    let mut guest = enter_as(&Pretended::new(), Authority::Stats).await.0;
    let version = guest.ask("SHOW VERSION").await;
    assert_eq!(version.columns.len(), 1);
    let (oid, values) = version.column("version");
    assert!(oid == TEXT && values[0].unwrap().contains("PgBouncer 1.25"), "{values:?}");
    let lists = guest.ask("SHOW LISTS").await;
    assert_eq!(lists.columns, [("list".to_owned(), TEXT, -1), ("items".to_owned(), INT4, 4)]);
    assert_eq!(lists.rows.len(), 14);
    let config = guest.ask("SHOW CONFIG").await;
    assert_eq!(config.columns.len(), 4);
    assert_eq!(config.column("key").1, [Some("max_client_conn"), Some("max_user_connections")]);
    assert_eq!(config.column("value").1, [Some("1000"), Some("0")]);
    let clients = guest.ask("SHOW CLIENTS").await;
    assert_eq!(clients.column("state").1, [Some("active"), Some("idle"), Some("waiting_cancel_req")]);
    assert_eq!(clients.column("database"), (TEXT, vec![Some("app"); 3]));
    let databases = guest.ask("SHOW DATABASES").await;
    for name in ["pool_size", "reserve_pool_size", "max_connections", "current_connections", "paused", "disabled"] {
        let (oid, values) = databases.column(name);
        assert!(oid == INT4 && values[0].unwrap().parse::<i32>().is_ok(), "{name}");
    }
    assert_eq!(databases.column("force_user").1, [None, None]);
    let totals = guest.ask("SHOW STATS_TOTALS").await;
    assert_eq!(totals.columns.len(), 12);
    for (name, oid, size) in &totals.columns[1..] {
        assert_eq!((*oid, *size), (NUMERIC, -1), "{name}");
    }
    assert_eq!(totals.column("xact_count").1, [Some("30"), Some("10")]);
    let pools = guest.ask("SHOW POOLS").await;
    let expected = ["1", "2", "3", "4", "7", "5", "6", "8", "9", "10", "11", "12", "13"];
    assert_eq!(pools.rows[0][2..15], expected.map(|cell| Some(cell.to_owned())));
    assert!(pools.columns[2..15].iter().all(|(_, oid, _)| *oid == INT4));
    let stats = guest.ask("SHOW STATS").await;
    assert_eq!((stats.columns.len(), stats.tag.as_deref()), (23, Some("SHOW")));
}

#[tokio::test]
async fn every_table_has_as_many_cells_as_columns() {
    let mut guest = enter(&Pretended::new()).await;
    let with_rows = Table::ALL.iter().filter(|table| !matches!(table, Table::Help | Table::Fds));
    for table in with_rows {
        let heard = guest.ask(&format!("SHOW {table}")).await;
        assert!(!heard.columns.is_empty() && heard.error.is_none(), "{table}: {heard:?}");
        assert!(heard.rows.iter().all(|row| row.len() == heard.columns.len()), "{table}: {heard:?}");
        assert_eq!(heard.tag.as_deref(), Some("SHOW"), "{table}");
    }
    assert_eq!(guest.ask("SHOW HELP").await.tags, "NCZ");
    let fds = guest.ask("SHOW FDS").await;
    assert!(fds.error('C') == "0A000" && fds.error('H').contains("SHOW SOCKETS"), "{fds:?}");
}

#[tokio::test]
async fn sockets_and_clients_have_their_own_words_for_states() {
    let mut guest = enter(&Pretended::new()).await;
    let sockets = guest.ask("SHOW SOCKETS").await;
    assert_eq!(sockets.column("state").1, [Some("cl_active"), Some("cl_active"), Some("cl_login"), Some("sv_login")]);
    assert_eq!(sockets.columns.len(), 28);
    let servers = guest.ask("SHOW SERVERS").await;
    assert_eq!(servers.column("state").1, [Some("new")]);
    assert_eq!(servers.columns.len(), 21);
    assert_eq!(servers.column("connect_time").1, [Some("2023-11-14 22:13:20 UTC")]);
    assert_eq!(servers.column("request_time").1, [None]);
    assert_eq!(servers.column("addr").1, [Some("127.0.0.1")]);
    assert_eq!(servers.column("local_addr").1, [Some("unix")]);
    let busy = guest.ask("SHOW ACTIVE_SOCKETS").await;
    assert_eq!(busy.rows.len(), 3, "the idle client is left out");
}

#[tokio::test]
async fn our_tables_have_the_columns_of_the_vocabulary() {
    let mut guest = enter(&Pretended::new()).await;
    let heard = guest.ask("SHOW GATES").await;
    let columns = heard.columns.iter().map(|(name, oid, _)| (&**name, *oid));
    assert!(columns.eq(GateRow::COLUMNS.iter().map(|column| (column.name, column.kind.oid()))));
    let prepared = guest.ask("PREPARE SWITCH app TO green WITH (connections 4)").await;
    assert_eq!(prepared.column("status").1, [Some("refused"), Some("unknown")]);
    assert_eq!((prepared.column("wanted").1[0], prepared.tag.as_deref()), (Some("4"), Some("PREPARE")));
    assert_eq!(guest.ask("SHOW BLOCKERS nowhere").await.error('C'), "42704");
    assert_eq!(guest.ask("SHOW BLOCKERS app").await.columns.len(), BlockerRow::COLUMNS.len());
}

#[tokio::test]
async fn totals_weigh_the_means_of_databases() {
    let mut guest = enter(&Pretended::new()).await;
    let totals = guest.ask("SHOW TOTALS").await;
    let value = |name: &str| {
        let at = totals.column("name").1.iter().position(|cell| *cell == Some(name)).unwrap();
        totals.column("value").1[at].unwrap().to_owned()
    };
    assert_eq!((&*value("total_xact_count"), &*value("avg_xact_count")), ("40", "4"));
    assert_eq!(value("avg_xact_time"), "200", "(3 x 100 + 1 x 500) / 4");
    assert_eq!(totals.rows.len(), 22);
}

#[tokio::test]
async fn tags_are_pgbouncers() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    for (query, tag) in [
        ("SET log_level = 'debug'", "SET log_level=debug"),
        ("set client_encoding to utf8", "SET"),
        ("reconnect app;", "RECONNECT"),
        ("WAIT_CLOSE", "WAIT_CLOSE"),
        ("KILL_CLIENT 7", "KILL_CLIENT"),
        ("disable app", "DISABLE"),
        ("ENABLE app", "ENABLE"),
        ("PAUSE app", "PAUSE"),
        ("RESUME app", "RESUME"),
        ("KILL app", "KILL"),
        ("SHUTDOWN WAIT_FOR_CLIENTS", "SHUTDOWN"),
        ("SELECT version", "SHOW"),
        ("SHOW datestyle", "SHOW"),
    ] {
        assert_eq!(guest.ask(query).await.tag.as_deref(), Some(tag), "{query}");
    }
    let calls = proxy.calls();
    for call in ["set log_level debug", "admits app no", "kill_client 7", "pause app by admin@127.0.0.1:9"] {
        assert!(calls.iter().any(|made| made == call), "{call}: {calls:?}");
    }
    assert!(!calls.iter().any(|call| call.contains("client_encoding")));
    let empty = guest.ask(" ; -- ping").await;
    assert_eq!(empty.tags, "IZ");
}

#[tokio::test]
async fn errors_carry_the_code_of_whose_verb_it_was() {
    let mut guest = enter(&Pretended::new()).await;
    let run = "run '8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f', epoch 7";
    for (query, code, message) in [
        ("PUASE", "42601", "no command"),
        ("PAUSE nowhere", "08P01", "no such database: nowhere"),
        ("RESUME", "08P01", "not paused"),
        ("RELOAD", "F0000", "pgcutover.toml"),
        ("SUSPEND", "0A000", "SUSPEND"),
        ("PAUSE app WITH (mode writes)", "0A000", "mode writes"),
        ("PAUSE app WITH (drain '2s')", "55P03", "still open"),
        ("SWITCH app TO green WITH (force)", "42704", "no such backend"),
        (&format!("RESUME app WITH ({run})"), "55000", "another run"),
        (&format!("RENEW app WITH ({run}, lease '3s')"), "57P03", "not decided"),
    ] {
        let heard = guest.ask(query).await;
        assert_eq!((heard.error('C'), heard.error('S'), &*heard.tags), (code, "ERROR", "EZ"), "{query}");
        assert!(heard.error('M').contains(message), "{query}: {}", heard.error('M'));
    }
    assert!(guest.ask("PUASE").await.error('H').contains("PAUSE"));
}

#[tokio::test]
async fn statistics_users_may_only_show() {
    let proxy = Pretended::new();
    let mut guest = enter_as(&proxy, Authority::Stats).await.0;
    for query in [
        "PAUSE",
        "RESUME app",
        "RELOAD",
        "KILL",
        "KILL_CLIENT 1",
        "DISABLE app",
        "SHUTDOWN",
        "SET log_level = x",
        "SHOW FDS",
        "RECONNECT",
        "WAIT_CLOSE",
        "SWITCH app TO green WITH (force)",
        "PREPARE SWITCH app TO green",
        "SUSPEND",
    ] {
        assert_eq!(guest.ask(query).await.error('C'), "42501", "{query}");
    }
    assert_eq!(proxy.calls(), Vec::<String>::new());
    assert_eq!(guest.ask("SHOW STATS").await.tag.as_deref(), Some("SHOW"));
    assert_eq!(guest.ask("SET datestyle = 'ISO'").await.tag.as_deref(), Some("SET"));
}

/// PgBouncer: one WAIT_CLOSE answers every later PAUSE at once; two PAUSEs of different databases complete together.
#[tokio::test]
async fn each_waiting_command_is_answered_to_its_own_admin_alone() {
    let proxy = Pretended::new();
    let (mut first, mut second) = (enter(&proxy).await, enter(&proxy).await);
    assert_eq!(first.ask("WAIT_CLOSE app").await.tag.as_deref(), Some("WAIT_CLOSE"));
    proxy.set("app", |gate| gate.open_transactions = 1);
    proxy.set("other", |gate| gate.open_transactions = 1);
    first.say("PAUSE app").await;
    second.say("PAUSE other").await;
    proxy.until("both pauses began", |proxy| proxy.is_paused("app") && proxy.is_paused("other")).await;
    proxy.set("other", |gate| gate.open_transactions = 0);
    assert_eq!(second.hear().await.tag.as_deref(), Some("PAUSE"));
    // The second's own next answer is not the first's, and the first has heard nothing.
    assert_eq!(second.ask("SHOW VERSION").await.tags, "TDCZ");
    assert!(first.inbox.is_empty() && !first.served.is_finished());
    proxy.set("app", |gate| gate.open_transactions = 0);
    assert_eq!(first.hear().await.tag.as_deref(), Some("PAUSE"));
}

/// PgBouncer: the PAUSE never returns (issue 715).
#[tokio::test]
async fn resume_answers_a_waiting_pause_with_an_error() {
    let proxy = Pretended::new();
    let (mut first, mut second) = (enter(&proxy).await, enter(&proxy).await);
    proxy.set("app", |gate| gate.open_transactions = 1);
    first.say("PAUSE app").await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    assert_eq!(second.ask("RESUME app").await.tag.as_deref(), Some("RESUME"));
    let heard = first.hear().await;
    assert!(heard.error('M').contains("ended by RESUME"), "{heard:?}");
    assert_eq!((heard.error('C'), &*heard.tags), ("08P01", "EZ"));
}

/// PgBouncer: `PAUSE db` stays paused after Ctrl-C.
#[tokio::test]
async fn a_cancel_undoes_the_pause_that_waits_and_the_console_goes_on() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    // One that comes while nothing waits is lost.
    guest.cancels.notify_waiters();
    proxy.set("app", |gate| gate.open_transactions = 1);
    guest.say("PAUSE app").await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    guest.cancels.notify_waiters();
    let heard = guest.hear().await;
    assert_eq!((heard.error('C'), &*heard.tags), ("57014", "EZ"));
    assert!(heard.error('D').contains("undone"));
    assert!(!proxy.is_paused("app") && proxy.calls().contains(&"undo app".to_owned()));
    proxy.set("app", |gate| gate.open_transactions = 0);
    assert_eq!(guest.ask("PAUSE app").await.tag.as_deref(), Some("PAUSE"));
    assert!(proxy.is_paused("app"), "a complete pause stays");
}

#[tokio::test]
async fn a_cancel_of_an_epoch_pause_says_that_it_stays() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    proxy.set("app", |gate| gate.open_transactions = 1);
    let options = "run '8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f', epoch 7, source blue, target green";
    guest.say(&format!("PAUSE app WITH ({options})")).await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    guest.cancels.notify_waiters();
    let heard = guest.hear().await;
    assert!(heard.error('C') == "57014" && heard.error('D').contains("stays"), "{heard:?}");
    assert!(proxy.is_paused("app"));
}

/// PgBouncer: stays paused for ever.
#[tokio::test]
async fn an_admin_that_hangs_up_while_its_pause_waits_undoes_it() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    proxy.set("app", |gate| gate.open_transactions = 1);
    guest.say("PAUSE").await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    // Sent ahead, and not a sign of life of somebody who then leaves.
    guest.say("SHOW VERSION").await;
    drop(guest.stream);
    proxy.until("the pause is undone", |proxy| !proxy.is_paused("app") && !proxy.is_paused("other")).await;
    tokio::time::timeout(DEADLINE, guest.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_complete_pause_outlives_its_admin() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    assert_eq!(guest.ask("PAUSE app").await.tag.as_deref(), Some("PAUSE"));
    drop(guest.stream);
    tokio::time::timeout(DEADLINE, guest.served).await.unwrap().unwrap().unwrap();
    assert!(proxy.is_paused("app"));
}

#[tokio::test]
async fn queries_sent_ahead_wait_for_the_pause_before_them() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    proxy.set("app", |gate| gate.open_transactions = 1);
    guest.say("PAUSE app").await;
    guest.say("SHOW STATE").await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    proxy.set("app", |gate| gate.open_transactions = 0);
    assert_eq!(guest.hear().await.tag.as_deref(), Some("PAUSE"));
    assert_eq!(guest.hear().await.tag.as_deref(), Some("SHOW"));
}

/// PgBouncer: after KILL of all, SHOW STATE says active.
#[tokio::test]
async fn state_says_paused_when_every_gate_is_shut() {
    let mut guest = enter(&Pretended::new()).await;
    let values = |heard: Heard| heard.rows.into_iter().map(|row| row[1].clone().unwrap()).collect::<Vec<_>>();
    assert_eq!(values(guest.ask("SHOW STATE").await), ["yes", "no", "no"]);
    guest.ask("PAUSE app").await;
    assert_eq!(values(guest.ask("SHOW STATE").await), ["yes", "no", "no"]);
    assert_eq!(guest.ask("SHOW DATABASES").await.column("paused").1, [Some("1"), Some("0")]);
    guest.ask("KILL").await;
    assert_eq!(values(guest.ask("SHOW STATE").await), ["no", "yes", "no"]);
    assert_eq!(guest.ask("SHOW DATABASES").await.column("paused").1, [Some("1"), Some("1")]);
    assert_eq!(guest.ask("RESUME").await.tag.as_deref(), Some("RESUME"));
    assert_eq!(values(guest.ask("SHOW STATE").await), ["yes", "no", "no"]);
}

#[tokio::test]
async fn the_extended_protocol_gets_one_error_and_goes_on_after_sync() {
    let mut guest = enter(&Pretended::new()).await;
    let mut out = BytesMut::new();
    message::put_statement(&mut out, b"SHOW POOLS", &[]);
    guest.send(&out).await;
    let heard = guest.hear().await;
    assert_eq!((heard.error('C'), &*heard.tags), ("0A000", "EZ"));
    assert_eq!(guest.ask("SHOW VERSION").await.tags, "TDCZ");
    // A sequence given up without Sync.
    guest.send(b"P\0\0\0\x08\0\0\0\0").await;
    assert_eq!(guest.message().await.unwrap().0, b'E');
    assert_eq!(guest.ask("SHOW VERSION").await.tags, "TDCZ");
    guest.send(b"F\0\0\0\x0a\0\0\0\0\0\0").await;
    assert_eq!(guest.hear().await.tags, "EZ");
}

#[tokio::test]
async fn bytes_that_are_no_message_end_the_visit_with_a_fatal() {
    for bytes in [
        &b"z\0\0\0\x04"[..],
        b"Q\0\0\0\x03",
        b"Q\xff\xff\xff\xff",
        b"Q\0\x01\0\0",
        b"Q\0\0\0\x04",
        b"Q\0\0\0\x05x",
        b"Q\0\0\0\x07a\0\0",
        b"p\0\0\0\x04",
    ] {
        let mut guest = enter(&Pretended::new()).await;
        guest.send(bytes).await;
        let heard = guest.hear().await;
        assert_eq!((heard.error('S'), heard.error('C'), &*heard.tags), ("FATAL", "08P01", "E"), "{bytes:?}");
        tokio::time::timeout(DEADLINE, guest.served).await.unwrap().unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_stream_that_ends_within_a_message_ends_the_visit_without_a_word() {
    let mut guest = enter(&Pretended::new()).await;
    guest.send(b"Q\0\0\0\x20SHOW").await;
    guest.stream.shutdown().await.unwrap();
    assert_eq!(guest.hear().await.tags, "");
    tokio::time::timeout(DEADLINE, guest.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn too_long_a_command_is_an_error_and_not_the_end() {
    let mut guest = enter(&Pretended::new()).await;
    let heard = guest.ask(&format!("PAUSE {}", "x".repeat(50_000))).await;
    assert_eq!((heard.error('C'), &*heard.tags), ("42601", "EZ"));
    assert_eq!(guest.ask("SHOW VERSION").await.tags, "TDCZ");
    let mut out = BytesMut::new();
    message::put_query(&mut out, b"PAUSE \xff");
    guest.send(&out).await;
    assert_eq!(guest.hear().await.error('C'), "42601");
}

#[tokio::test]
async fn closing_ends_an_idle_visit_and_a_waiting_pause() {
    let proxy = Pretended::new();
    let (mut idle, mut waiting) = (enter(&proxy).await, enter(&proxy).await);
    idle.closing.cancel();
    assert_eq!(idle.hear().await.error('C'), "57P01");
    proxy.set("app", |gate| gate.open_transactions = 1);
    waiting.say("PAUSE app").await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    waiting.closing.cancel();
    assert_eq!(waiting.hear().await.error('C'), "57P01");
    proxy.until("the pause is undone", |proxy| !proxy.is_paused("app")).await;
    tokio::time::timeout(DEADLINE, waiting.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn the_metrics_page_shows_a_pause() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    guest.ask("PAUSE app").await;
    let page = page(readings(&*proxy).await);
    for line in [
        "# TYPE pgcutover_gate_shut gauge",
        "pgcutover_gate_shut{database=\"app\"} 1",
        "pgcutover_gate_shut{database=\"other\"} 0",
        "# TYPE pgcutover_transactions_total counter",
        "pgcutover_transactions_total{database=\"app\"} 30",
        "pgcutover_pool_servers{database=\"app\",user=\"alice\",state=\"login\"} 11",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}\n{page}");
    }
}
