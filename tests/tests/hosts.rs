//! Jobs over several hosts.

use lockstep_tests::hosts::Hosts;
use lockstep_tests::job::Job;
use lockstep_tests::place::{Place, Report};
use lockstep_tests::process::{Process, command};
use lockstep_tests::wait::until;

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

#[test]
fn ranks_meet_in_the_subnet_that_they_share_or_where_they_advertise() {
    let Some(hosts) = Hosts::apart(3) else {
        println!("skipped: network namespaces need root and iproute2");
        return;
    };
    // Each worker's host faces the coordinator in a subnet of its own, from which nothing leads to the other one.
    for (bridge, address) in [("br2", "10.92.0.1/24"), ("br3", "10.93.0.1/24"), ("br9", "10.99.0.1/24")] {
        hosts.bridge(bridge, address).expect("a bridge");
    }
    for (n, facing) in [(2, "br2"), (3, "br3")] {
        hosts.link(n, facing, "eth0", &format!("10.9{n}.0.{n}/24")).expect("a link");
        hosts.link(n, "br9", "eth1", &format!("10.99.0.{n}/24")).expect("a link");
    }
    // Only host 2 knows of this one.
    assert!(hosts.ip_on(3, &["addr", "add", "10.77.0.3/32", "dev", "eth1"]));
    assert!(hosts.ip_on(2, &["route", "add", "10.77.0.3/32", "dev", "eth1"]));

    let place = Place::new();
    let operator = |args: &[&str]| {
        let mut command = place.command();
        command.args(args);
        Process::start(hosts.on(1, &command)).wait()
    };
    let mut serve = place.command();
    serve.args(["serve", "--listen", "0.0.0.0:7777", "--http", "127.0.0.1:7778"]);
    let mut coordinator = Process::start(hosts.on(1, &serve));
    coordinator.until("serving", || operator(&["jobs"]).status.success().then_some(()));
    let join = |n: usize, folder: &str, options: &[&str]| {
        let token = operator(&["token", "new"]).ok().stdout.trim().to_owned();
        let before = operator(&["workers", "--json"]).ok().stdout.matches("idle").count();
        let mut worker = command("worker");
        worker.args(["join", "--coordinator", &format!("10.9{n}.0.1:7777"), "--threads", "1", "--data-dir"]);
        worker.arg(place.file(folder)).args(options).env("LOCKSTEP_TOKEN", token);
        let mut worker = Process::start(hosts.on(n, &worker));
        worker.until("being there", || {
            let now = operator(&["workers", "--json"]).ok().stdout.matches("idle").count();
            (now > before).then_some(())
        });
        worker
    };
    let run = |job: &str| {
        let path = place.job_file(Job { steps: 5, min_workers: 2, ..Job::default() });
        operator(&["submit", &path.to_string_lossy()]).ok();
        until("the job's end", || {
            let text = operator(&["status", job, "--json"]).ok().stdout;
            let report: Report = serde_json::from_str(&text).expect("a status");
            assert_ne!(report.state, "failed", "{report:?}");
            (report.state == "finished").then_some(())
        });
        place.log(job)
    };

    let _second = join(2, "host-2", &["--listen", "0.0.0.0:7702"]);
    let third = join(3, "host-3", &["--listen", "0.0.0.0:7703"]);
    let log = run("j1");
    for expected in [
        "10.99.0.2:7702 (eth1, subnet shared with rank 1)",
        "10.99.0.3:7703 (eth1, subnet shared with rank 0)",
    ] {
        assert!(log.contains(expected), "{expected:?} is not in\n{log}");
    }

    third.signal(libc::SIGTERM);
    third.wait().ok();
    let _third = join(3, "host-3", &["--listen", "0.0.0.0:7703", "--advertise", "10.77.0.3:7703"]);
    let log = run("j2");
    assert!(log.contains(" at 10.77.0.3:7703 (advertised)"), "{log}");
}
