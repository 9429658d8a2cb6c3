//! Checks of who is connected and who may be: transactions, logins, proxies.
//!
//! Invariant: pure; a verifier that can't be compared is red unless a login through every proxy has proved it.

use std::time::Duration;

use pgcutover_api::store::Member;

use crate::clusters::pin::VERIFIER;
use crate::config::members::Unlisted;
use crate::finding::Finding;
use crate::preflight::checks::{Make, or_green, red_if, sides};
use crate::preflight::facts::{ClusterFacts, Control, Facts, LoginRole, ProxyFacts, Session, Verdict, Verifiers};
use crate::roster::GONE;

pub(super) fn old_transactions(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "old_transactions";
    let limit = i64::try_from(facts.limits.transaction_age_max.as_millis()).unwrap_or(i64::MAX);
    let old = |cluster: &ClusterFacts| -> Vec<Session> {
        // A comparison of whole tables holds no row, and takes no number that a slot would wait for.
        let is_ours = |s: &Session| s.application.as_deref() == Some(VERIFIER);
        let counts = |s: &&Session| {
            s.backend_type.as_deref() != Some("walsender") && !is_ours(s) && s.transaction_age_ms > Some(limit)
        };
        cluster.sessions.iter().filter(counts).cloned().collect()
    };
    let mut found = Vec::new();
    for session in old(&facts.source) {
        let fix = format!("Wait for it, or SELECT pg_terminate_backend({}); on the source.", session.pid);
        found.push(Finding::red(CHECK, format!("source {}", who(&session)), age(&session), fix));
    }
    for session in old(&facts.target) {
        let object = format!("target {}", who(&session));
        let fix = format!("Wait for it, or SELECT pg_terminate_backend({}); on the target.", session.pid);
        // Creating a slot waits for every running transaction; nothing else on the target does.
        let level = red_if(facts.limits.way_back);
        found.push(level(CHECK, object, age(&session), fix));
    }
    or_green(CHECK, facts.db.as_str(), &format!("none older than {limit} ms"), found)
}

fn age(session: &Session) -> String {
    format!("its transaction is {} ms old", session.transaction_age_ms.unwrap_or_default())
}

fn who(session: &Session) -> String {
    let application = session.application.as_deref().filter(|name| !name.is_empty());
    let address = session.address.as_deref().unwrap_or("local socket");
    match application {
        Some(application) => format!("pid {} ({}, {application}, {address})", session.pid, session.user),
        None => format!("pid {} ({}, {address})", session.pid, session.user),
    }
}

pub(super) fn prepared_transactions(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "prepared_transactions";
    let mut found = Vec::new();
    for (side, cluster) in [("source", &facts.source), ("target", &facts.target)] {
        for prepared in &cluster.prepared {
            let object = format!("{side} transaction '{}'", prepared.gid);
            let problem =
                format!("was prepared by {} {} ms ago; it passes every fence", prepared.owner, prepared.age_ms);
            let fix = format!("COMMIT PREPARED or ROLLBACK PREPARED '{}'; on the {side}.", prepared.gid);
            found.push(Finding::red(CHECK, object, problem, fix));
        }
    }
    or_green(CHECK, facts.db.as_str(), "none", found)
}

/// The grant to it is S0's; here it is known before anything is created.
pub(super) fn proxy_role(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "proxy_role";
    let role = &facts.limits.proxy_role;
    let lacks = |cluster: &ClusterFacts| !cluster.logins.iter().any(|login| login.name == *role);
    let sides = sides(facts).into_iter().filter(|(_, cluster)| lacks(cluster));
    let finding = |side: &str| {
        let fix =
            format!("CREATE ROLE \"{role}\" LOGIN on the {side}, or name the proxies' login in policy.proxy_role.");
        Finding::red(CHECK, format!("{side} role {role}"), "may not log in: proxies could read no decision", fix)
    };
    or_green(CHECK, role, "may log in to both", sides.map(|(side, _)| finding(side)).collect())
}

pub(super) fn verifiers(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "verifiers";
    // The proxies log in themselves as the last one, with a password of their own configuration.
    let own = [&facts.source.login, &facts.target.login, &facts.limits.proxy_role];
    let users = facts.source.logins.iter().filter(|role| !own.contains(&&role.name));
    let found: Vec<Finding> = users.filter_map(|role| verifier_of(facts, role, CHECK)).collect();
    or_green(CHECK, "target", "every login of the source works on the target", found)
}

fn verifier_of(facts: &Facts, role: &LoginRole, check: &str) -> Option<Finding> {
    let object = format!("role {}", role.name);
    let verdicts: Vec<&Verdict> =
        facts.proxies.iter().flat_map(|p| &p.logins).filter(|l| l.user == role.name).map(|l| &l.verdict).collect();
    let refused = verdicts.iter().find_map(|verdict| match verdict {
        Verdict::Refused(words) => Some(words),
        Verdict::In | Verdict::Unknown => None,
    });
    if let Some(words) = refused {
        let fix = "Give it on the target the password verifier, rights and CONNECT that it has on the source.";
        return Some(Finding::red(
            check,
            object,
            format!("the target refused its login through a proxy: {words}"),
            fix,
        ));
    }
    let Some(there) = facts.target.logins.iter().find(|other| other.name == role.name) else {
        let fix = format!(
            "CREATE ROLE \"{}\" LOGIN on the target, with the verifier of the source, and GRANT CONNECT.",
            role.name
        );
        return Some(worst_for(role, seen(&verdicts))(check, object, "may not log in to the target".to_owned(), fix));
    };
    if seen(&verdicts) {
        return None;
    }
    if facts.source.verifiers == Verifiers::Hidden || facts.target.verifiers == Verifiers::Hidden {
        let fix = "GRANT SELECT (rolname, rolpassword) ON pg_authid to our login on both sides, or prove a login of this user \
                   through every proxy (PREPARE SWITCH).";
        let problem = "its password verifiers may not be compared".to_owned();
        return Some(worst_for(role, false)(check, object, problem, fix.to_owned()));
    }
    if role.verifier == there.verifier {
        return None;
    }
    let fix =
        format!("ALTER ROLE \"{}\" PASSWORD '...' on the target, with rolpassword of the source verbatim.", role.name);
    let problem = "its password verifier differs: logins through the proxy would be refused";
    Some(worst_for(role, false)(check, object, problem.to_owned(), fix))
}

/// Whether it was let in, by every proxy that tried.
fn seen(verdicts: &[&Verdict]) -> bool {
    !verdicts.is_empty() && verdicts.iter().all(|verdict| **verdict == Verdict::In)
}

/// A role that applications do not use is worth a word; any other stops the cutover.
fn worst_for(role: &LoginRole, is_used: bool) -> Make {
    red_if(is_used || !role.is_administrative)
}

pub(super) fn bypass(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "bypass";
    let through = facts.proxies.iter().flat_map(|proxy| proxy.server_pids.iter().copied());
    let through: Vec<i32> =
        through.chain(facts.bouncers.iter().flat_map(|bouncer| bouncer.server_pids.iter().copied())).collect();
    let stranger = |session: &&Session| {
        session.backend_type.as_deref() == Some("client backend")
            && !through.contains(&session.pid)
            && !matches!(session.application.as_deref(), Some("proxyctl" | VERIFIER))
            && session.user != facts.limits.proxy_role
    };
    let found = facts.source.sessions.iter().filter(stranger).map(|session| {
        let problem = "is connected past the proxies: from the fence on its writes are refused";
        Finding::yellow(
            CHECK,
            format!("source {}", who(session)),
            problem,
            "Point it at a proxy, if it writes or must move.",
        )
    });
    or_green(CHECK, "source", "every client comes through a proxy", found.collect())
}

pub(super) fn proxies(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "proxies";
    let bare = facts.proxies.iter().filter(|proxy| proxy.control == Control::Missing);
    let found = bare.map(|proxy| {
        let problem = "has no control login for the database: it could not follow the decision if we died";
        let fix = format!("Set control_user and control_password of [databases.{}] there, and RELOAD.", facts.db);
        Finding::red(CHECK, format!("proxy {}", proxy.name), problem, fix)
    });
    or_green(CHECK, facts.db.as_str(), &format!("{} with control logins", facts.proxies.len()), found.collect())
}

/// Every member with where it came from. Whoever nobody listed can't be commanded: it holds and follows at its own looks.
pub(super) fn members(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "members";
    let mut found: Vec<Finding> = facts.proxies.iter().map(|proxy| known(facts, proxy, CHECK)).collect();
    let ours = |member: &&Member| {
        facts.proxies.iter().any(|proxy| proxy.instance.as_ref() == Some(&member.instance))
            || facts.bouncers.iter().any(|bouncer| bouncer.name == member.instance)
    };
    let living = facts.members.iter().filter(|member| Duration::from_millis(member.seen_ms_ago) < GONE);
    found.extend(living.filter(|member| !ours(member)).map(|member| stranger(facts, member, CHECK)));
    found
}

fn known(facts: &Facts, proxy: &ProxyFacts, check: &str) -> Finding {
    let object = format!("proxy {}", proxy.name);
    let instance = proxy.instance.as_deref().unwrap_or_default();
    let namesakes = facts.proxies.iter().filter(|other| other.instance == proxy.instance).count();
    if namesakes > 1 && !instance.is_empty() {
        let problem = format!("calls itself '{instance}', as {} others do: in the store they are one", namesakes - 1);
        let fix = "Give each proxy an instance of its own (or none: it makes one up), or name it once only.";
        return Finding::red(check, object, problem, fix);
    }
    Finding::green(check, object, format!("{}, instance {instance}", proxy.origin))
}

fn stranger(facts: &Facts, member: &Member, check: &str) -> Finding {
    let object = format!("proxy instance {}", member.instance);
    let where_ = format!("serves {} at {} ({})", facts.db, member.address, member.backend);
    match facts.limits.unlisted {
        Unlisted::Refuse => {
            let problem = format!("{where_} and is not in our configuration");
            let fix = "Add it as [[proxies]], or stop it; or let such proxies follow: policy.unlisted = \"follow\".";
            Finding::red(check, object, problem, fix)
        }
        Unlisted::Follow => {
            let problem = format!("{where_}, enrolled by itself: it holds and follows up to a second after the others");
            Finding::yellow(check, object, problem, "Add it as [[proxies]] for a shorter stall.")
        }
    }
}
