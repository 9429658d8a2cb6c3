//! Types that clients know by number, on real servers, asked as the least role: what is missing, shaped otherwise or
//! numbered otherwise is named, and a number that means two types is refused whatever was accepted.

use e2e::client::Client;
use e2e::pair::PairOptions;
use proxyctl::config::Change;
use proxyctl::finding::{Finding, Level};
use proxyctl::preflight::{Inquiry, checks, gather};

use crate::preflight::{Bench, inquiry};

/// One of each kind; the function makes the row type of `branches` one that clients may meet as a type.
const TYPES: &str = "CREATE EXTENSION hstore;
    CREATE TYPE mood AS ENUM ('ok', 'so, so', 'it''s {bad}');
    CREATE TYPE addr AS (street varchar(40), \"house no\" numeric(10,2), feeling mood, more mood[]);
    CREATE DOMAIN positive AS numeric(8,2) CHECK (VALUE > 0);
    CREATE DOMAIN moods AS mood[];
    CREATE TYPE span AS RANGE (subtype = time);
    CREATE VIEW feelings AS SELECT 'ok'::mood AS feeling;
    CREATE FUNCTION cheer(more moods) RETURNS positive LANGUAGE sql AS 'SELECT 1::positive';
    CREATE FUNCTION best() RETURNS SETOF branches LANGUAGE sql AS 'SELECT * FROM branches'";
const NO_TYPES: &str = "DROP FUNCTION best(), cheer(moods); DROP VIEW feelings; DROP TYPE addr, span; DROP DOMAIN positive, moods; DROP TYPE mood; DROP EXTENSION hstore";

/// What preflight says of types, but for what it found right.
async fn said(bench: &Bench, oid_change: Change) -> Vec<Finding> {
    let mut inquiry: Inquiry = inquiry();
    inquiry.limits.oid_change = oid_change;
    let found = checks(&gather(&bench.clusters, &inquiry).await.unwrap());
    found.into_iter().filter(|f| f.check == "type_oids" && f.level != Level::Green).collect()
}

/// One red finding names this object, and its problem holds this.
#[track_caller]
fn names(found: &[Finding], object: &str, problem: &str) {
    let names = |f: &&Finding| f.level == Level::Red && f.object.contains(object) && f.problem.contains(problem);
    assert_eq!(found.iter().filter(names).count(), 1, "{object}: {problem}: {found:#?}");
}

/// Uses up the server's counter: the next type gets a number above `oid`. Large objects take one number each.
async fn burn(client: &Client, oid: i64) {
    let sql = format!(
        "DO $$ DECLARE used oid; BEGIN LOOP used := lo_create(0); PERFORM lo_unlink(used); EXIT WHEN used >= {oid}; END LOOP; END $$"
    );
    client.run(&sql).await.unwrap();
}

async fn last_oid(client: &Client) -> i64 {
    client.number("SELECT lo_unlink(o) - 1 + o::bigint FROM lo_create(0) o").await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn types_of_another_shape_or_number_are_named() {
    for (from, to) in [(13, 17), (17, 13)] {
        let bench = Bench::start(&PairOptions::new(from, to)).await;
        assert_eq!(said(&bench, Change::Refused).await, [], "tables alone have nothing to compare");
        // Far enough apart for no number to mean two things.
        burn(&bench.target, last_oid(&bench.source).await + 1000).await;
        bench.source.run(TYPES).await.unwrap();
        names(&said(&bench, Change::Accepted).await, "public.mood", "is missing on the target");
        bench.target.run(TYPES).await.unwrap();

        let refused = said(&bench, Change::Refused).await;
        names(&refused, "type public.addr, public.branches", "OutdatedSchemaCacheError");
        names(&refused, "type public.mood", "psycopg 3");
        // What a statement is told of a domain over an array of moods is an array of moods.
        names(
            &refused,
            "type public.mood",
            "those with column public.feelings.feeling, function public.cheer; drivers",
        );
        names(&refused, "type public.addr, public.branches", "those with function public.best; drivers");
        names(&refused, "public.hstore,", "those with function public.cheer; drivers");
        names(&refused, "public.hstore, public.moods, public.positive, public.span", "by hand");
        let text = format!("{refused:?}");
        assert!(!text.contains("accounts") && !text.contains("is missing on the target\""), "{text}");
        let accepted = said(&bench, Change::Accepted).await;
        assert!(accepted.iter().all(|f| f.level == Level::Yellow), "the same shapes on both: {accepted:#?}");
        // The range's multirange is on the newer side only: of no account there, of some where it is missed.
        assert_eq!(accepted.len(), if from < to { 3 } else { 4 }, "{accepted:#?}");

        for (change, back, object, problem) in [
            (
                "ALTER TYPE mood RENAME VALUE 'ok' TO 'fine'",
                "ALTER TYPE mood RENAME VALUE 'fine' TO 'ok'",
                "mood",
                "{fine,",
            ),
            (
                "ALTER TYPE addr ALTER ATTRIBUTE \"house no\" TYPE numeric(10,3)",
                "ALTER TYPE addr ALTER ATTRIBUTE \"house no\" TYPE numeric(10,2)",
                "addr",
                "numeric(10,3)",
            ),
            (
                "DROP DOMAIN moods CASCADE; CREATE DOMAIN moods AS text[]",
                "DROP DOMAIN moods; CREATE DOMAIN moods AS mood[]",
                "moods",
                "domain over public.mood[] on the source and domain over text[] on the target",
            ),
        ] {
            bench.target.run(change).await.unwrap();
            names(&said(&bench, Change::Accepted).await, &format!("type public.{object}"), problem);
            bench.target.run(back).await.unwrap();
        }

        bench.target.run("REVOKE SELECT ON pg_enum FROM PUBLIC").await.unwrap();
        names(&said(&bench, Change::Accepted).await, "target role pgcutover", "pg_enum");
        bench.target.run("GRANT SELECT ON pg_enum TO PUBLIC").await.unwrap();
        bench.source.run(NO_TYPES).await.unwrap();
        assert_eq!(said(&bench, Change::Refused).await, [], "what is on the target only does not count");
    }
}

/// Both counters stand at the same number when another type is made on each side: the same number means both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_that_means_two_types_is_refused() {
    let bench = Bench::start(&PairOptions::new(13, 17)).await;
    let level = last_oid(&bench.source).await.max(last_oid(&bench.target).await) + 10;
    burn(&bench.source, level).await;
    burn(&bench.target, level).await;
    bench.source.run("CREATE TYPE mood AS ENUM (); CREATE TYPE grade AS ENUM ()").await.unwrap();
    bench.target.run("CREATE TYPE grade AS ENUM (); CREATE TYPE mood AS ENUM ()").await.unwrap();
    let oid = bench.source.number("SELECT 'mood'::regtype::oid").await.unwrap();
    assert_eq!(bench.target.number("SELECT 'grade'::regtype::oid").await.unwrap(), oid, "the seeding went wrong");
    for oid_change in [Change::Refused, Change::Accepted] {
        let found = said(&bench, oid_change).await;
        names(&found, "public.mood", &format!("{oid} is public.mood here and public.grade there"));
    }
    bench.target.run("DROP TYPE mood, grade; CREATE TYPE mood AS ENUM (); CREATE TYPE grade AS ENUM ()").await.unwrap();
    let found = said(&bench, Change::Accepted).await;
    assert!(found.iter().all(|f| f.level == Level::Yellow), "apart again: {found:#?}");
}
