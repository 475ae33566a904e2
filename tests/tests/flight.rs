//! Hangs: a worker that stops in mid-run is named with step and bucket while the others still wait.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::job::Job;
use lockstep_tests::place::Place;
use lockstep_tests::process::Process;
use lockstep_tests::wait::{until, within};
use serde_json::Value;
use std::time::Duration;

/// A job that is in mid-run for long, with this time-out of its collectives in seconds.
fn job(timeout_s: u32) -> String {
    let job = Job { steps: 4000, every_steps: 0, min_workers: 3, max_workers: 3, ..Job::default() };
    job.to_string().replace("[collective]\n", &format!("[collective]\ntimeout_s = {timeout_s}\n"))
}

fn waiting(status: &Value) -> Option<&str> {
    status["flight"]["waiting"][0].as_str()
}

#[test]
fn a_stopped_worker_is_named_within_two_seconds_and_its_last_generation_stays_visible() {
    let mut cluster = Cluster::start(Place::new());
    let workers: Vec<Process> = (0..3).map(|_| cluster.worker()).collect();
    let id = cluster.submit(job(7));
    cluster.until_step(&id, 5);
    let healthy = cluster.place.json(&["status", &id]);
    assert_eq!(waiting(&healthy), None, "{healthy}");

    workers[2].signal(libc::SIGSTOP);
    let look = || cluster.place.json(&["status", &id]);
    let status = within(Duration::from_secs(2), || Some(look()).filter(|status| waiting(status).is_some()));
    let status = status.unwrap_or_else(|| panic!("nobody is named: {}", look()));
    let line = waiting(&status).unwrap_or_default();
    assert!(line.starts_with("rank 2 (w3 on ") && line.contains(" of step "), "{line}");
    // Each rank tells of its wait in its own time.
    let both = |status: &Value| waiting(status).is_some_and(|line| line.contains("others wait "));
    let status = within(Duration::from_secs(2), || Some(look()).filter(both));
    let status = status.unwrap_or_else(|| panic!("one rank waits only: {}", look()));
    let ranks = status["flight"]["ranks"].as_array().expect("the ranks");
    assert_eq!(ranks.len(), 3);
    // A bucket that it has begun may wait for rank 1 too, which itself waits for rank 2.
    let waits_for = ranks[0]["waits_for"].as_array().expect("whom it waits for");
    assert!(waits_for.contains(&serde_json::json!(2)), "{status}");
    let shown = cluster.place.coordinator(["status", &id]).ok().stdout;
    assert!(shown.contains("waiting") && shown.contains("LAST COMPLETED"), "{shown}");

    // The ranks give up, the coordinator waits for a third worker, and status still says what happened.
    let failed = until("the failure", || {
        let status = look();
        (status["state"] == "queued").then_some(status)
    });
    let failure = failed["flight"]["failure"].as_str().unwrap_or_default();
    for part in ["rank 2", " of step ", "phase 0"] {
        assert!(failure.contains(part), "{part:?} is not in {failure:?}");
    }
    assert!(waiting(&failed).is_some_and(|line| line.starts_with("rank 2 (w3 on ")), "{failed}");
    workers[2].signal(libc::SIGCONT);
}
