//! Several hosts: network namespaces joined by a bridge, each with an address of its own.

use lockstep_tests::job::Job;
use lockstep_tests::place::{Place, Report};
use lockstep_tests::process::{Process, command};
use lockstep_tests::wait::until;
use std::process::{Command, Stdio};

/// The hosts' namespaces; dropping them takes them down.
struct Hosts {
    names: Vec<String>,
}

impl Hosts {
    /// Hosts 10.99.0.1, 10.99.0.2, ...; the first one also carries the bridge. `None` where that is not allowed.
    fn new(count: usize) -> Option<Self> {
        let prefix = format!("lks{}", std::process::id());
        let hosts = Self { names: (1..=count).map(|n| format!("{prefix}h{n}")).collect() };
        for name in &hosts.names {
            ip(&["netns", "add", name]).then_some(())?;
            hosts.inside(name, &["link", "set", "lo", "up"]).then_some(())?;
        }
        let first = &hosts.names[0];
        hosts.inside(first, &["link", "add", "br0", "type", "bridge"]).then_some(())?;
        hosts.inside(first, &["addr", "add", "10.99.0.1/24", "dev", "br0"]).then_some(())?;
        hosts.inside(first, &["link", "set", "br0", "up"]).then_some(())?;
        for (n, name) in hosts.names.iter().enumerate().skip(1) {
            let port = format!("port{n}");
            let pair = ["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", name];
            hosts.inside(first, &pair).then_some(())?;
            hosts.inside(first, &["link", "set", &port, "master", "br0", "up"]).then_some(())?;
            let address = format!("10.99.0.{}/24", n + 1);
            hosts.inside(name, &["addr", "add", &address, "dev", "eth0"]).then_some(())?;
            hosts.inside(name, &["link", "set", "eth0", "up"]).then_some(())?;
        }
        Some(hosts)
    }

    fn inside(&self, name: &str, args: &[&str]) -> bool {
        ip(&[&["-n", name], args].concat())
    }

    /// The same command on host `n`, counted from 1.
    fn on(&self, n: usize, command: &Command) -> Command {
        let mut wrapped = Command::new("ip");
        wrapped
            .args(["netns", "exec", &self.names[n - 1]])
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        wrapped
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&["netns", "del", name]);
        }
    }
}

fn ip(args: &[&str]) -> bool {
    Command::new("ip").args(args).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

#[test]
fn a_job_over_three_hosts_gives_the_digest_of_a_local_run() {
    let Some(hosts) = Hosts::new(3) else {
        println!("skipped: network namespaces need root and iproute2");
        return;
    };
    let job = Job { steps: 40, min_workers: 2, ..Job::default() };
    let place = Place::new();
    let expected = Place::new().run(Job { min_workers: 1, ..job.clone() }, 1).digest();
    let operator = |args: &[&str]| {
        let mut command = place.command();
        command.args(args);
        Process::start(hosts.on(1, &command)).wait()
    };

    let mut serve = place.command();
    serve.args(["serve", "--listen", "0.0.0.0:7777", "--http", "127.0.0.1:7778"]);
    let mut coordinator = Process::start(hosts.on(1, &serve));
    coordinator.until("serving", || operator(&["jobs"]).status.success().then_some(()));
    let token = operator(&["token", "new"]).ok().stdout.trim().to_owned();
    let _workers: Vec<_> = [2, 3]
        .map(|n| {
            let mut worker = command("worker");
            worker.args(["join", "--coordinator", "10.99.0.1:7777", "--threads", "1", "--data-dir"]);
            worker.arg(place.file(&format!("host-{n}"))).env("LOCKSTEP_TOKEN", &token);
            Process::start(hosts.on(n, &worker))
        })
        .into();

    let path = place.job_file(&job);
    operator(&["submit", &path.to_string_lossy()]).ok();
    let finished = until("the job's end", || {
        let text = operator(&["status", "j1", "--json"]).ok().stdout;
        let report: Report = serde_json::from_str(&text).expect("a status");
        assert_ne!(report.state, "failed", "{report:?}");
        (report.state == "finished").then_some(report)
    });
    assert_eq!(finished.digest(), expected);
    let workers = operator(&["workers", "--json"]).ok().stdout;
    for address in ["10.99.0.2", "10.99.0.3"] {
        assert!(workers.contains(address), "{address} is not in {workers}");
    }
}
