//! The console's PAUSE and RESUME: what was measured on others and went wrong there goes right here.
//!
//! Invariant: a pause ends by whoever may end it, by its lease, or with whoever began it; nobody else's command is answered
//! with it.

use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::Duration;

use bytes::BytesMut;
use e2e::binaries::tool;
use e2e::client::Client;
use e2e::faults::{Direction, Fault, FaultProxy};
use e2e::pair::{APP, OTHER, PROXY, SOURCE, password};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcutover_api::store::Outcome;
use postgres_protocol::message::frontend;
use tokio_postgres::{Config, NoTls};

use crate::armed::LIMIT;
use crate::stand::{
    Stand, WHERE, answered, claim, eventually, hasty, outcome, pause, refusal, said, second_database, sent,
    session_pooled, view,
};

const SLEEP: &str = "SELECT pg_sleep(60)";

async fn in_transaction(stand: &Stand) -> Client {
    let client = stand.client().await;
    client.run("BEGIN").await.unwrap();
    client
}

async fn second(stand: &Stand) -> Client {
    let mut config = Config::new();
    config.host("127.0.0.1").port(stand.proxy.port()).user(APP).password(password(APP)).dbname("second");
    Client::connect(&config).await.unwrap()
}

#[tokio::test]
async fn a_pause_is_not_answered_by_an_earlier_wait_close() {
    let stand = Stand::start(&[17], second_database).await;
    let mut console = stand.console().await;
    stand.client().await.run("SELECT 1").await.unwrap();
    assert_eq!(said(&console.query("RECONNECT app; ").await.unwrap().0), ["RECONNECT"]);
    assert_eq!(said(&console.query("WAIT_CLOSE app").await.unwrap().0), ["WAIT_CLOSE"]);
    let client = second(&stand).await;
    client.run("BEGIN").await.unwrap();
    let pausing = tokio::spawn(async move { console.query("PAUSE second").await.unwrap().0 });
    eventually("it pauses", async || stand.gate_of("second", "state").await == "pausing").await;
    assert_eq!((stand.gate_of("second", "drained").await.as_str(), pausing.is_finished()), ("no", false));
    client.run("COMMIT").await.unwrap();
    assert_eq!(said(&pausing.await.unwrap()), ["PAUSE"]);
    assert_eq!(stand.gate_of("second", "state").await, "paused");
}

/// Pauses, gives the active backend another address, logs in, resumes: nobody sees more than a wait.
async fn address_changes(pause: &str, resume: &str) {
    let mut stand = Stand::start(&[13, 17], |_, _| ()).await;
    let (idle, held) = (stand.client().await, stand.client().await);
    assert_eq!((idle.number(WHERE).await.unwrap(), held.number(WHERE).await.unwrap()), (stand.port(0), stand.port(0)));
    stand.ask(pause).await;
    let held = sent(held, WHERE);
    stand.gate_says("held_clients", "1").await;
    let port = stand.servers[1].port();
    stand.proxy.options().backend_port(SOURCE, port);
    stand.proxy.write().unwrap();
    stand.ask("RELOAD").await;
    assert_eq!(stand.gate("state").await, "paused", "a pause survives RELOAD");
    let new = stand.client().await;
    let new = sent(new, WHERE);
    stand.gate_says("held_clients", "2").await;
    stand.ask(resume).await;
    let there = stand.port(1).to_string();
    for answer in [held, new] {
        assert_eq!(answered(answer).await.unwrap()[0].get(0), Some(there.as_str()));
    }
    assert_eq!(idle.text(WHERE).await.unwrap(), Some(there));
    assert_eq!(stand.client().await.number(WHERE).await.unwrap(), stand.port(1));
    // No wait of `server_login_retry` in it, and nothing that counts as a failed login.
    assert!(!stand.logged("no server connection"));
    assert_eq!(stand.ask("SHOW SWITCHES").await[0].get("how"), Some("reload"));
}

#[tokio::test]
async fn an_address_that_changes_under_a_pause_of_one_database_is_used_at_once() {
    address_changes("PAUSE app", "RESUME app").await;
}

#[tokio::test]
async fn an_address_that_changes_under_a_pause_of_all_is_used_at_once() {
    address_changes("PAUSE", "RESUME").await;
}

#[tokio::test]
async fn a_cancel_reaches_the_query_that_a_pause_waits_for_and_poisons_nothing() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let client = stand.client().await;
    let cancel = client.cancel_token();
    let running = sent(client, SLEEP);
    stand.runs(1).await;
    let pausing = stand.begin("PAUSE").await;
    stand.gate_says("state", "pausing").await;
    cancel.cancel_query(NoTls).await.unwrap();
    answered(pausing).await.unwrap();
    assert_eq!(answered(running).await.unwrap_err().code().code(), "57014");
    stand.ask("RESUME").await;
    stand.client().await.run("SELECT 1").await.unwrap();
    assert!(!stand.logged("no server connection"));
}

#[tokio::test]
async fn resume_answers_the_pause_that_another_admin_waits_for() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let client = in_transaction(&stand).await;
    let pausing = stand.begin("PAUSE app").await;
    stand.gate_says("state", "pausing").await;
    stand.ask("RESUME app").await;
    let error = answered(pausing).await.unwrap_err();
    assert!(error.message().contains("ended before it was complete"), "{error}");
    assert_eq!(stand.gate("state").await, "open");
    client.run("COMMIT; SELECT 1").await.unwrap();
}

#[tokio::test]
async fn a_pause_whose_admin_dies_before_it_is_complete_is_undone() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let client = in_transaction(&stand).await;
    for command in ["PAUSE app", "PAUSE", "PAUSE app WITH (drain '6s', lease '8s')"] {
        let mut console = stand.console().await;
        let mut query = BytesMut::new();
        frontend::query(command, &mut query).unwrap();
        console.send(&query).await.unwrap();
        stand.gate_says("state", "pausing").await;
        drop(console);
        stand.gate_says("state", "open").await;
    }
    client.run("COMMIT; SELECT 1").await.unwrap();
}

#[tokio::test]
async fn an_epoch_pause_whose_admin_dies_ends_by_its_lease_with_an_abort() {
    let stand = Stand::armed([17, 17], |_, _| ()).await;
    let turn = stand.open().await;
    stand.proxy.admin().await.unwrap().rows(&pause(&turn)).await.unwrap();
    stand.gate_says("state", "open").await;
    assert_eq!(outcome(&stand.blue()).await, Some(Outcome::Abort));
    // While it still waits for the drain.
    let client = in_transaction(&stand).await;
    let turn = stand.open().await;
    let mut console = stand.console().await;
    let mut query = BytesMut::new();
    frontend::query(&pause(&turn).replace("200ms", "590ms"), &mut query).unwrap();
    console.send(&query).await.unwrap();
    stand.gate_says("state", "pausing").await;
    drop(console);
    stand.gate_says("state", "open").await;
    let last = view(&stand.blue()).await.last.unwrap();
    assert_eq!((last.epoch, last.outcome), (turn.claim.epoch, Outcome::Abort));
    client.run("COMMIT; SELECT 1").await.unwrap();
}

#[tokio::test]
async fn a_cancelled_pause_is_undone() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let client = in_transaction(&stand).await;
    for command in ["PAUSE", "PAUSE app"] {
        let admin = stand.proxy.admin().await.unwrap();
        let cancel = admin.cancel_token();
        let pausing = sent(admin, command);
        stand.gate_says("state", "pausing").await;
        cancel.cancel_query(NoTls).await.unwrap();
        assert_eq!(answered(pausing).await.unwrap_err().code().code(), "57014");
        assert_eq!(stand.gate("state").await, "open", "{command}");
    }
    client.run("COMMIT; SELECT 1").await.unwrap();
}

#[tokio::test]
async fn ctrl_c_in_psql_undoes_a_pause() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let client = in_transaction(&stand).await;
    let mut psql = tokio::process::Command::from({
        let mut command = std::process::Command::new(tool("psql").unwrap());
        command.process_group(0);
        command
    });
    psql.args(["-X", "-d", &stand.proxy.admin_dsn(), "-c", "PAUSE app"]).stdout(Stdio::null()).stderr(Stdio::piped());
    let psql = psql.kill_on_drop(true).spawn().unwrap();
    let pid = Pid::from_raw(psql.id().unwrap().cast_signed());
    stand.gate_says("state", "pausing").await;
    kill(pid, Signal::SIGINT).unwrap();
    let output = tokio::time::timeout(LIMIT, psql.wait_with_output()).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("cancel"), "{output:?}");
    assert_eq!(stand.gate("state").await, "open");
    client.run("COMMIT; SELECT 1").await.unwrap();
}

#[tokio::test]
async fn pauses_of_two_databases_complete_independently() {
    let stand = Stand::start(&[17], second_database).await;
    let (long, short) = (in_transaction(&stand).await, second(&stand).await);
    short.run("BEGIN").await.unwrap();
    let (first, other) = (stand.begin("PAUSE app").await, stand.begin("PAUSE second").await);
    stand.gate_says("state", "pausing").await;
    eventually("both pause", async || stand.gate_of("second", "state").await == "pausing").await;
    short.run("COMMIT").await.unwrap();
    answered(other).await.unwrap();
    assert_eq!((stand.gate("state").await.as_str(), first.is_finished()), ("pausing", false));
    long.run("COMMIT").await.unwrap();
    answered(first).await.unwrap();
}

#[tokio::test]
async fn resume_ends_what_kill_has_paused() {
    let stand = Stand::start(&[17], second_database).await;
    let victim = in_transaction(&stand).await;
    stand.ask("KILL").await;
    eventually("the victim is gone", async || victim.is_closed()).await;
    assert_eq!(stand.gate("state").await, "paused");
    assert_eq!(
        stand.ask("SHOW STATE").await.iter().find(|row| row.get(0) == Some("paused")).unwrap().get(1),
        Some("yes")
    );
    stand.ask("RESUME").await;
    assert_eq!((stand.gate("state").await, stand.gate_of("second", "state").await), ("open".into(), "open".into()));
    stand.client().await.run("SELECT 1").await.unwrap();
}

#[tokio::test]
async fn an_idle_session_pooled_client_does_not_block_a_pause() {
    let stand = Stand::start(&[17], |options, _| session_pooled(options, OTHER)).await;
    let client = stand.proxy.connect(OTHER).await.unwrap();
    let pid = client.number("SELECT pg_backend_pid()").await.unwrap();
    stand.ask("PAUSE app").await;
    assert_eq!(stand.gate("drained").await, "yes");
    let blockers = stand.ask("SHOW BLOCKERS app").await;
    assert_eq!((blockers[0].get("reason"), blockers[0].get("user")), (Some("session_pooling"), Some(OTHER)));
    stand.ask("RESUME app").await;
    assert_eq!(client.number("SELECT pg_backend_pid()").await.unwrap(), pid, "and it keeps its server");
}

#[tokio::test]
async fn timers_do_not_end_clients_that_a_pause_holds() {
    let stand = Stand::start(&[17], |options, _| {
        options.setting("query_wait_timeout", "300ms");
        options.setting("client_login_timeout", "300ms");
        // Without it nobody can welcome a user whom no server has seen: its login has to wait for the pause's end.
        options.database("app").remove("control_user");
        options.database("app").remove("control_password");
    })
    .await;
    let held = stand.client().await;
    held.run("SELECT 1").await.unwrap();
    stand.ask("PAUSE app").await;
    let held = sent(held, "SELECT 1");
    stand.gate_says("held_clients", "1").await;
    let (port, secret) = (stand.proxy.port(), password(OTHER));
    let entering = tokio::spawn(async move { e2e::wire::Wire::log_in(port, OTHER, &secret, "app").await.map(drop) });
    stand.gate_says("held_clients", "2").await;
    stand.held_for(Duration::from_millis(900)).await;
    stand.ask("RESUME app").await;
    answered(held).await.unwrap();
    entering.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_opened_side_by_side_after_a_pause() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let slow = FaultProxy::start(stand.servers[0].port()).await.unwrap();
    let mut stand = stand;
    stand.proxy.options().backend_port(SOURCE, slow.port());
    stand.proxy.write().unwrap();
    stand.ask("RELOAD").await;
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(stand.client().await);
    }
    stand.ask("PAUSE app").await;
    let held: Vec<_> = clients.into_iter().map(|client| sent(client, "SELECT pg_sleep(0.3)")).collect();
    stand.gate_says("held_clients", "20").await;
    slow.set(Direction::Down, Fault::Delay(Duration::from_millis(100)));
    let admin = stand.proxy.admin().await.unwrap();
    admin.rows("RESUME app").await.unwrap();
    let mut most = 0;
    eventually("four logins at once", async || {
        let pools = admin.rows("SHOW POOLS").await.unwrap();
        let pool = pools.iter().find(|row| row.get("user") == Some(APP)).unwrap();
        most = most.max(pool.get("sv_login").unwrap().parse().unwrap());
        most >= 4
    })
    .await;
    for answer in held {
        answered(answer).await.unwrap();
    }
}

#[tokio::test]
async fn a_leased_pause_that_is_not_drained_in_time_gives_up_and_traffic_goes_on() {
    let stand = Stand::start(&[17], |options, _| hasty(options)).await;
    // Without it a server shows nobody else's queries.
    let superuser = stand.servers[0].superuser("app").await.unwrap();
    superuser.run(&format!("GRANT pg_read_all_stats TO {PROXY}")).await.unwrap();
    let client = in_transaction(&stand).await;
    let pid = client.number("SELECT pg_backend_pid()").await.unwrap();
    let held = sent(stand.client().await, SLEEP);
    stand.runs(2).await;
    let error = stand.refused("PAUSE app WITH (drain '100ms', lease '500ms')").await;
    assert_eq!(error.code().code(), "55P03");
    assert!(error.message().contains("2 transactions"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("SHOW BLOCKERS")));
    assert_eq!(stand.gate("state").await, "open");
    let blockers = stand.ask("SHOW BLOCKERS app").await;
    let idle = blockers.iter().find(|row| row.get("server_pid") == Some(pid.to_string().as_str())).unwrap();
    assert_eq!((idle.get("reason"), idle.get("state")), (Some("transaction"), Some("T")));
    let busy = blockers.iter().find(|row| row.get("query") == Some(SLEEP)).unwrap();
    assert_eq!((busy.get("user"), busy.get("state")), (Some(APP), Some("active")));
    assert!(busy.get("client_id").unwrap().parse::<u64>().unwrap() > 0);
    stand.client().await.run("SELECT 1").await.unwrap();
    client.run("COMMIT").await.unwrap();
    held.abort();
}

#[tokio::test]
async fn a_pause_can_cancel_what_still_runs() {
    let stand = Stand::start(&[17], |options, _| hasty(options)).await;
    let running = stand.client().await;
    let cancelled = tokio::spawn(async move {
        let error = refusal(&running, SLEEP).await;
        (error.code().code().to_owned(), running)
    });
    stand.runs(1).await;
    stand.ask("PAUSE app WITH (drain '300ms', lease '1s', on_timeout cancel)").await;
    let (code, client) = cancelled.await.unwrap();
    assert_eq!(code, "57014");
    client.run("SELECT 1").await.unwrap();
}

#[tokio::test]
async fn a_pause_can_terminate_what_does_not_end() {
    let stand = Stand::start(&[17], |options, _| hasty(options)).await;
    let (idle, other) = (in_transaction(&stand).await, stand.client().await);
    stand.ask("PAUSE app WITH (drain '300ms', lease '1s', on_timeout terminate)").await;
    eventually("it is gone", async || idle.is_closed()).await;
    other.run("SELECT 1").await.unwrap();
}

#[tokio::test]
async fn a_lease_without_an_epoch_ends_by_itself() {
    let stand = Stand::start(&[17], |options, _| hasty(options)).await;
    let client = stand.client().await;
    stand.ask("PAUSE app WITH (drain '100ms', lease '300ms')").await;
    let held = sent(client, "SELECT 1");
    answered(held).await.unwrap();
    assert_eq!(stand.gate("state").await, "open");
}

#[tokio::test]
async fn a_pause_with_an_epoch_is_ended_by_its_run_or_by_force_only() {
    let stand = Stand::armed([17, 17], |options, _| options.setting("hold_budget", "60s")).await;
    let turn = stand.open().await;
    let claim = claim(&turn);
    let run = turn.claim.run.to_string();
    stand.ask(&format!("PAUSE app WITH ({claim}, source 'blue', target 'green', drain '1s', lease '20s')")).await;
    for stranger in [
        "RESUME app".to_owned(),
        format!("RESUME app WITH (run '{}', epoch {})", pgcutover_api::epoch::RunId::random(), turn.claim.epoch),
        format!("RESUME app WITH (run '{run}', epoch {})", turn.claim.epoch.as_u64() + 1),
        format!("RENEW app WITH (run '{run}', epoch {}, lease '1s')", turn.claim.epoch.as_u64() + 1),
        format!(
            "RENEW app WITH (run '{}', epoch {}, lease '1s')",
            pgcutover_api::epoch::RunId::random(),
            turn.claim.epoch
        ),
        "PAUSE app WITH (drain '100ms', lease '1s')".to_owned(),
    ] {
        let error = stand.refused(&stranger).await;
        assert!(error.message().contains(&run), "{stranger}: {error}");
        if stranger != "RESUME app" {
            assert_eq!(error.code().code(), "55000", "{stranger}");
        }
    }
    assert!(stand.gate("lease_ms").await.parse::<u64>().unwrap() <= 20_000);
    stand.ask(&format!("RENEW app WITH ({claim}, lease '40s')")).await;
    assert!(stand.gate("lease_ms").await.parse::<u64>().unwrap() > 20_000);
    assert_eq!((stand.gate("run").await, stand.gate("state").await), (run.clone(), "paused".to_owned()));
    stand.ask("RESUME app WITH (force)").await;
    // The epoch is still open: the proxy holds again by itself until somebody decides it (R9).
    stand.gate_says("run", &run).await;
    stand.blue().decide(&turn, Outcome::Abort, LIMIT).await.unwrap();
    stand.gate_says("state", "open").await;
}
