//! Dataset shards over the wire.

use crate::cluster::Cluster;
use lockstep_common::dataset::Manifest;
use lockstep_common::wire::{Request, Response};

const NAME: &str = "tiny/train";

async fn manifest(worker: &crate::cluster::Worker) -> Manifest {
    match worker.ask(&Request::Manifest { dataset: NAME.to_owned() }).await.unwrap() {
        Response::Manifest { json } => Manifest::from_json(json.as_bytes()).unwrap(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_good_shard_arrives_and_a_flipped_one_is_refused_by_name() {
    let cluster = Cluster::start().await;
    let worker = cluster.worker().await;
    let hash = manifest(&worker).await.shards[0].hash.clone();
    let request = Request::Shard { dataset: NAME.to_owned(), hash: hash.clone() };
    let files = worker.fetch(&request).await.unwrap();
    assert_eq!(blake3::hash(&files[0].1).to_hex().as_str(), hash);

    let path = cluster.dir.datasets().join("shards").join(&hash);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = worker.fetch(&request).await.unwrap_err().to_string();
    assert!(error.contains(&hash) && error.contains("flipped bytes") && error.contains(NAME), "{error}");
    cluster.wait_for_metric("lockstep_shard_hash_failures_total 1").await;
}

#[tokio::test]
async fn what_is_not_a_shard_is_not_served() {
    let cluster = Cluster::start().await;
    let worker = cluster.worker().await;
    std::fs::write(cluster.dir.datasets().join("secret"), b"secret").unwrap();
    for hash in ["../secret", "", "/etc/passwd", &"0".repeat(64), &"G".repeat(64)] {
        let request = Request::Shard { dataset: NAME.to_owned(), hash: hash.to_owned() };
        assert!(worker.fetch(&request).await.is_err(), "{hash:?}");
    }
    let error =
        worker.ask(&Request::Manifest { dataset: "tiny/trian".to_owned() }).await.unwrap_err().to_string();
    assert!(error.contains("did you mean `tiny/train`?"), "{error}");
}
