//! Dataset shards that are damaged, and a cache that is too small.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::job::Job;
use lockstep_tests::place::{Place, flip_byte};
use std::fs;
use std::path::{Path, PathBuf};

fn job() -> Job {
    Job { steps: 10, ..Job::default() }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    entries.map(|e| e.expect("an entry").path()).collect()
}

#[test]
fn a_flipped_byte_in_a_workers_cache_is_refused_fetched_again_and_counted() {
    let mut cluster = Cluster::start(Place::new());
    let token = cluster.token();
    let command = cluster.join_command(&token);
    let worker = cluster.join(command);
    let id = cluster.submit(job());
    let expected = cluster.until_finished(&id).digest();
    worker.signal(libc::SIGTERM);
    worker.wait().ok();

    let (before, after) = (cluster.place.file("worker-1"), cluster.place.file("worker-2"));
    files(&before.join("slot-1/shards")).iter().for_each(|shard| flip_byte(shard));
    let command = cluster.join_command(&token);
    fs::rename(before, after).expect("the next worker takes over the folder");
    let _worker = cluster.join(command);
    let id = cluster.submit(job());
    assert_eq!(cluster.until_finished(&id).digest(), expected);
    let metrics = &cluster.scrape_workers()[0];
    assert_eq!(metrics.value("lockstep_shard_hash_failures_total", ""), 2.0);
    assert_eq!(metrics.value("lockstep_shard_fetches_total", ""), 2.0);
}

#[test]
fn a_flipped_byte_in_the_coordinators_store_ends_the_job_with_a_clear_error_and_can_be_repaired() {
    let mut cluster = Cluster::start(Place::new());
    let shards = cluster.place.dir().join("datasets/shards");
    files(&shards).iter().for_each(|shard| flip_byte(shard));
    let _worker = cluster.worker();
    let id = cluster.submit(job());
    let failed = cluster.until_status(&id, "failed", |status| status.state == "failed");
    for part in ["shard", "flipped", "coordinator dataset verify tiny"] {
        assert!(failed.reason.contains(part), "{part:?} is not in {:?}", failed.reason);
    }
    assert!(cluster.scrape().value("lockstep_shard_hash_failures_total", "") > 0.0);
    cluster.place.coordinator(["dataset", "verify"]).refused(1, &["flipped", "hint: add the dataset again"]);

    let source = cluster.place.file("source");
    cluster.place.add_dataset("tiny", &source);
    cluster.place.coordinator(["dataset", "verify"]).ok();
    let id = cluster.submit(job());
    cluster.until_finished(&id);
}

#[test]
fn a_cache_smaller_than_the_dataset_stays_within_its_bound_and_changes_no_bit() {
    // Two shards of training data: one holds at most 4 MiB.
    let place = || Place::with_tiny(24_000, 100, 16);
    let expected = place().run(job(), 1).digest();
    let mut cluster = Cluster::start(place());
    let sizes =
        |folder: &Path| files(folder).iter().map(|f| f.metadata().expect("a file").len()).collect::<Vec<_>>();
    let total: u64 = sizes(&cluster.place.dir().join("datasets/shards")).iter().sum();
    for bound in [1000, 4_500_000] {
        assert!(bound < total, "the dataset has {total} bytes");
        let token = cluster.token();
        let mut command = cluster.join_command(&token);
        command.args(["--cache-bytes", &bound.to_string()]);
        let worker = cluster.join(command);
        let id = cluster.submit(job());
        assert_eq!(cluster.until_finished(&id).digest(), expected);
        worker.signal(libc::SIGTERM);
        worker.wait().ok();
    }
    for (worker, bound) in [("worker-1", 1000), ("worker-2", 4_500_000)] {
        let cached = sizes(&cluster.place.file(worker).join("slot-1/shards"));
        assert!(cached.iter().sum::<u64>() <= bound, "{worker} keeps {cached:?} of at most {bound} bytes");
    }
}

#[test]
fn a_damaged_store_ends_a_local_run_with_one_line_that_says_what_to_do() {
    let place = Place::new();
    files(&place.dir().join("datasets/shards")).iter().for_each(|shard| flip_byte(shard));
    place.start_run(job(), 1).wait().refused(1, &["error: j1 failed", "coordinator dataset verify tiny"]);
}
