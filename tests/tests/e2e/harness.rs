//! The harness keeps its own promises.

use e2e::binaries::Binaries;
use e2e::cluster::{Cluster, ClusterOptions};
use e2e::pair::{APP, DATABASE, Pair, PairOptions, password};

#[tokio::test]
async fn a_cluster_starts_recovers_from_a_power_cut_and_keeps_its_port() {
    let mut cluster = Cluster::start(&Binaries::of(&[17]).unwrap(), &ClusterOptions::new(17)).await.unwrap();
    let port = cluster.port();
    cluster.superuser("postgres").await.unwrap().run("CREATE TABLE kept (n int)").await.unwrap();
    cluster.kill9().await.unwrap();
    cluster.restart().await.unwrap();
    let client = cluster.superuser("postgres").await.unwrap();
    assert_eq!(client.number("SELECT count(*) FROM kept").await.unwrap(), 0);
    assert_eq!(cluster.port(), port);
    let dir = cluster.dir().to_owned();
    drop(cluster);
    assert!(!dir.exists());
}

#[tokio::test]
async fn a_pair_replicates_as_the_least_role() {
    let pair = Pair::start(&Binaries::of(&[13, 17]).unwrap(), &PairOptions::new(13, 17)).await.unwrap();
    let app = pair.source.connect(APP, &password(APP), DATABASE).await.unwrap();
    app.run("INSERT INTO ledger (client, n, aid, delta) VALUES (1, 1, 1, 5)").await.unwrap();
    app.run("INSERT INTO history (client, n, aid, delta) SELECT n, 1, 1, 5 FROM generate_series(1, 9) n")
        .await
        .unwrap();
    pair.in_step().await.unwrap();
    let on_target = pair.target.connect(APP, &password(APP), DATABASE).await.unwrap();
    assert_eq!(on_target.number("SELECT count(*) FROM ledger").await.unwrap(), 1);
    assert_eq!(on_target.number("SELECT count(*) FROM history").await.unwrap(), 9);
    assert_eq!(on_target.number("SELECT count(*) FROM accounts").await.unwrap(), 1000);
    assert_eq!(on_target.number("SELECT port FROM ledger").await.unwrap(), i64::from(pair.source.port()));
}
