//! The metrics of both programs, as Prometheus sees them.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::job::Job;
use lockstep_tests::place::Place;
use lockstep_tests::scrape::Scrape;
use std::io::Write;
use std::process::{Command, Stdio};

const PHASES: [&str; 6] = ["data", "forward", "backward", "comm", "optimizer", "check"];

/// Two epochs and a bit: 18 steps of 32 and one of 24 in each.
fn job() -> Job {
    Job { steps: 40, min_workers: 2, ..Job::default() }
}

fn samples(steps: u64) -> f64 {
    (1..=steps).map(|step| if step % 19 == 0 { 24.0 } else { 32.0 }).sum()
}

#[test]
fn both_programs_tell_what_a_job_did() {
    let job = job();
    let mut cluster = Cluster::start(Place::new());
    let _workers = [cluster.worker(), cluster.worker()];
    let id = cluster.submit(&job);
    let status = cluster.until_finished(&id);

    let scrape = cluster.scrape();
    let of_job = format!("job=\"{id}\"");
    assert_eq!(scrape.value("lockstep_steps_total", &of_job), job.steps as f64);
    assert_eq!(scrape.value("lockstep_samples_total", &of_job), samples(job.steps));
    assert_eq!(scrape.value("lockstep_generation", &of_job), 1.0);
    assert_eq!(scrape.value("lockstep_jobs", "state=\"finished\""), 1.0);
    assert_eq!(scrape.value("lockstep_jobs", "state=\"running\""), 0.0);
    assert_eq!(scrape.value("lockstep_workers", "state=\"idle\""), 2.0);
    // After steps 10, 20, 30 and 40.
    assert_eq!(scrape.value("lockstep_checkpoint_seconds_count", ""), 4.0);
    let losses = cluster.place.losses(&id);
    assert_eq!(scrape.value("lockstep_loss", &of_job).to_bits(), losses[&job.steps]);
    assert!(status.metrics.contains_key("test_top1"), "{status:?}");
    has_process_metrics(&scrape);

    let workers = cluster.scrape_workers();
    assert_eq!(workers.len(), 2);
    for worker in &workers {
        assert_eq!(worker.value("lockstep_steps_total", ""), job.steps as f64);
        assert_eq!(worker.value("lockstep_samples_total", ""), samples(job.steps));
        assert_eq!(worker.value("lockstep_loss", "").to_bits(), losses[&job.steps]);
        for phase in PHASES {
            let label = format!("phase=\"{phase}\"");
            assert_eq!(worker.value("lockstep_step_phase_seconds_count", &label), job.steps as f64);
            let seconds = worker.value("lockstep_step_phase_seconds_sum", &label);
            assert!((0.0..60.0).contains(&seconds), "{phase} took {seconds} s");
        }
        for direction in ["sent", "received"] {
            let label = format!("direction=\"{direction}\"");
            assert!(worker.value("lockstep_collective_bytes_total", &label) > 10_000.0, "{direction}");
        }
        assert_eq!(worker.value("lockstep_generation", ""), 0.0, "it is in no job any more");
        has_process_metrics(worker);
    }
    let stored: f64 = workers.iter().map(|w| w.value("lockstep_checkpoint_seconds_count", "")).sum();
    assert_eq!(stored, 8.0, "both ranks store their part of each checkpoint");
}

#[test]
fn gauges_follow_a_running_job() {
    let mut cluster = Cluster::start(Place::new());
    let _workers = [cluster.worker(), cluster.worker()];
    let id = cluster.submit(Job { steps: 600, ..job() });
    cluster.until_step(&id, 1);
    let scrape = cluster.scrape();
    assert_eq!(scrape.value("lockstep_jobs", "state=\"running\""), 1.0);
    assert_eq!(scrape.value("lockstep_workers", "state=\"busy\""), 2.0);
    for worker in cluster.scrape_workers() {
        assert_eq!(worker.value("lockstep_generation", ""), 1.0);
        assert_eq!(worker.value("lockstep_workers", ""), 2.0);
        assert!(worker.value("lockstep_steps_total", "") >= 1.0);
    }
}

#[test]
fn health_and_readiness_are_served_and_readiness_follows_the_coordinator() {
    let mut cluster = Cluster::start(Place::empty());
    let worker = cluster.worker();
    let metrics = cluster.place.json(&["workers"])[0]["metrics"].as_str().expect("an address").to_owned();
    let status = |address: &str, path: &str| {
        let answer = reqwest::blocking::get(format!("http://{address}{path}")).expect("an answer");
        answer.status().as_u16()
    };
    for address in [&cluster.http(), &metrics] {
        assert_eq!(status(address, "/healthz"), 200);
        assert_eq!(status(address, "/readyz"), 200);
        assert_eq!(status(address, "/nothing"), 404);
    }
    cluster.coordinator.kill();
    lockstep_tests::wait::until("the worker to be unready", || {
        (status(&metrics, "/readyz") == 503).then_some(())
    });
    assert_eq!(status(&metrics, "/healthz"), 200, "it lives:\n{}", worker.stderr());
}

#[test]
fn promtool_finds_nothing_to_object_to() {
    if Command::new("promtool").arg("--version").output().is_err() {
        println!("skipped: promtool is not installed (apt-get install prometheus)");
        return;
    }
    let mut cluster = Cluster::start(Place::new());
    let _worker = cluster.worker();
    let id = cluster.submit(Job { steps: 3, ..Job::default() });
    cluster.until_finished(&id);
    for scrape in [cluster.scrape(), cluster.scrape_workers().remove(0)] {
        let mut promtool = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("promtool starts");
        let mut input = promtool.stdin.take().expect("its standard input");
        // It also objects to names of the process collector's that every exporter shares; only ours matter.
        input.write_all(scrape.text.as_bytes()).expect("promtool reads");
        drop(input);
        let output = promtool.wait_with_output().expect("promtool ends");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let ours: Vec<_> = said.lines().filter(|line| !line.starts_with("process_")).collect();
        assert!(ours.is_empty(), "{ours:#?}");
    }
}

#[track_caller]
fn has_process_metrics(scrape: &Scrape) {
    assert!(scrape.value("process_resident_memory_bytes", "") > 1e6);
    assert!(scrape.value("process_start_time_seconds", "") > 1e9);
}
