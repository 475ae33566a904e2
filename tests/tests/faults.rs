//! A rank's process is killed or stopped at any moment of an all-reduce: the other processes end with an error that
//! names it, and nothing is left behind.

use lockstep_common::rng::Stream;
use lockstep_tests::process::{Process, command, is_gone, signal_pid};
use lockstep_tests::wait::{until, within};
use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

/// From the death of a process to the other ranks' errors, where they share memory.
const DEATH_SHM: Duration = Duration::from_secs(2);
/// The same where they only share a network: the QUIC idle time-out, and a second.
const DEATH_QUIC: Duration = Duration::from_secs(6);
/// From the stop of a process to the other ranks' errors: a job's time-out, and a second.
const STOP: Duration = Duration::from_secs(11);

const RANKS: u32 = 3;

/// Three ranks in the midst of their all-reduces, and the processes' ids: not by rank.
fn ranks(backend: &str) -> (Process, Vec<u32>) {
    let mut command = command("worker");
    let ranks = RANKS.to_string();
    command.args(["bench", "allreduce", "--backend", backend, "--ranks", &ranks]);
    command.args(["--sizes", "25M", "--iterations", "100000"]);
    command.env("LOCKSTEP_LOG", "info,lockstep_collectives=debug").env("NO_COLOR", "1");
    let mut process = Process::start(command);
    process.until_stderr("measuring");
    let ranks = process.children();
    assert_eq!(ranks.len(), RANKS as usize);
    (process, ranks)
}

/// What each rank has said of the end of its group: the rank and its error.
fn ends(log: &str) -> Vec<(u32, &str)> {
    let end = |line: &'_ str| -> Option<(u32, usize)> {
        let rank = line.split_once("group ends rank=")?.1.split(' ').next()?.parse().ok()?;
        Some((rank, line.find("error=")?))
    };
    log.lines().filter_map(|line| end(line).map(|(rank, at)| (rank, &line[at..]))).collect()
}

/// Names of shared memory that has any, and of this system's Unix sockets that are Lockstep's.
fn leftovers() -> BTreeSet<String> {
    let segments = fs::read_dir("/dev/shm").expect("/dev/shm can be listed");
    let segments = segments.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let sockets = fs::read_to_string("/proc/net/unix").expect("/proc/net/unix can be read");
    let sockets = sockets.lines().filter_map(|line| line.split_whitespace().last());
    let sockets = sockets.filter(|name| name.starts_with("@lockstep")).map(str::to_owned);
    segments.chain(sockets).collect()
}

/// Sends `signal` to a rank at so many moments, and checks what follows.
fn disturb(backend: &str, signal: i32, moments: u64, limit: Duration) {
    for moment in 0..moments {
        let before = leftovers();
        let mut stream = Stream::new(3, "moment", &[moment, signal as u64]);
        let (leader, pids) = ranks(backend);
        // The leader would end the other ranks as soon as it sees that one is gone.
        leader.signal(libc::SIGSTOP);
        let victim = pids[stream.below(pids.len() as u64) as usize];
        // A moment of the all-reduces, each of which takes some tens of milliseconds.
        std::thread::sleep(Duration::from_micros(stream.below(1_000_000)));
        signal_pid(victim, signal);
        let struck = Instant::now();
        let others = RANKS as usize - 1;
        let spoke = within(limit, || (ends(&leader.stderr()).len() == others).then_some(()));
        let (elapsed, log) = (struck.elapsed(), leader.stderr());
        assert!(spoke.is_some(), "{backend}, signal {signal}: not all have failed after {elapsed:?}:\n{log}");

        let ends = ends(&log);
        let silent: Vec<u32> = (0..RANKS).filter(|rank| ends.iter().all(|end| end.0 != *rank)).collect();
        let [named] = silent[..] else { panic!("{backend}, signal {signal}: {ends:?}\n{log}") };
        for (rank, error) in &ends {
            assert!(error.contains(&format!("rank {named}")), "rank {rank} does not name {named}: {error}");
        }

        let survivors = || pids.iter().filter(|pid| **pid != victim);
        until("the other ranks to end by themselves", || survivors().all(|pid| is_gone(*pid)).then_some(()));
        leader.signal(libc::SIGCONT);
        let ended = leader.wait().refused(1, &["error: ", &format!("rank {named}")]);
        assert_eq!(ended.stdout, "");
        until("all processes to be gone", || pids.iter().all(|pid| is_gone(*pid)).then_some(()));
        until("nothing to be left", || leftovers().is_subset(&before).then_some(()));
    }
}

#[test]
fn a_killed_neighbour_is_named_within_two_seconds() {
    disturb("shm", libc::SIGKILL, 4, DEATH_SHM);
}

#[test]
fn a_killed_peer_is_named_within_seconds() {
    disturb("quic", libc::SIGKILL, 2, DEATH_QUIC);
}

#[test]
fn a_stopped_neighbour_is_named_after_the_time_out() {
    disturb("shm", libc::SIGSTOP, 1, STOP);
}

#[test]
fn a_stopped_peer_is_named_after_the_time_out() {
    disturb("quic", libc::SIGSTOP, 1, STOP);
}
