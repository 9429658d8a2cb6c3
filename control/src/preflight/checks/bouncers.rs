//! Checks of PgBouncers that take part: where each points, how it pools, who keeps it.
//!
//! Invariant: pure; one that nobody keeps is red unless the configuration accepts that (PROTOCOL R15).

use crate::finding::Finding;
use crate::preflight::facts::{BouncerFacts, Facts, Watched};

const CHECK: &str = "pgbouncer";

pub(super) fn bouncers(facts: &Facts) -> Vec<Finding> {
    facts.bouncers.iter().flat_map(of_one).collect()
}

fn of_one(bouncer: &BouncerFacts) -> Vec<Finding> {
    let object = format!("PgBouncer {}", bouncer.name);
    let mut found = Vec::new();
    match &bouncer.points_at {
        Err(words) => {
            let fix = "Start it, or let its admin_users have our login; or take it out of [[pgbouncer]].";
            found.push(Finding::red(CHECK, &object, words.clone(), fix));
            return found;
        }
        Ok(address) if *address != bouncer.source => {
            let problem = format!("points at {address}, and the source is {}", bouncer.source);
            let fix =
                "Say in [[pgbouncer]] what its file calls the servers (source, target), or point it at the source.";
            found.push(Finding::red(CHECK, &object, problem, fix));
        }
        Ok(_) => {}
    }
    if bouncer.pool_mode == "session" {
        let problem = "pools by session: PAUSE waits until every client with a server connection has left";
        let fix = "Pool by transaction; a cutover with such clients connected ends with an abort.";
        found.push(Finding::yellow(CHECK, &object, problem, fix));
    }
    let keeper = format!("Run 'proxyctl watch-pgbouncer {}' beside it, after 'proxyctl objects'.", bouncer.name);
    match bouncer.watched {
        Watched::ByItsKeeper => {}
        Watched::ByThisRun => {
            let problem = "is kept by this run alone: if proxyctl dies, nobody lets its clients go";
            found.push(Finding::yellow(CHECK, &object, problem, keeper));
        }
        Watched::ByNobody => {
            let problem = "nobody keeps it: it could neither hold nor follow the decision";
            let fix = format!("{keeper} Or policy.accept_unleased = true.");
            found.push(Finding::red(CHECK, &object, problem, fix));
        }
    }
    if found.is_empty() {
        found.push(Finding::green(CHECK, &object, format!("on {}, kept", bouncer.source)));
    }
    found
}
