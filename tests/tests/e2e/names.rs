//! Backends by host name: one answer at a time, a changed one is followed loudly, and never during a pause.
//!
//! Invariant: each proxy here has a hosts file of its own, in a mount namespace; that takes root, and without it a test says
//! that it tried nothing.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use e2e::pair::{APP, OTHER, PROXY, SOURCE, TARGET};
use e2e::printer;
use e2e::proxy::own_hosts_file_is_possible;
use e2e::run_dir::RunDir;
use pgcutover_api::store::Outcome;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use toml::Value;

use crate::armed::LIMIT;
use crate::house::table;
use crate::stand::{Stand, WHERE, answered, claim, eventually, outcome, sent, session_pooled};

/// The name of the source's host, and of the target's.
const NAMES: [&str; 2] = ["blue.test", "green.test"];
const HERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 1);
const THERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const MOVED: &str = "a move nobody ordered";

/// Two servers on 127.0.0.1 by their names, and whom 127.0.0.2 answers for.
struct Town {
    stand: Stand,
    hosts: PathBuf,
    relays: Vec<JoinHandle<()>>,
}

impl Town {
    /// `None` where a process can't have a hosts file of its own. At the port of each server `there` answers at
    /// 127.0.0.2: the server with this number.
    async fn found(there: [usize; 2]) -> Option<Town> {
        if !own_hosts_file_is_possible() {
            printer::result(format_args!("nothing was tried: a hosts file for one process takes root and unshare(1)"));
            return None;
        }
        let mut hosts = PathBuf::new();
        let stand = Stand::armed([17, 17], |options, servers| {
            let name = format!("hosts-{}", options.port());
            hosts = RunDir::current().unwrap().path().join(name);
            write(&hosts, [HERE, HERE]);
            options.hosts = Some(hosts.clone());
            options.setting("dns_max_ttl", "100ms");
            options.setting("dns_nxdomain_ttl", "100ms");
            options.setting("hold_budget", "10s");
            session_pooled(options, OTHER);
            for ((backend, name), server) in [SOURCE, TARGET].into_iter().zip(NAMES).zip(servers) {
                options.backend_port(backend, server.port());
                let backend = table(table(options.database("app"), "backends"), backend);
                backend.insert("host".to_owned(), Value::from(name));
            }
        })
        .await;
        let mut relays = Vec::new();
        for (server, answers) in there.into_iter().enumerate() {
            let (from, to) = (stand.servers[server].port(), stand.servers[answers].port());
            relays.push(relay(TcpListener::bind((THERE, from)).await.unwrap(), to));
        }
        Some(Town { stand, hosts, relays })
    }

    /// From now on the names of source and target have these addresses.
    fn points_at(&self, addresses: [Ipv4Addr; 2]) {
        write(&self.hosts, addresses);
    }

    /// What SHOW DNS_HOSTS says of a name.
    async fn shown(&self, name: &str) -> Option<String> {
        let rows = self.stand.ask("SHOW DNS_HOSTS").await;
        let row = rows.iter().find(|row| row.get("hostname") == Some(name))?;
        assert!(row.get("ttl").unwrap().parse::<u64>().unwrap() <= 15);
        Some(row.get("addrs").unwrap().to_owned())
    }

    /// Where a new client's transaction runs.
    async fn serves(&self) -> i64 {
        self.stand.client().await.number(WHERE).await.unwrap()
    }

    /// How often the log says something.
    fn logged(&self, text: &str) -> usize {
        String::from_utf8_lossy(&std::fs::read(self.stand.proxy.log()).unwrap()).matches(text).count()
    }

    /// Cuts the proxy's control connections to a server, and waits until it has made a new one there.
    async fn control_comes_back_to(&self, server: usize) {
        let superuser = self.stand.servers[server].superuser("app").await.unwrap();
        let theirs = format!("FROM pg_stat_activity WHERE usename = '{PROXY}'");
        let cut = format!("SELECT coalesce(max(pid), 0), count(pg_terminate_backend(pid)) {theirs}");
        let former = superuser.number(&cut).await.unwrap();
        assert_ne!(former, 0, "there is a control connection");
        let new = format!("SELECT count(*) {theirs} AND pid <> {former}");
        eventually("the control login is back", async || superuser.number(&new).await.unwrap() > 0).await;
    }
}

impl Drop for Town {
    fn drop(&mut self) {
        self.relays.iter().for_each(JoinHandle::abort);
    }
}

fn write(hosts: &PathBuf, addresses: [Ipv4Addr; 2]) {
    let lines: Vec<String> = addresses.iter().zip(NAMES).map(|(address, name)| format!("{address} {name}\n")).collect();
    // In place: a new file would not lie over the namespace's /etc/hosts.
    std::fs::write(hosts, lines.concat()).unwrap();
}

/// Passes every connection on; ended by the test.
fn relay(listener: TcpListener, to: u16) -> JoinHandle<()> {
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect((HERE, to)).await.unwrap();
                // Whoever closes first ends it.
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    })
}

#[tokio::test]
async fn a_changed_answer_retires_connections_at_rest_and_no_client_gets_an_error() {
    let Some(town) = Town::found([1, 1]).await else { return };
    let stand = &town.stand;
    let (here, there) = (stand.port(0), stand.port(1));
    let (resting, working) = (stand.client().await, stand.client().await);
    let keeping = stand.proxy.connect(OTHER).await.unwrap();
    working.run("BEGIN").await.unwrap();
    for client in [&resting, &working, &keeping] {
        assert_eq!(client.number(WHERE).await.unwrap(), here);
    }
    town.points_at([THERE, HERE]);
    // Asked all the time: each answer is one, and some day it comes from there.
    eventually("it moves", async || resting.number(WHERE).await.unwrap() == there).await;
    assert_eq!(town.serves().await, there);
    assert_eq!(working.number(WHERE).await.unwrap(), here, "an open transaction ends where it began");
    working.run("COMMIT").await.unwrap();
    assert_eq!(working.number(WHERE).await.unwrap(), there);
    assert_eq!(keeping.number(WHERE).await.unwrap(), here, "as in PgBouncer a session keeps its server");
    drop(keeping);
    let former = format!("SELECT count(*) FROM pg_stat_activity WHERE usename IN ('{APP}', '{OTHER}', '{PROXY}')");
    let superuser = stand.servers[0].superuser("app").await.unwrap();
    eventually("the former server is left", async || superuser.number(&former).await.unwrap() == 0).await;
    assert_eq!((town.logged(MOVED), stand.gate("state").await), (1, "open".to_owned()));
    assert!(stand.logged("from=127.0.0.1:") && stand.logged("to=127.0.0.2:"));
    assert!(!stand.logged("no server connection"));
    // Who is there now was asked there.
    let own = stand.servers[1].superuser("app").await.unwrap();
    let identifier = own.text("SELECT system_identifier FROM pg_control_system()").await.unwrap().unwrap();
    eventually("it knows", async || stand.backend(SOURCE, "system_identifier").await == identifier).await;
}

#[tokio::test]
async fn during_a_pause_the_answer_is_frozen_and_the_epoch_is_decided_where_it_was_paused() {
    let Some(town) = Town::found([1, 1]).await else { return };
    let stand = &town.stand;
    let turn = stand.open().await;
    let client = stand.client().await;
    assert_eq!(client.number(WHERE).await.unwrap(), stand.port(0));
    let words = format!("{}, source 'blue', target 'green', drain '200ms', lease '3s'", claim(&turn));
    stand.ask(&format!("PAUSE app WITH ({words})")).await;
    town.points_at([THERE, HERE]);
    let held = sent(client, WHERE);
    town.control_comes_back_to(0).await;
    assert_eq!((town.shown(NAMES[0]).await.as_deref(), town.logged(MOVED)), (Some("127.0.0.1"), 0));
    assert_eq!(stand.gate("run").await, turn.claim.run.to_string(), "the pause was still there");
    // The lease ends: decided on the server that was paused, by a connection made after the answer had changed.
    answered(held).await.unwrap();
    assert_eq!(outcome(&stand.blue()).await, Some(Outcome::Abort));
    assert!(!stand.logged("can't be decided"));
    // What was frozen is looked at now.
    eventually("it moves", async || town.serves().await == stand.port(1)).await;
    assert_eq!(town.logged(MOVED), 1);
}

#[tokio::test]
async fn a_prewarmed_target_stays_where_it_was_prewarmed_until_the_gate_opens() {
    let Some(town) = Town::found([0, 1]).await else { return };
    let stand = &town.stand;
    let client = stand.client().await;
    assert_eq!(client.number(WHERE).await.unwrap(), stand.port(0));
    stand.ask("PREPARE SWITCH app TO green").await;
    let turn = stand.open().await;
    let words = format!("{}, source 'blue', target 'green', drain '200ms', lease '5s'", claim(&turn));
    stand.ask(&format!("PAUSE app WITH ({words})")).await;
    town.points_at([HERE, THERE]);
    town.control_comes_back_to(0).await;
    stand.blue().decide(&turn, Outcome::Commit, LIMIT).await.unwrap();
    let held = sent(client, WHERE);
    stand.ask(&format!("SWITCH app TO green WITH ({})", claim(&turn))).await;
    assert_eq!((town.shown(NAMES[1]).await.as_deref(), town.logged(MOVED)), (Some("127.0.0.1"), 0));
    assert_ne!(stand.backend(TARGET, "connections").await, "0", "what was prewarmed is still there");
    stand.ask(&format!("RESUME app WITH ({})", claim(&turn))).await;
    let there = stand.port(1).to_string();
    assert_eq!(answered(held).await.unwrap()[0].get(0), Some(there.as_str()));
    eventually("it moves", async || town.logged(MOVED) == 1).await;
    assert_eq!(town.shown(NAMES[1]).await.as_deref(), Some("127.0.0.2"));
    assert_eq!(town.serves().await, stand.port(1));
}

#[tokio::test]
async fn names_are_shown_and_a_failed_lookup_keeps_the_former_answer() {
    let Some(town) = Town::found([0, 1]).await else { return };
    let stand = &town.stand;
    assert_eq!(town.serves().await, stand.port(0));
    assert_eq!(town.shown(NAMES[0]).await.as_deref(), Some("127.0.0.1"));
    assert_eq!(town.shown(NAMES[1]).await, None, "nobody needed it yet");
    let lists = stand.ask("SHOW LISTS").await;
    let names = lists.iter().find(|row| row.get("list") == Some("dns_names")).unwrap();
    assert_eq!(names.get("items"), Some("1"));
    std::fs::write(&town.hosts, "").unwrap();
    eventually("the lookup fails", async || stand.logged("a name can't be resolved")).await;
    stand.ask("RECONNECT app").await;
    assert_eq!(town.serves().await, stand.port(0));
    assert_eq!((town.logged("a name can't be resolved"), town.logged(MOVED)), (1, 0));
    town.points_at([HERE, HERE]);
    eventually("it is resolved again", async || stand.logged("resolved again")).await;
    assert_eq!(town.serves().await, stand.port(0));
    // Several lookups failed meanwhile, and one line says so.
    assert_eq!((town.logged("a name can't be resolved"), town.logged(MOVED)), (1, 0));
    assert!(!stand.logged("no server connection"));
}
