//! RESET in session pooling gives what the client's Startup asked for, as on a server of its own.
//!
//! Invariant: what is right is what the same statements give on the server itself, by the same login.

use e2e::client::Client;
use e2e::pair::{APP, DATABASE, password};
use tokio_postgres::Config;

use crate::house::House;

/// Settings that are reported and that are not, of a kind that a driver asks for, and one of the application's own.
const STARTUP: &str = "-c TimeZone=Asia/Tokyo -c DateStyle=German -c work_mem=5MB -c search_path=mine -c my.tenant=t1";

const SHOWN: &str = "SELECT concat_ws('|', current_setting('TimeZone'), current_setting('DateStyle'), \
    current_setting('work_mem'), current_setting('search_path'), current_setting('application_name'), \
    current_setting('statement_timeout'), current_setting('my.tenant', true), current_setting('my.other', true))";

/// Each leaves settings behind that the next one finds.
const TALK: [&str; 14] = [
    "SET TimeZone = 'UTC'; SET work_mem = '9MB'; SET my.tenant = 't2'; SET statement_timeout = '7s'",
    "RESET ALL",
    "SET my.tenant = ''; SET work_mem = '9MB'; SET TimeZone = 'UTC'",
    "RESET TimeZone",
    "SET TimeZone = 'UTC'; SET DateStyle = 'SQL'; SET search_path = other; SET my.other = 'x'",
    "BEGIN; RESET DateStyle; ROLLBACK",
    "SET search_path TO DEFAULT",
    "SET LOCAL work_mem TO DEFAULT",
    "SET TIME ZONE LOCAL; SET application_name = 'other'",
    "SET work_mem = '1MB'; RESET statement_timeout; RESET application_name",
    "BEGIN; SET TimeZone = 'UTC'; RESET work_mem; COMMIT",
    "SET my.tenant = 't3'",
    "DISCARD ALL",
    "SELECT 1",
];

/// What holds after each of them.
async fn talk(client: &Client) -> Vec<String> {
    let mut said = vec![client.text(SHOWN).await.unwrap().unwrap()];
    for text in TALK {
        client.simple_query(text).await.unwrap();
        said.push(format!("{text}: {}", client.text(SHOWN).await.unwrap().unwrap()));
    }
    said
}

/// What holds after statements that were prepared long before.
async fn prepared(client: &Client) -> Vec<String> {
    let (set, reset) =
        (client.prepare("SET TimeZone = 'UTC'").await.unwrap(), client.prepare("RESET ALL").await.unwrap());
    let mut said = Vec::new();
    for _ in 0..2 {
        client.run("SET my.tenant = 't2'").await.unwrap();
        client.execute(&set, &[]).await.unwrap();
        client.execute(&reset, &[]).await.unwrap();
        // The server connection may have had a setting of that name before: then it is empty, not unknown.
        said.push(client.text(SHOWN).await.unwrap().unwrap().trim_end_matches('|').to_owned());
    }
    said
}

fn login(port: u16) -> Config {
    let mut config = Config::new();
    config.host("127.0.0.1").port(port).user(APP).password(password(APP)).dbname(DATABASE);
    config.application_name("shop").options(STARTUP);
    config
}

#[tokio::test]
async fn a_reset_gives_what_the_startup_asked_for_as_on_a_server_of_its_own() {
    let house = House::open(|options| {
        options.setting("pool_mode", "session");
        options.setting("default_pool_size", 1);
    })
    .await;
    let connect = async |port| Client::connect(&login(port)).await.unwrap();
    let direct = talk(&connect(house.server.port()).await).await;
    assert!(direct[0].starts_with("Asia/Tokyo|German, DMY|5MB|mine|shop"), "{direct:?}");
    assert_eq!(talk(&connect(house.proxy.port()).await).await, direct);
    let direct = prepared(&connect(house.server.port()).await).await;
    assert_eq!(prepared(&connect(house.proxy.port()).await).await, direct);
    // The server connection's next client has nothing of it.
    let mut config = login(house.proxy.port());
    config.options("-c my.other=mine");
    let next = Client::connect(&config).await.unwrap();
    next.run("RESET ALL").await.unwrap();
    let shown = next.text(SHOWN).await.unwrap().unwrap();
    assert!(!shown.contains("Tokyo") && shown.ends_with("shop|0||mine"), "{shown}");
}
