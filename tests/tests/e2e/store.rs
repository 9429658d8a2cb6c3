//! The decision store on real servers: one outcome for an epoch, whoever asks, under whatever defaults.

use e2e::binaries::Binaries;
use e2e::pair::{APP, DATABASE, PROXY, Pair, PairOptions, Publication, SUBSCRIPTION, password};
use futures_util::future::join_all;
use pgcutover_api::epoch::{Claim, Epoch, RunId};
use pgcutover_api::store::{self, GateForm, Member, Name, Outcome, StoreView, Turn};
use proxyctl::clusters::{Clusters, DecideError, Feed, Role};
use tokio_postgres::SimpleQueryMessage;

use crate::armed::{Armed, LEVELS, LIMIT, MAJORS, as_proxyctl, sqlstate};

fn outcome(messages: &[SimpleQueryMessage]) -> Outcome {
    let row = messages.iter().find_map(|m| if let SimpleQueryMessage::Row(row) = m { Some(row) } else { None });
    store::decode_outcome(&[row.unwrap().get(0)]).unwrap()
}

/// Thirty proxies at once, half of them for commit: all get the same answer, whatever their role's defaults are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_concurrent_decisions_agree() {
    for major in MAJORS {
        let armed = Armed::start(major).await;
        let superuser = armed.superuser().await;
        for level in LEVELS {
            let defaults = [("default_transaction_isolation", level), ("default_transaction_read_only", "on")];
            for (name, value) in defaults.into_iter().chain([("synchronous_commit", "off")]) {
                superuser.run(&format!("ALTER ROLE {PROXY} SET {name} = '{value}'")).await.unwrap();
            }
            // A route for each level: a server that has lost one opens no more epochs of it.
            let db = Name::new(&format!("{DATABASE} {level}")).unwrap();
            let run = RunId::random();
            let epoch = armed.control.open(&db, run, &Name::new("green").unwrap(), Epoch::ZERO).await.unwrap();
            let turn = Turn { db: db.clone(), claim: Claim { run, epoch } };
            let proxies = join_all((0..30).map(|_| armed.proxy())).await;
            let asked = proxies.iter().enumerate().map(|(n, proxy)| {
                let want = if n % 2 == 0 { Outcome::Commit } else { Outcome::Abort };
                let sql = store::decide(&turn, want);
                async move { outcome(&proxy.simple_query(&sql).await.unwrap()) }
            });
            let answers = join_all(asked).await;
            assert!(answers.iter().all(|answer| *answer == answers[0]), "{major}, {level}: {answers:?}");
            assert_eq!(armed.decide(&turn, Outcome::Abort).await, answers[0]);
            let last = armed.control.view(&db, LIMIT).await.unwrap().last.unwrap();
            assert_eq!((last.epoch, last.outcome), (turn.claim.epoch, answers[0]));
        }
    }
}

/// A snapshot that is older than the other side's row would decide a second time; a commit in memory is none.
#[tokio::test]
async fn deciding_outside_read_committed_or_read_only_is_an_error_and_a_decision_is_synchronous() {
    for major in MAJORS {
        let armed = Armed::start(major).await;
        let turn = armed.open().await;
        let proxy = armed.proxy().await;
        let call = format!("SELECT pgcutover.decide('app', {}, '{}', 'abort')", turn.claim.epoch, turn.claim.run);
        for level in ["REPEATABLE READ", "SERIALIZABLE"] {
            let sql = format!("BEGIN ISOLATION LEVEL {level}; {call}; COMMIT");
            assert_eq!(sqlstate(&proxy, &sql).await.as_deref(), Some(store::SQLSTATE_ISOLATION));
            proxy.run("ROLLBACK").await.unwrap();
        }
        assert_eq!(sqlstate(&proxy, &format!("BEGIN READ ONLY; {call}; COMMIT")).await.as_deref(), Some("25006"));
        proxy.run("ROLLBACK").await.unwrap();
        assert_eq!(armed.control.view(&armed.db, LIMIT).await.unwrap().last, None);
        proxy.run(&format!("SET synchronous_commit = off; {}; {call}", store::BEGIN)).await.unwrap();
        assert_eq!(proxy.text("SHOW synchronous_commit").await.unwrap().as_deref(), Some("on"), "{major}");
        proxy.run(&format!("ROLLBACK; SET synchronous_commit = remote_apply; {}; {call}", store::BEGIN)).await.unwrap();
        assert_eq!(proxy.text("SHOW synchronous_commit").await.unwrap().as_deref(), Some("remote_apply"));
    }
}

#[tokio::test]
async fn late_flips_foreign_runs_and_second_opens_are_refused() {
    for major in MAJORS {
        let armed = Armed::start(major).await;
        let first = armed.open().await;
        let green = Name::new("green").unwrap();
        let again = armed.control.open(&armed.db, RunId::random(), &green, Epoch::ZERO).await.unwrap_err();
        assert_eq!(again.sqlstate(), Some(store::SQLSTATE_UNDECIDED));
        let foreign = Turn { claim: Claim { run: RunId::random(), ..first.claim }, ..first.clone() };
        let unknown = Turn { claim: Claim { epoch: Epoch::try_from(99_u64).unwrap(), ..first.claim }, ..first.clone() };
        for other in [&foreign, &unknown] {
            let wrong = Some(store::SQLSTATE_WRONG_EPOCH);
            let refused = armed.control.decide(other, Outcome::Commit, LIMIT).await.unwrap_err();
            assert!(matches!(&refused, DecideError::Refused(error) if error.sqlstate() == wrong), "{refused}");
            assert_eq!(armed.control.flip(other, LIMIT).await.unwrap_err().sqlstate(), wrong);
            assert_eq!(armed.control.unfence(other, LIMIT).await.unwrap_err().sqlstate(), wrong);
        }
        let open = armed.control.unfence(&first, LIMIT).await.unwrap_err();
        assert_eq!(open.sqlstate(), Some(store::SQLSTATE_WRONG_EPOCH), "not aborted yet");
        assert_eq!(armed.decide(&first, Outcome::Abort).await, Outcome::Abort);
        assert_eq!(armed.decide(&first, Outcome::Commit).await, Outcome::Abort, "the first answer stands");
        let late = armed.control.flip(&first, LIMIT).await.unwrap_err();
        assert_eq!(late.sqlstate(), Some(store::SQLSTATE_WRONG_EPOCH));
        // The next epoch's fence is not opened by the message of the last.
        let second = armed.fence().await;
        let late = armed.control.unfence(&first, LIMIT).await.unwrap_err();
        assert_eq!(late.sqlstate(), Some(store::SQLSTATE_WRONG_EPOCH));
        assert_eq!(armed.control.gates(LIMIT).await.unwrap()[0].epoch, second.claim.epoch);
        assert_eq!(armed.decide(&second, Outcome::Commit).await, Outcome::Commit);
        let late = armed.control.unfence(&second, LIMIT).await.unwrap_err();
        assert_eq!(late.sqlstate(), Some(store::SQLSTATE_WRONG_EPOCH), "a committed fence stays");
        // Found by the model: an aborted epoch of a second run would have opened the fence of a server that had lost.
        let lost = armed.control.open(&armed.db, RunId::random(), &green, Epoch::ZERO).await.unwrap_err();
        assert_eq!(lost.sqlstate(), Some(store::SQLSTATE_WRONG_EPOCH));
        let epoch = Epoch::try_from(7_u64).unwrap();
        let back = Turn { claim: Claim { run: RunId::random(), epoch }, ..first.clone() };
        armed.control.witness(&back, &Name::new("blue").unwrap(), LIMIT).await.unwrap();
        assert_eq!(armed.open().await.claim.epoch.as_u64(), 8, "it came back");
    }
}

#[tokio::test]
async fn epochs_grow_above_everything_known_and_evidence_decides_too() {
    for major in MAJORS {
        let armed = Armed::start(major).await;
        let (green, superuser) = (Name::new("green").unwrap(), armed.superuser().await);
        let floor = Epoch::try_from(41_u64).unwrap();
        let run = RunId::random();
        let epoch = armed.control.open(&armed.db, run, &green, floor).await.unwrap();
        assert_eq!(epoch.as_u64(), 42);
        let view = armed.control.view(&armed.db, LIMIT).await.unwrap();
        assert_eq!(view.open.unwrap().run, run);
        // As on a promoted standby: the open epoch was cloned, its outcome came as evidence.
        let turn = Turn { db: armed.db.clone(), claim: Claim { run, epoch } };
        armed.control.witness(&turn, &green, LIMIT).await.unwrap();
        armed.control.witness(&turn, &green, LIMIT).await.unwrap();
        let foreign = Turn { claim: Claim { run: RunId::random(), epoch }, ..turn.clone() };
        let refused = armed.control.witness(&foreign, &green, LIMIT).await.unwrap_err();
        assert_eq!(refused.sqlstate(), Some(store::SQLSTATE_WRONG_EPOCH));
        assert_eq!(armed.decide(&turn, Outcome::Abort).await, Outcome::Commit, "what was decided elsewhere stands");
        let view = armed.control.view(&armed.db, LIMIT).await.unwrap();
        assert_eq!((view.open, view.last_commit.unwrap().epoch), (None, epoch));
        let decided = superuser.number("SELECT count(*) FROM pgcutover.decision").await.unwrap();
        assert_eq!(decided, 0, "and is not written a second time");
        let next = armed.open().await;
        assert_eq!(next.claim.epoch.as_u64(), 43);
        armed.decide(&next, Outcome::Abort).await;
        let view = armed.control.view(&armed.db, LIMIT).await.unwrap();
        assert_eq!(view.last.unwrap().outcome, Outcome::Abort);
        assert_eq!(view.last_commit.unwrap().epoch, epoch, "the commit behind an abort is still seen");
        assert_eq!(armed.control.view(&Name::new("o'ther \\").unwrap(), LIMIT).await.unwrap(), StoreView::default());
    }
}

#[tokio::test]
async fn the_proxies_login_decides_and_enrolls_and_does_nothing_else() {
    for major in MAJORS {
        let armed = Armed::start(major).await;
        let turn = armed.fence().await;
        let (proxy, app) = (armed.proxy().await, armed.app().await);
        let Claim { run, epoch } = turn.claim;
        for sql in [
            format!("SELECT pgcutover.open('app', '{run}', 'green', 0)"),
            format!("SELECT pgcutover.flip('app', {epoch}, '{run}')"),
            format!("SELECT pgcutover.unfence('app', {epoch}, '{run}')"),
            "SELECT pgcutover.put_gate('app', 'open', 0)".to_owned(),
            format!("INSERT INTO pgcutover.decision VALUES ('app', {epoch}, '{run}', 'abort', 'green', now())"),
            "DELETE FROM pgcutover.state".to_owned(),
            "DELETE FROM pgcutover.member".to_owned(),
        ] {
            assert_eq!(sqlstate(&proxy, &sql).await.as_deref(), Some("42501"), "{major}: {sql}");
            assert_eq!(sqlstate(&app, &sql).await.as_deref(), Some("42501"), "{major}: {sql}");
        }
        assert_eq!(sqlstate(&app, &store::view(&armed.db)).await.as_deref(), Some("42501"));
        assert_eq!(sqlstate(&app, &store::decide(&turn, Outcome::Abort)).await.as_deref(), Some("42501"));
        app.run("ROLLBACK").await.unwrap();
        assert_eq!(app.text("SELECT pgcutover.aborted('app', 1)").await.unwrap().as_deref(), Some("f"));
        let mut member = Member {
            instance: "p'1".to_owned(),
            address: "127.0.0.1:6432".to_owned(),
            backend: "blue".to_owned(),
            route_epoch: Epoch::ZERO,
            paused_epoch: None,
            seen_ms_ago: 0,
        };
        proxy.run(&store::enroll(&armed.db, &member)).await.unwrap();
        member.paused_epoch = Some(epoch);
        proxy.run(&store::enroll(&armed.db, &member)).await.unwrap();
        let mut members = armed.control.members(&armed.db, LIMIT).await.unwrap();
        assert!(members[0].seen_ms_ago < 60_000);
        members[0].seen_ms_ago = 0;
        assert_eq!(members, [member]);
        assert_eq!(sqlstate(&proxy, &store::view(&armed.db)).await, None);
        assert_eq!(sqlstate(&proxy, &store::decide(&turn, Outcome::Commit)).await, None);
    }
}

#[tokio::test]
async fn gates_take_their_forms_and_one_that_holds_is_never_taken_away() {
    for major in MAJORS {
        let armed = Armed::start(major).await;
        let form = async || armed.control.gates(LIMIT).await.unwrap()[0].form.unwrap();
        let green = Name::new("green").unwrap();
        assert_eq!(form().await, GateForm::Open);
        let first = armed.fence().await;
        armed.control.arm(&armed.db, LIMIT).await.unwrap();
        armed.control.install(LIMIT).await.unwrap();
        assert_eq!(form().await, GateForm::Fenced, "neither arming nor installing again opens it");
        let holds = armed.control.disarm(&armed.db, LIMIT).await.unwrap_err();
        assert_eq!(holds.sqlstate(), Some("55000"), "open epoch");
        armed.decide(&first, Outcome::Commit).await;
        let holds = armed.control.disarm(&armed.db, LIMIT).await.unwrap_err();
        assert_eq!(holds.sqlstate(), Some("55000"), "committed");
        // Back: this server is the target of the next epoch, which another one decides.
        let back = |epoch: u64| Turn {
            db: armed.db.clone(),
            claim: Claim { run: RunId::random(), epoch: Epoch::try_from(epoch).unwrap() },
        };
        assert_eq!(armed.control.guard(&first, LIMIT).await.unwrap_err().sqlstate(), Some("55000"), "older message");
        let second = back(2);
        assert!(armed.control.guard(&second, LIMIT).await.unwrap());
        assert_eq!(form().await, GateForm::Target);
        let app = armed.app().await;
        let insert = "INSERT INTO ledger (client, n, aid, delta) VALUES (1, 1, 1, 1)";
        assert_eq!(sqlstate(&app, insert).await.as_deref(), Some(store::SQLSTATE_FENCED));
        let early = armed.control.settle(&second, LIMIT).await.unwrap_err();
        assert_eq!(early.sqlstate(), Some("55000"), "no evidence yet");
        assert_eq!(armed.control.disarm(&armed.db, LIMIT).await.unwrap_err().sqlstate(), Some("55000"));
        armed.control.witness(&second, &green, LIMIT).await.unwrap();
        assert_eq!(sqlstate(&app, insert).await, None, "open by evidence");
        armed.control.settle(&second, LIMIT).await.unwrap();
        assert_eq!(form().await, GateForm::Open);
        assert_eq!(armed.control.disarm(&armed.db, LIMIT).await.unwrap(), []);
        assert_eq!(armed.control.gates(LIMIT).await.unwrap(), []);
        assert!(!armed.control.guard(&back(3), LIMIT).await.unwrap(), "no gate, nothing to guard");
        assert_eq!(sqlstate(&app, insert).await, None);
    }
}

/// FOR ALL TABLES publishes the store as well: its rows must not decide anything on the other side, the seeds of both
/// sides must not collide, and the sentinel must arrive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn decisions_do_not_travel_and_sentinels_do() {
    for (from, to, publication) in
        [(13, 17, Publication::AllTables), (13, 17, Publication::Tables), (15, 17, Publication::AllTables)]
    {
        let binaries = Binaries::of(&[from, to]).unwrap();
        let pair = Pair::start(&binaries, &PairOptions { publication, ..PairOptions::new(from, to) }).await.unwrap();
        let clusters = Clusters {
            source: as_proxyctl(Role::Source, &pair.source),
            target: as_proxyctl(Role::Target, &pair.target),
        };
        let db = Name::new(DATABASE).unwrap();
        for cluster in [&clusters.target, &clusters.source] {
            cluster.install(LIMIT).await.unwrap();
            cluster.seed(&db, LIMIT).await.unwrap();
        }
        let subscriptions = clusters.target.subscriptions(&Name::new(DATABASE).unwrap(), &[], LIMIT).await.unwrap();
        assert_eq!(subscriptions[0].name, SUBSCRIPTION);
        clusters.publish_store(&subscriptions, LIMIT).await.unwrap();
        clusters.publish_store(&subscriptions, LIMIT).await.unwrap();
        let run = RunId::random();
        let epoch = clusters.source.open(&db, run, &Name::new("green").unwrap(), Epoch::ZERO).await.unwrap();
        let turn = Turn { db: db.clone(), claim: Claim { run, epoch } };
        clusters.source.decide(&turn, Outcome::Abort, LIMIT).await.unwrap();
        clusters.source.beat(&db, 7, LIMIT).await.unwrap();
        clusters.catch_up(&db, "to'ken", &Feed::Subscriptions(subscriptions), LIMIT).await.unwrap();
        assert_eq!(clusters.target.heard(&db, LIMIT).await.unwrap(), Some(7));
        assert_eq!(clusters.target.view(&db, LIMIT).await.unwrap(), StoreView::default(), "{publication:?}");
        let refused = clusters.target.decide(&turn, Outcome::Commit, LIMIT).await.unwrap_err();
        assert!(matches!(refused, DecideError::Refused(_)), "{refused}");
        let app = pair.source.connect(APP, &password(APP), DATABASE).await.unwrap();
        app.run("INSERT INTO ledger (client, n, aid, delta) VALUES (1, 1, 1, 5)").await.unwrap();
        pair.in_step().await.unwrap();
    }
}
