//! `worker bench allreduce`: what scripts read, and how it ends when something goes wrong.

use lockstep_common::token::Token;
use lockstep_tests::process::{Ended, Process, command, is_gone, signal_pid};
use lockstep_tests::wait::until;
use serde_json::Value;

fn bench(args: &[&str]) -> Process {
    let mut command = command("worker");
    command.args(["bench", "allreduce"]).args(args).env_remove("LOCKSTEP_BENCH_SECRET");
    command.env("LOCKSTEP_LOG", "info");
    Process::start(command)
}

/// A benchmark that measures until it is stopped, and its ranks' processes once they measure.
fn endless() -> (Process, Vec<u32>) {
    let mut process = bench(&["--ranks", "3", "--sizes", "64K", "--iterations", "100000"]);
    process.until_stderr("measuring");
    let ranks = process.children();
    assert_eq!(ranks.len(), 3);
    (process, ranks)
}

fn results(ended: &Ended) -> (Value, Vec<Value>) {
    let report: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let rows = report["results"].as_array().expect("rows").clone();
    for row in &rows {
        let of = |key: &str| row[key].as_f64().expect("a number");
        let times = [of("min_seconds"), of("median_seconds"), of("max_seconds")];
        assert!(0.0 < times[0] && times.is_sorted(), "{row}");
        assert!((of("gb_per_second") * times[1] * 1e9 - of("bytes")).abs() < 1.0, "{row}");
    }
    (report, rows)
}

#[test]
fn every_size_and_column_is_measured_and_its_json_can_be_read() {
    let args = [
        "--sizes",
        "4,4K,1M",
        "--backend",
        "shm,quic",
        "--reduction",
        "exact,fast",
        "--wire",
        "f32,bf16,int8",
    ];
    let ended = bench(&[&args[..], &["--shards", "3", "--iterations", "4", "--json"]].concat()).wait().ok();
    let (report, rows) = results(&ended);
    assert_eq!((&report["ranks"], &report["shards"], &report["hosts"]), (&2.into(), &3.into(), &1.into()));
    let cell =
        |row: &Value| ["bytes", "backend", "reduction", "wire"].map(|key| row[key].to_string()).join(" ");
    let cells: Vec<_> = rows.iter().map(cell).collect();
    let mut expected = Vec::new();
    for size in [4, 4096, 1 << 20] {
        for backend in ["shm", "quic"] {
            for order in ["exact", "fast"] {
                let forms = ["f32", "bf16", "int8"];
                expected.extend(forms.map(|wire| format!("{size} {backend:?} {order:?} {wire:?}")));
            }
        }
    }
    assert_eq!(cells, expected);
    assert!(rows.iter().all(|row| row["iterations"] == 4), "{rows:?}");
}

#[test]
fn the_table_has_a_line_per_size() {
    let ended = bench(&["--ranks", "1", "--sizes", "4K,64K", "--iterations", "5"]).wait().ok();
    let sizes: Vec<_> = ended.stdout.lines().skip(2).map(|line| line.trim_start()[..6].trim()).collect();
    assert_eq!(sizes, ["4 KiB", "64 KiB"]);
}

#[test]
fn wrong_arguments_are_usage_errors_of_one_line() {
    for (args, words) in [
        (&["--sizes", "4k"][..], &["'4k'", "such as `4096`, `64K` or `25M`"][..]),
        (&["--sizes", "6"], &["'6'", "multiple of 4 bytes"]),
        (&["--backend", "tcp"], &["'tcp'", "`quic`"]),
        (&["--backend", "nccl"], &["'nccl'", "measure a job with it"]),
        (&["--wire", "powersgd"], &["'powersgd'", "measure a job with it"]),
        (&["--reduction", "exat"], &["'exat'", "`exact`"]),
        (&["--ranks", "0"], &["'0'", "1..=64"]),
        (&["--seconds", "-1"], &["-1"]),
        (&["--ranks", "4", "--shards", "3"], &["3 logical shards for 4 ranks"]),
        (&["--peer", "127.0.0.1:1"], &["--secret"]),
        (&["--peer", "127.0.0.1:1", "--secret", "s", "--sizes", "4K"], &["--peer", "--sizes"]),
    ] {
        let ended = bench(args).wait().refused(2, words);
        let errors = ended.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!((errors, ended.stdout.as_str()), (1, ""), "{args:?}: {}", ended.stderr);
    }
}

#[test]
fn a_killed_rank_ends_the_benchmark_and_is_named() {
    let (process, ranks) = endless();
    signal_pid(ranks[1], libc::SIGKILL);
    let ended = process.wait().refused(1, &["rank ", &format!("(process {})", ranks[1]), "SIGKILL"]);
    let errors: Vec<_> = ended.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(ended.stdout, "");
    until("the other ranks to end", || ranks.iter().all(|pid| is_gone(*pid)).then_some(()));
}

#[test]
fn ranks_end_when_the_leader_is_killed() {
    let (mut process, ranks) = endless();
    process.kill();
    until("the ranks to end", || ranks.iter().all(|pid| is_gone(*pid)).then_some(()));
}

/// A leader that waits for a second host, its address and its secret.
fn listening(args: &[&str]) -> (Process, String, Token) {
    let mut leader = bench(&[&["--listen", "127.0.0.1:0"], args].concat());
    leader.until_stderr("--secret lks1.");
    let line = leader.stderr();
    let after = |word: &str| line.split_once(word).and_then(|(_, rest)| rest.split_whitespace().next());
    let address = after("--peer ").expect("an address").to_owned();
    let secret = after("--secret ").expect("a secret").parse().expect("a whole secret");
    (leader, address, secret)
}

#[test]
fn a_second_host_joins_with_the_secret_and_brings_its_ranks() {
    let (leader, address, secret) =
        listening(&["--ranks", "2", "--sizes", "64K", "--iterations", "5", "--json"]);
    let other = Token { secret: [7; 32], ..secret.clone() };
    let peer = |secret: &Token, ranks: &str| {
        bench(&["--peer", &address, "--secret", &secret.to_string(), "--ranks", ranks]).wait()
    };
    peer(&other, "1").refused(1, &["error: the other host refused: the secret is not this benchmark's"]);
    peer(&secret, "63").refused(1, &["2 and 63 ranks", "at most 64"]);
    let elsewhere = Token { ca: [7; 32], ..secret.clone() };
    peer(&elsewhere, "1").refused(1, &["error: "]);
    peer(&secret, "1").ok();
    let (report, rows) = results(&leader.wait().ok());
    assert_eq!((&report["ranks"], &report["hosts"], rows.len()), (&3.into(), &2.into(), 1));
}

#[test]
fn a_host_that_dies_ends_the_benchmark_on_the_other_one() {
    let (mut leader, address, secret) = listening(&["--sizes", "64K", "--iterations", "100000"]);
    let mut peer = bench(&["--peer", &address, "--secret", &secret.to_string()]);
    leader.until_stderr("measuring");
    let ranks = peer.children();
    assert_eq!(ranks.len(), 1);
    peer.kill();
    until("its rank to end", || ranks.iter().all(|pid| is_gone(*pid)).then_some(()));
    leader.wait().refused(1, &["error: ", "rank 1"]);

    let (mut leader, address, secret) = listening(&["--sizes", "64K", "--iterations", "100000"]);
    let mut peer = bench(&["--peer", &address, "--secret", &secret.to_string()]);
    peer.until_stderr("measuring");
    leader.kill();
    peer.wait().refused(1, &["error: the host that leads is gone"]);
}
