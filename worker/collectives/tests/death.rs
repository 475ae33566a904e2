//! Peers that are processes of their own, killed and stopped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use lockstep_collectives::quic::Peer;
use lockstep_collectives::{CollectiveError, Group, ReduceOp, Tag, TagKind};
use lockstep_common::ids::{Rank, WorkerId};
use lockstep_common::net::{Authority, Role};
use lockstep_common::placement::Placement;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::cluster::{Worker, worker};

const TIMEOUT: Duration = Duration::from_secs(20);
const PEER: WorkerId = WorkerId(11);
/// Enough that they are still on their way when a signal comes.
const ELEMENTS: usize = 8_000_000;

/// Where the process that is rank 1 finds the cluster's CA.
const CA_FOLDER: &str = "LOCKSTEP_TEST_CA";

/// Rank 0, here, and rank 1, there, which takes part in every step's all-reduce.
struct Pair {
    group: Group,
    peer: Child,
    _here: Worker,
}

impl Pair {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open(folder.path()).unwrap();
        let mut peer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_peer_process", "--nocapture"])
            .env(CA_FOLDER, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(peer.stdout.take().unwrap()).lines();
        let address =
            lines.map(Result::unwrap).find_map(|line| line.split_once("at ")?.1.parse().ok()).unwrap();
        let here = worker(&authority, WorkerId(10));
        let there = vec![named(1, PEER, vec![address])];
        let config = here.config(0, there, &Placement::even(2, 2), TIMEOUT);
        let group = here.connect(config).unwrap();
        Self { group, peer, _here: here }
    }

    fn reduce(&self, step: u64) -> Result<(), CollectiveError> {
        reduce(&self.group, step)
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.peer.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = self.peer.kill();
        let _ = self.peer.wait();
    }
}

fn named(rank: u32, worker: WorkerId, addresses: Vec<SocketAddr>) -> Peer {
    Peer { rank: Rank(rank), worker, addresses, server_name: Role::Worker(worker).server_name() }
}

fn reduce(group: &Group, step: u64) -> Result<(), CollectiveError> {
    let leaf = vec![step as f32; ELEMENTS];
    group.all_reduce(Tag::new(step, 0, TagKind::Gradient), vec![leaf], ReduceOp::Sum)?.wait()?;
    Ok(())
}

/// Not a test by itself: what rank 1 runs.
#[test]
fn the_peer_process() {
    let Ok(folder) = std::env::var(CA_FOLDER) else {
        return;
    };
    let authority = Authority::open(Path::new(&folder)).unwrap();
    let here = worker(&authority, PEER);
    println!("\nat {}", here.endpoint.local_addr().unwrap());
    let config = here.config(1, vec![named(0, WorkerId(10), vec![])], &Placement::even(2, 2), TIMEOUT);
    let group = here.connect(config).unwrap();
    (1..).find_map(|step| reduce(&group, step).err());
}

fn assert_gone(error: &CollectiveError, since: Instant) {
    assert!(since.elapsed() < Duration::from_secs(2), "after {:?}", since.elapsed());
    assert_eq!(error.culprit(), Some(Rank(1)), "{error}");
    assert!(error.to_string().contains("its process is gone"), "{error}");
}

#[test]
fn a_process_killed_while_bytes_flow_is_noticed_within_two_seconds() {
    let mut pair = Pair::start();
    for step in 1..=3 {
        pair.reduce(step).unwrap();
    }
    let leaf = vec![4f32; ELEMENTS];
    let pending = pair.group.all_reduce(Tag::new(4, 0, TagKind::Gradient), vec![leaf], ReduceOp::Sum);
    pair.peer.kill().unwrap();
    let killed = Instant::now();
    assert_gone(&pending.unwrap().wait().unwrap_err(), killed);
}

#[test]
fn a_process_killed_while_all_wait_is_noticed_within_two_seconds() {
    let mut pair = Pair::start();
    pair.reduce(1).unwrap();
    pair.peer.kill().unwrap();
    pair.peer.wait().unwrap();
    let killed = Instant::now();
    let error = pair.reduce(1000).unwrap_err();
    assert_gone(&error, killed);
    assert!(error.to_string().contains("its host has closed its lifeline"), "{error}");
}

#[test]
fn a_stopped_process_is_not_taken_for_a_dead_one() {
    let pair = Pair::start();
    pair.reduce(1).unwrap();
    pair.signal("-STOP");
    let stopped = Instant::now();
    let error = pair.reduce(2).unwrap_err();
    // The last keep-alive may be half a second old when the process stops.
    assert!(stopped.elapsed() > Duration::from_millis(4400), "after {:?}: {error}", stopped.elapsed());
    assert!(stopped.elapsed() < TIMEOUT, "after {:?}", stopped.elapsed());
    assert_eq!(error.culprit(), Some(Rank(1)), "{error}");
    assert!(error.to_string().contains("has gone silent"), "{error}");
}

/// Three seconds: many probes long.
#[test]
fn a_process_that_stalls_for_seconds_stays_in_the_group() {
    let pair = Pair::start();
    pair.reduce(1).unwrap();
    pair.signal("-STOP");
    std::thread::scope(|scope| {
        let step = scope.spawn(|| pair.reduce(2));
        std::thread::sleep(Duration::from_secs(3));
        pair.signal("-CONT");
        step.join().unwrap().unwrap();
    });
    pair.reduce(3).unwrap();
}
