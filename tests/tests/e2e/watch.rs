//! The proxy looks for itself (R7 to R10, R14): whoever dies and whatever nobody said, it ends on the side that was decided.
//!
//! Invariant: nobody resumes on the source without a recorded abort, and nobody serves the target without its evidence.

use std::fs;

use e2e::binaries::Binaries;
use e2e::cluster::{ClusterOptions, Identity, Stop};
use e2e::faults::{Cut, FaultProxy};
use e2e::pair::{APP, OTHER, PROXY, PairOptions, SOURCE, TARGET, password, single};
use e2e::proxy::{Proxy, ProxyOptions};
use pgcutover_api::epoch::{Claim, RunId};
use pgcutover_api::store::{Name, Outcome, Turn};
use proxyctl::clusters::Role;

use crate::armed::{LIMIT, as_proxyctl};
use crate::stand::{Stand, WHERE, answered, app, claim, eventually, hasty, outcome, pause, sent, view};

const MAJORS: [u32; 2] = [15, 17];

async fn decide(stand: &Stand, turn: &Turn, want: Outcome) {
    assert_eq!(stand.blue().decide(turn, want, LIMIT).await.unwrap(), want);
}

async fn witnessed(stand: &Stand, turn: &Turn) -> bool {
    let commit = view(&stand.green()).await.last_commit;
    commit.is_some_and(|commit| commit.epoch == turn.claim.epoch && commit.run == turn.claim.run)
}

/// Clients are on the target, by this epoch, with its evidence.
async fn on_green(stand: &Stand, turn: &Turn) {
    eventually("green is active", async || stand.gate("backend").await == TARGET).await;
    stand.gate_says("state", "open").await;
    assert_eq!(stand.client().await.number(WHERE).await.unwrap(), stand.port(1));
    assert_eq!(stand.gate("route_epoch").await, turn.claim.epoch.to_string());
    assert!(witnessed(stand, turn).await);
}

/// The epoch is committed, and the evidence is on its target.
async fn commit(stand: &Stand, turn: &Turn) {
    decide(stand, turn, Outcome::Commit).await;
    stand.green().witness(turn, &Name::new(TARGET).unwrap(), LIMIT).await.unwrap();
}

/// The proxy holds for an epoch, loses its source, and misses that the epoch was aborted and another one opened: that one.
async fn slept_through_an_abort(stand: &Stand, relay: &FaultProxy) -> Turn {
    let missed = stand.open().await;
    stand.ask(&pause(&missed)).await;
    relay.shut();
    decide(stand, &missed, Outcome::Abort).await;
    stand.open().await
}

/// A stand whose proxy reaches the source through a relay that can break.
async fn behind_a_relay() -> (Stand, FaultProxy) {
    let mut stand = Stand::armed(MAJORS, |_, _| ()).await;
    let relay = FaultProxy::start(stand.servers[0].port()).await.unwrap();
    stand.proxy.options().backend_port(SOURCE, relay.port());
    stand.proxy.write().unwrap();
    stand.ask("RELOAD").await;
    (stand, relay)
}

#[tokio::test]
async fn an_open_epoch_that_nobody_told_of_is_held_and_aborted_when_its_lease_is_over() {
    let stand = Stand::armed(MAJORS, |_, _| ()).await;
    stand.client().await.run("SELECT 1").await.unwrap();
    let turn = stand.open().await;
    stand.gate_says("run", &turn.claim.run.to_string()).await;
    let held = sent(stand.client().await, WHERE);
    assert_eq!(answered(held).await.unwrap()[0].get(0), Some(stand.port(0).to_string().as_str()));
    assert_eq!(outcome(&stand.blue()).await, Some(Outcome::Abort));
    stand.gate_says("state", "open").await;
}

#[tokio::test]
async fn a_commit_that_nobody_told_of_is_followed_with_its_evidence_first() {
    let stand = Stand::armed(MAJORS, |_, _| ()).await;
    let green = stand.servers[1].superuser("app").await.unwrap();
    let everyone = "SELECT string_agg(oid::regprocedure::text, ', ') FROM pg_proc WHERE proname = 'witness'";
    let witness = green.text(everyone).await.unwrap().unwrap();
    green.run(&format!("REVOKE EXECUTE ON FUNCTION {witness} FROM {PROXY}")).await.unwrap();
    let turn = stand.open().await;
    decide(&stand, &turn, Outcome::Commit).await;
    eventually("it says why it holds", async || stand.logged("can't be followed yet")).await;
    let held = sent(stand.client().await, WHERE);
    stand.gate_says("held_clients", "1").await;
    assert_eq!((stand.gate("backend").await, stand.gate("state").await), (SOURCE.into(), "paused".into()));
    assert!(!held.is_finished(), "nobody is served before the evidence is there");
    green.run(&format!("GRANT EXECUTE ON FUNCTION {witness} TO {PROXY}")).await.unwrap();
    assert_eq!(answered(held).await.unwrap()[0].get(0), Some(stand.port(1).to_string().as_str()));
    on_green(&stand, &turn).await;
    assert_eq!(stand.ask("SHOW SWITCHES").await[0].get("how"), Some("followed"));
}

#[tokio::test]
async fn a_proxy_that_restarts_with_a_stale_route_follows() {
    let mut stand = Stand::armed(MAJORS, |_, _| ()).await;
    stand.client().await.run("SELECT 1").await.unwrap();
    stand.proxy.kill9();
    let turn = stand.open().await;
    decide(&stand, &turn, Outcome::Commit).await;
    stand.kill_and_restart().await;
    assert_eq!(stand.client().await.number(WHERE).await.unwrap(), stand.port(1), "it looks before it serves anybody");
    on_green(&stand, &turn).await;
    stand.kill_and_restart().await;
    assert_eq!(stand.client().await.number(WHERE).await.unwrap(), stand.port(1), "and it has been written down");
}

#[tokio::test]
async fn a_pause_of_an_epoch_that_is_not_open_here_is_refused() {
    let stand = Stand::armed(MAJORS, |_, _| ()).await;
    let decided = stand.open().await;
    decide(&stand, &decided, Outcome::Abort).await;
    let unknown = Turn { db: app(), claim: Claim { run: RunId::random(), epoch: 9_u64.try_into().unwrap() } };
    let open = stand.open().await;
    let foreign = Turn { db: app(), claim: Claim { run: RunId::random(), epoch: open.claim.epoch } };
    for turn in [&decided, &unknown, &foreign] {
        let error = stand.refused(&pause(turn)).await;
        assert_eq!(error.code().code(), "55000", "{error}");
        assert!(error.message().contains("is not open in the store"), "{error}");
    }
    let error =
        stand.refused(&pause(&open).replace("source 'blue', target 'green'", "source 'green', target 'blue'")).await;
    assert_eq!((error.code().code(), error.message()), ("55000", "app is on backend 'blue', not on 'green'"));
    let error = stand.refused(&pause(&open).replace("'green'", "'red'")).await;
    assert_eq!(error.code().code(), "42704");
    decide(&stand, &open, Outcome::Abort).await;
}

#[tokio::test]
async fn switch_and_resume_need_the_decision_that_the_proxy_has_read() {
    let stand = Stand::armed(MAJORS, |options, _| options.setting("hold_budget", "60s")).await;
    let lasting = |turn: &Turn| pause(turn).replace("600ms", "20s");
    let turn = stand.open().await;
    stand.ask(&lasting(&turn)).await;
    let claimed = claim(&turn);
    let (switch, resume) = (format!("SWITCH app TO green WITH ({claimed})"), format!("RESUME app WITH ({claimed})"));
    assert_eq!(stand.refused(&switch).await.code().code(), "57P03");
    assert_eq!(stand.refused(&resume).await.code().code(), "57P03");
    assert_eq!(stand.gate("state").await, "paused");
    decide(&stand, &turn, Outcome::Abort).await;
    assert_eq!(stand.refused(&switch).await.code().code(), "57P03", "an abort is no commit");
    let other = Turn { claim: Claim { run: RunId::random(), epoch: turn.claim.epoch }, db: app() };
    // The watch may have read the abort by now and resumed; then there is no pause to switch under.
    let error = stand.refused(&format!("SWITCH app TO green WITH ({})", claim(&other))).await;
    assert_eq!(error.code().code(), "55000");
    stand.gate_says("state", "open").await;
    let turn = stand.open().await;
    let pausing = lasting(&turn);
    eventually("it pauses", async || stand.admin.rows(&pausing).await.is_ok()).await;
    let claimed = claim(&turn);
    decide(&stand, &turn, Outcome::Commit).await;
    let wrong = stand.admin.rows(&format!("SWITCH app TO blue WITH ({claimed})")).await;
    assert!(wrong.is_err(), "committed to another backend");
    // By order or, if the watch was faster, by itself.
    let _ = stand.admin.rows(&format!("SWITCH app TO green WITH ({claimed})")).await;
    let _ = stand.admin.rows(&format!("RESUME app WITH ({claimed})")).await;
    on_green(&stand, &turn).await;
    assert_eq!(stand.refused(&pausing).await.code().code(), "55000", "the epoch is over");
}

#[tokio::test]
async fn a_lease_that_ends_after_a_commit_ends_on_the_target() {
    let stand = Stand::armed(MAJORS, |_, _| ()).await;
    let turn = stand.open().await;
    stand.ask(&pause(&turn)).await;
    let held = sent(stand.client().await, WHERE);
    decide(&stand, &turn, Outcome::Commit).await;
    assert_eq!(answered(held).await.unwrap()[0].get(0), Some(stand.port(1).to_string().as_str()));
    on_green(&stand, &turn).await;
}

#[tokio::test]
async fn without_its_source_a_proxy_holds_then_sheds_and_decides_when_it_is_back() {
    let (stand, relay) = behind_a_relay().await;
    let client = stand.client().await;
    client.run("SELECT 1").await.unwrap();
    let turn = stand.open().await;
    stand.ask(&pause(&turn)).await;
    relay.shut();
    let shed = answered(sent(client, "SELECT 1")).await.unwrap_err();
    assert_eq!(shed.code().code(), "57P03");
    assert_eq!((stand.gate("state").await, outcome(&stand.blue()).await), ("paused".to_owned(), None));
    let late = stand.refused(&format!("RENEW app WITH ({}, lease '1s')", claim(&turn))).await;
    assert_eq!(late.code().code(), "55000");
    assert!(late.message().contains("has ended"), "{late}");
    relay.reopen();
    stand.gate_says("state", "open").await;
    assert_eq!(outcome(&stand.blue()).await, Some(Outcome::Abort));
    stand.client().await.run("SELECT 1").await.unwrap();
}

#[tokio::test]
async fn evidence_on_the_target_counts_when_the_source_is_gone() {
    let (stand, relay) = behind_a_relay().await;
    let turn = stand.open().await;
    stand.ask(&pause(&turn)).await;
    relay.shut();
    commit(&stand, &turn).await;
    on_green(&stand, &turn).await;
    relay.cut(Cut::Reset);
}

/// It was cut off while one epoch was aborted and the next one committed.
#[tokio::test]
async fn who_missed_an_abort_follows_the_commit_that_came_after_it() {
    let (stand, relay) = behind_a_relay().await;
    let turn = slept_through_an_abort(&stand, &relay).await;
    commit(&stand, &turn).await;
    on_green(&stand, &turn).await;
    relay.cut(Cut::Reset);
}

/// R9: an abort is not the last word where a newer epoch is open; no client is served in between.
#[tokio::test]
async fn who_learns_of_an_abort_late_holds_on_for_the_epoch_after_it() {
    let (stand, relay) = behind_a_relay().await;
    let turn = slept_through_an_abort(&stand, &relay).await;
    let held = sent(stand.client().await, WHERE);
    stand.gate_says("held_clients", "1").await;
    relay.reopen();
    stand.gate_says("run", &turn.claim.run.to_string()).await;
    assert!(!held.is_finished(), "nobody is served between two epochs");
    decide(&stand, &turn, Outcome::Commit).await;
    assert_eq!(answered(held).await.unwrap()[0].get(0), Some(stand.port(1).to_string().as_str()));
    on_green(&stand, &turn).await;
}

/// A proxy that was not there when its database moved, and finds the old server gone.
#[tokio::test]
async fn who_starts_with_a_stale_route_and_no_source_finds_the_evidence() {
    let (mut stand, relay) = behind_a_relay().await;
    stand.client().await.run("SELECT 1").await.unwrap();
    stand.proxy.kill9();
    let turn = stand.open().await;
    commit(&stand, &turn).await;
    relay.shut();
    stand.kill_and_restart().await;
    on_green(&stand, &turn).await;
    relay.cut(Cut::Reset);
}

#[tokio::test]
async fn a_server_that_took_the_sources_place_is_never_asked_to_decide() {
    let mut stand = Stand::armed(MAJORS, |_, _| ()).await;
    let binaries = Binaries::of(&[MAJORS[0]]).unwrap();
    let source = ClusterOptions { identity: Identity::Own, ..ClusterOptions::new(MAJORS[0]) };
    let options = PairOptions { source, ..PairOptions::new(MAJORS[0], MAJORS[0]) };
    let mut impostor = single(&binaries, &options).await.unwrap();
    let store = as_proxyctl(Role::Source, &impostor);
    store.install(LIMIT).await.unwrap();
    store.grant(PROXY, LIMIT).await.unwrap();
    let turn = stand.open().await;
    stand.ask(&pause(&turn)).await;
    let Claim { run, epoch } = turn.claim;
    let superuser = impostor.superuser("app").await.unwrap();
    superuser
        .run(&format!("INSERT INTO pgcutover.state VALUES ('app', {epoch}, '{run}', 'green', now())"))
        .await
        .unwrap();
    drop(superuser);
    // Another cluster comes up at the source's port, with a store that would decide.
    impostor.stop(Stop::Fast);
    let blue = &mut stand.servers[0];
    blue.stop(Stop::Fast);
    fs::copy(blue.data().join("postgresql.conf"), impostor.data().join("postgresql.conf")).unwrap();
    let aside = blue.dir().join("aside");
    fs::rename(blue.data(), &aside).unwrap();
    fs::rename(impostor.data(), blue.data()).unwrap();
    blue.restart().await.unwrap();
    // However often it is asked: it does not become the one that was paused by being there.
    let said = || fs::read_to_string(stand.proxy.log()).unwrap().matches("not the one that was paused").count();
    eventually("it says why it holds, again and again", async || said() > 3).await;
    assert_eq!(stand.gate("state").await, "paused");
    assert_eq!(outcome(&stand.blue()).await, None);
    // The real one is back.
    let blue = &mut stand.servers[0];
    blue.stop(Stop::Fast);
    fs::rename(blue.data(), impostor.data()).unwrap();
    fs::rename(&aside, blue.data()).unwrap();
    blue.restart().await.unwrap();
    stand.gate_says("state", "open").await;
    assert_eq!(outcome(&stand.blue()).await, Some(Outcome::Abort));
}

#[tokio::test]
async fn two_proxies_agree_in_whatever_order_their_leases_end() {
    let stand = Stand::armed(MAJORS, |_, _| ()).await;
    let backends = [(SOURCE, stand.servers[0].port()), (TARGET, stand.servers[1].port())];
    let mut options = ProxyOptions::for_backends(&backends, 2).unwrap();
    options.users.extend([APP, OTHER].map(|user| format!("\"{user}\" \"{}\"", password(user))));
    hasty(&mut options);
    let second = Proxy::start(options).await.unwrap();
    let second = (second.admin().await.unwrap(), second);
    let gate = async |column: &str| second.0.rows("SHOW GATES").await.unwrap()[0].get(column).unwrap().to_owned();
    for (leases, want) in [
        (["250ms", "900ms"], Outcome::Abort),
        (["900ms", "250ms"], Outcome::Abort),
        (["250ms", "900ms"], Outcome::Commit),
    ] {
        let turn = stand.open().await;
        let [one, two] = leases.map(|lease| pause(&turn).replace("600ms", lease));
        stand.ask(&one).await;
        // The first one's lease may have ended already and its abort be there: then there is nothing to pause for.
        let _ = second.0.rows(&two).await;
        if want == Outcome::Commit {
            // Too late is possible, and then both have to end on the source.
            let _ = stand.blue().decide(&turn, Outcome::Commit, LIMIT).await;
        }
        stand.gate_says("state", "open").await;
        eventually("the other is open", async || gate("state").await == "open").await;
        let decided = outcome(&stand.blue()).await.unwrap();
        let backend = if decided == Outcome::Commit { TARGET } else { SOURCE };
        eventually("the other is there", async || gate("backend").await == backend).await;
        assert_eq!(stand.gate("backend").await, backend);
    }
}

#[tokio::test]
async fn the_defaults_of_the_control_login_change_nothing() {
    let mut stand = Stand::armed(MAJORS, |_, _| ()).await;
    for level in ["serializable", "repeatable read"] {
        for server in &stand.servers {
            let superuser = server.superuser("app").await.unwrap();
            superuser.run(&format!("ALTER ROLE {PROXY} SET default_transaction_isolation = '{level}'")).await.unwrap();
            superuser.run(&format!("ALTER ROLE {PROXY} SET default_transaction_read_only = on")).await.unwrap();
        }
        stand.kill_and_restart().await;
        let turn = stand.open().await;
        stand.ask(&pause(&turn)).await;
        stand.gate_says("state", "open").await;
        assert_eq!(outcome(&stand.blue()).await, Some(Outcome::Abort), "{level}");
    }
    let turn = stand.open().await;
    decide(&stand, &turn, Outcome::Commit).await;
    on_green(&stand, &turn).await;
}
