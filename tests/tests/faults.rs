//! A rank's process is killed or stopped at any moment of an all-reduce, or its link is cut: the other processes end with
//! an error that names it, and where they were, and nothing is left behind.

use lockstep_common::rng::Stream;
use lockstep_tests::cluster::Cluster;
use lockstep_tests::hosts::Hosts;
use lockstep_tests::job::Job;
use lockstep_tests::place::Place;
use lockstep_tests::process::{Process, command, is_gone, signal_pid};
use lockstep_tests::wait::{until, within};
use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

/// From the death of a process to the other ranks' errors.
const DEATH: Duration = Duration::from_secs(2);
/// From the stop of a process, or a cut, to the other ranks' errors: a job's time-out, and a second.
const STOP: Duration = Duration::from_secs(11);

const RANKS: u32 = 3;

/// What every error says of where its rank was: a bucket, or the barrier before it.
const PLACE: &str = " of step ";

/// All-reduces for longer than any test, of ranks that tell of their group's end.
fn all_reduces(ranks: u32) -> Command {
    let mut command = command("worker");
    command.args(["bench", "allreduce", "--ranks", &ranks.to_string()]);
    command.env("LOCKSTEP_LOG", "info,lockstep_collectives=debug").env("NO_COLOR", "1");
    command
}

/// Three ranks in the midst of their all-reduces, and the processes' ids: not by rank.
fn ranks(backend: &str, size: &str) -> (Process, Vec<u32>) {
    let mut command = all_reduces(RANKS);
    command.args(["--backend", backend, "--sizes", size, "--iterations", "100000"]);
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
fn disturb(backend: &str, size: &str, signal: i32, moments: u64, limit: Duration) {
    for moment in 0..moments {
        let before = leftovers();
        let mut stream = Stream::new(3, "moment", &[moment, signal as u64]);
        let (leader, pids) = ranks(backend, size);
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
            assert!(error.contains(PLACE), "rank {rank} does not say where it was: {error}");
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
    disturb("shm", "25M", libc::SIGKILL, 3, DEATH);
    disturb("shm", "4K", libc::SIGKILL, 2, DEATH);
}

#[test]
fn a_killed_peer_is_named_within_two_seconds() {
    disturb("quic", "25M", libc::SIGKILL, 3, DEATH);
    disturb("quic", "4K", libc::SIGKILL, 2, DEATH);
}

#[test]
fn a_stopped_neighbour_is_named_after_the_time_out() {
    disturb("shm", "25M", libc::SIGSTOP, 1, STOP);
}

#[test]
fn a_stopped_peer_is_named_after_the_time_out() {
    disturb("quic", "25M", libc::SIGSTOP, 1, STOP);
}

/// Two hosts with so many ranks each, in the midst of their all-reduces.
struct TwoHosts {
    hosts: Hosts,
    leaders: [Process; 2],
    /// By host.
    ranks: [Vec<u32>; 2],
}

impl TwoHosts {
    /// `None` where network namespaces are not allowed.
    fn start(each: u32) -> Option<Self> {
        let hosts = Hosts::new(2)?;
        let mut command = all_reduces(each);
        command.args(["--sizes", "25M", "--iterations", "100000", "--listen", "10.99.0.1:0"]);
        let mut first = Process::start(hosts.on(1, &command));
        first.until_stderr("--secret ");
        let words = first.stderr();
        let word = |before: &str| {
            let (_, rest) = words.split_once(before).expect("the invitation");
            rest.split_whitespace().next().expect("a word").to_owned()
        };
        let mut command = all_reduces(each);
        command.args(["--peer", &word("--peer ")]).env("LOCKSTEP_BENCH_SECRET", word("--secret "));
        let mut second = Process::start(hosts.on(2, &command));
        let each = each as usize;
        for process in [&mut first, &mut second] {
            process.until_stderr_times("measuring", each);
        }
        let ranks = [first.children(), second.children()];
        assert!(ranks.iter().all(|ranks| ranks.len() == each), "{ranks:?}");
        Some(Self { hosts, leaders: [first, second], ranks })
    }

    fn logs(&self) -> String {
        self.leaders.each_ref().map(Process::stderr).concat()
    }

    /// The errors of `count` ranks, which come within `limit`.
    fn until_ends(&self, count: usize, limit: Duration) -> Vec<(u32, String)> {
        let begin = Instant::now();
        let spoke = within(limit, || (ends(&self.logs()).len() == count).then_some(()));
        assert!(spoke.is_some(), "not all have failed after {:?}:\n{}", begin.elapsed(), self.logs());
        ends(&self.logs()).into_iter().map(|(rank, error)| (rank, error.to_owned())).collect()
    }
}

/// Why there may be no two hosts.
const SKIPPED: &str = "skipped: network namespaces need root and iproute2";

/// Sends `signal` to the last rank of the second host. `None` where there are no hosts.
fn disturb_hosts(each: u32, signal: i32, limit: Duration) -> Option<()> {
    let two = TwoHosts::start(each)?;
    // These would end the ranks as soon as they see that one is gone.
    two.leaders.iter().for_each(|leader| leader.signal(libc::SIGSTOP));
    signal_pid(two.ranks[1][each as usize - 1], signal);
    let ends = two.until_ends(2 * each as usize - 1, limit);
    let silent: Vec<_> = (0..2 * each).filter(|rank| ends.iter().all(|end| end.0 != *rank)).collect();
    let [named] = silent[..] else { panic!("{ends:?}") };
    for (rank, error) in &ends {
        assert!(error.contains(&format!("rank {named}")), "rank {rank} does not name {named}: {error}");
        assert!(error.contains(PLACE), "rank {rank} does not say where it was: {error}");
    }
    Some(())
}

#[test]
fn a_killed_rank_of_another_host_is_named_within_two_seconds() {
    for each in [1, 2] {
        if disturb_hosts(each, libc::SIGKILL, DEATH).is_none() {
            println!("{SKIPPED}");
        }
    }
}

#[test]
fn a_stopped_rank_of_another_host_is_named_after_the_time_out() {
    if disturb_hosts(2, libc::SIGSTOP, STOP).is_none() {
        println!("{SKIPPED}");
    }
}

#[test]
fn both_sides_of_a_cut_link_name_each_other_within_the_time_out() {
    for each in [1, 2] {
        let Some(two) = TwoHosts::start(each) else {
            println!("{SKIPPED}");
            return;
        };
        two.leaders.iter().for_each(|leader| leader.signal(libc::SIGSTOP));
        assert!(two.hosts.ip_on(2, &["link", "set", "eth0", "down"]));
        for (rank, error) in two.until_ends(2 * each as usize, STOP) {
            let others = if rank < each { each..2 * each } else { 0..each };
            let names = others.into_iter().any(|other| error.contains(&format!("rank {other}")));
            assert!(names, "rank {rank} names nobody of the other host: {error}");
            assert!(error.contains(PLACE), "rank {rank} does not say where it was: {error}");
        }
    }
}

/// What a process holds: threads, descriptors, shared memory that it maps.
fn holdings(pid: u32) -> [usize; 3] {
    let count = |folder: &str| fs::read_dir(format!("/proc/{pid}/{folder}")).map_or(0, Iterator::count);
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    [count("task"), count("fd"), maps.lines().filter(|line| line.contains("memfd:")).count()]
}

/// The number of a generation from `generation` on that is in mid-run, and what the process `pid` holds then.
fn settled(cluster: &Cluster, job: &str, generation: u64, pid: u32) -> (u64, [usize; 3]) {
    let status = cluster.until_status(job, "in its next generation", |status| {
        status.state == "running" && status.generation >= generation
    });
    cluster.until_step(job, status.step + 20);
    // Threads that end take a moment: the fewest of some looks is what stays.
    let looks: Vec<_> = (0..20).map(|_| holdings(pid)).collect();
    let least = |kind: usize| looks.iter().map(|look| look[kind]).min().unwrap_or_default();
    (status.generation, [least(0), least(1), least(2)])
}

/// One worker stays while its neighbour is killed and replaced, again and again.
#[test]
fn a_survivor_keeps_nothing_of_the_generations_behind_it() {
    let mut cluster = Cluster::start(Place::new());
    let survivor = cluster.worker();
    let mut victim = cluster.worker();
    let job = Job { steps: 100_000, every_steps: 5, min_workers: 2, max_workers: 2, ..Job::default() };
    let id = cluster.submit(job);
    let (mut generation, first) = settled(&cluster, &id, 1, survivor.id());
    assert!(first[2] > 0, "they share no memory: {first:?}");
    for _ in 0..4 {
        victim.kill();
        let token = cluster.token();
        victim = Process::start(cluster.join_command(&token));
        let (now, held) = settled(&cluster, &id, generation + 1, survivor.id());
        generation = now;
        for (kind, (held, first)) in ["threads", "descriptors", "maps"].iter().zip(held.iter().zip(first)) {
            // A thread for blocking work, or a connection that is being made, may come and go.
            assert!(*held <= first + 3, "generation {generation}: {held} {kind} after {first}");
        }
    }
}
