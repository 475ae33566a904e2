//! A service with workers that join it: the operator's commands, the queue, and restarts of either side.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::job::{Job, set};
use lockstep_tests::place::Place;
use lockstep_tests::process::Process;
use std::fs;

fn undisturbed(job: &Job) -> String {
    Place::new().run(Job { min_workers: 1, ..job.clone() }, 1).digest()
}

/// A job that is still running while a test does something to it.
fn long() -> Job {
    Job { steps: 400, every_steps: 50, ..Job::default() }
}

#[test]
fn a_job_goes_from_submission_to_its_end_and_every_command_tells_of_it() {
    let job = Job { steps: 60, min_workers: 2, ..Job::default() };
    let mut cluster = Cluster::start(Place::new());
    let _workers = [cluster.worker(), cluster.worker()];
    let listed = cluster.place.json(&["workers"]);
    assert_eq!(listed[0]["worker"], "w1");
    assert_eq!(listed[1]["state"], "idle");

    let id = cluster.submit(&job);
    assert_eq!(id, "j1");
    let followed = cluster.place.coordinator(["logs", "j1", "-f"]).ok();
    assert!(followed.stdout.contains("finished"), "the log is followed to the end:\n{}", followed.stdout);
    let status = cluster.until_finished("j1");
    assert_eq!((status.step, status.total_steps), (60, 60));
    assert_eq!(status.digest(), undisturbed(&job), "as on one worker of a local run");
    assert!(status.metrics.contains_key("test_top1"), "{status:?}");

    let jobs = cluster.place.json(&["jobs"]);
    assert_eq!((&jobs[0]["job"], &jobs[0]["state"]), (&"j1".into(), &"finished".into()));
    let lines = cluster.place.coordinator(["logs", "j1", "--json"]).ok();
    assert!(lines.stdout.lines().all(|l| serde_json::from_str::<serde_json::Value>(l).is_ok()));
    for (command, expected) in [("jobs", "small"), ("workers", "w2")] {
        let ended = cluster.place.coordinator([command]).ok();
        assert!(ended.stdout.contains(expected) && ended.stderr.contains("hint: "), "{command}: {ended:?}");
    }
    let exported = cluster.place.file("weights.safetensors");
    cluster.place.coordinator(["checkpoint", "export", "j1", &exported.to_string_lossy()]).ok();
    let weights = fs::read(&exported).expect("the export");
    let tensors = safetensors::SafeTensors::deserialize(&weights).expect("the export is safetensors");
    assert!(tensors.names().iter().any(|name| name.ends_with("fc.weight")), "{:?}", tensors.names());
}

#[test]
fn workers_without_the_files_pull_the_shards_over_quic() {
    let mut cluster = Cluster::start(Place::new());
    let token = cluster.token();
    let folder = cluster.place.file("worker-1");
    let command = cluster.join_command(&token);
    let _worker = cluster.join(command);
    let id = cluster.submit(Job { steps: 5, ..Job::default() });
    cluster.until_finished(&id);
    let cached = fs::read_dir(folder.join("slot-1/shards")).expect("the worker's cache");
    let names: Vec<_> = cached.map(|e| e.expect("an entry").file_name()).collect();
    assert_eq!(names.len(), 2, "one shard of each split: {names:?}");
    for name in names {
        let bytes = fs::read(folder.join("slot-1/shards").join(&name)).expect("a cached shard");
        let original =
            fs::read(cluster.place.dir().join("datasets/shards").join(&name)).expect("the original");
        assert!(bytes == original, "{name:?} differs from the original");
    }
    let worker = &cluster.scrape_workers()[0];
    assert_eq!(worker.value("lockstep_shard_fetches_total", ""), 2.0);
}

#[test]
fn cancel_ends_a_job_and_frees_its_workers() {
    let mut cluster = Cluster::start(Place::new());
    let _worker = cluster.worker();
    let id = cluster.submit(long());
    cluster.until_step(&id, 1);
    cluster.place.json(&["cancel", &id]);
    cluster.until_status(&id, "cancelled", |status| status.state == "cancelled");
    cluster.place.coordinator(["cancel", &id]).refused(1, &[&id, "cancelled"]);
    let next = cluster.submit(Job { steps: 3, ..Job::default() });
    cluster.until_finished(&next);
}

#[test]
fn a_paused_job_frees_its_workers_and_goes_on_to_the_undisturbed_digest() {
    let job = long();
    let mut cluster = Cluster::start(Place::new());
    let _workers = [cluster.worker(), cluster.worker()];
    let id = cluster.submit(&job);
    cluster.until_step(&id, 1);
    cluster.place.json(&["pause", &id]);
    let paused = cluster.until_status(&id, "paused", |status| status.state == "paused");
    assert!(paused.step > 0 && paused.step < job.steps, "{paused:?}");
    assert_eq!(cluster.place.checkpoints(&id)[0], paused.step);
    let between = cluster.submit(Job { steps: 3, ..Job::default() });
    cluster.until_finished(&between);
    cluster.place.json(&["resume", &id]);
    assert_eq!(cluster.until_finished(&id).digest(), undisturbed(&job));
    assert_eq!(cluster.place.losses(&id).len() as u64, job.steps);
}

#[test]
fn a_second_job_waits_for_its_turn_and_says_why() {
    let mut cluster = Cluster::start(Place::new());
    let _worker = cluster.worker();
    let first = cluster.submit(Job { steps: 150, max_workers: 1, ..Job::default() });
    let second = cluster.submit(Job { steps: 5, ..Job::default() });
    let third = cluster.submit(Job { steps: 5, ..Job::default() });
    let waits = cluster.status(&second);
    assert_eq!((waits.state.as_str(), waits.reason.as_str()), ("queued", "needs 1 worker, 0 are free"));
    assert_eq!(cluster.status(&third).reason, "position 2 in the queue");
    for id in [first, second, third] {
        cluster.until_finished(&id);
    }
}

#[test]
fn a_worker_that_is_told_to_terminate_leaves_cleanly_and_the_job_goes_on() {
    let job = long();
    let mut cluster = Cluster::start(Place::new());
    let (leaver, _stays) = (cluster.worker(), cluster.worker());
    let id = cluster.submit(&job);
    cluster.until_step(&id, 1);
    leaver.signal(libc::SIGTERM);
    leaver.wait().ok();
    let status = cluster.until_finished(&id);
    assert_eq!(status.digest(), undisturbed(&job));
    assert!(status.generation > 1, "{status:?}");
    let steps = cluster.place.metrics(&id).iter().filter(|line| line.get("seconds").is_some()).count();
    assert_eq!(steps as u64, job.steps, "no step was lost with a worker that left in good order");
}

#[test]
fn a_killed_worker_is_replaced_by_a_spare_one_within_seconds() {
    let job = Job { max_workers: 2, ..long() };
    let mut cluster = Cluster::start(Place::new());
    let mut workers: Vec<Process> = (0..3).map(|_| cluster.worker()).collect();
    let id = cluster.submit(&job);
    cluster.until_step(&id, 60);
    let before = cluster.status(&id);
    assert_eq!(before.workers, ["w1", "w2"]);
    let killed_at = std::time::Instant::now();
    workers[0].kill();
    cluster.until_status(&id, "going on with the spare worker", |s| s.workers == ["w2", "w3"]);
    assert!(killed_at.elapsed().as_secs() < 20, "{:?}", killed_at.elapsed());
    assert_eq!(cluster.until_finished(&id).digest(), undisturbed(&job));
}

#[test]
fn a_killed_coordinator_comes_back_to_undisturbed_jobs() {
    // No checkpoint in mid-run: whatever is repeated would show as a second line for its step.
    let job = Job { steps: 2400, every_steps: 0, min_workers: 2, max_workers: 2, ..Job::default() };
    let mut cluster = Cluster::start(Place::new());
    let _workers = [cluster.worker(), cluster.worker()];
    let unused = cluster.token();
    let id = cluster.submit(&job);
    let waiting = cluster.submit(Job { steps: 5, ..Job::default() });
    cluster.until_step(&id, 1);
    let before = cluster.status(&id);
    cluster.restart();
    let after = cluster.until_status(&id, "adopted", |s| s.state == "running" && s.step > before.step);
    assert_eq!(after.generation, before.generation, "the membership is the same");
    assert_eq!(after.workers, before.workers);
    assert_eq!(cluster.status(&waiting).state, "queued");
    let command = cluster.join_command(&unused);
    let _third = cluster.join(command);
    let finished = cluster.until_finished(&id);
    assert_eq!(finished.generation, before.generation);
    let steps = cluster.place.metrics(&id).iter().filter(|line| line.get("seconds").is_some()).count();
    assert_eq!(steps as u64, job.steps, "every step was done once and told once");
    assert_eq!(finished.digest(), undisturbed(&job));
    cluster.until_finished(&waiting);
}

#[test]
fn a_worker_that_dies_while_the_coordinator_is_away_is_not_waited_for() {
    let job = Job { steps: 2400, every_steps: 20, ..Job::default() };
    let mut cluster = Cluster::start(Place::new());
    let mut only = cluster.worker();
    let command = {
        let token = cluster.token();
        cluster.join_command(&token)
    };
    only.until("to know how to find out that the worker has died", || {
        cluster.place.json(&["workers"])[0]["watched"].as_str().map(str::to_owned)
    });
    let id = cluster.submit(&job);
    cluster.until_status(&id, "a checkpoint", |s| s.step > 50);
    cluster.stop();
    only.kill();
    cluster.restart();
    // The worker may step by itself for an hour, as far as the job file says.
    let _other = cluster.join(command);
    assert_eq!(cluster.until_finished(&id).digest(), undisturbed(&job));
}

#[test]
fn a_worker_that_slept_through_its_lease_commits_nothing_when_it_wakes() {
    let job = Job { steps: 2400, every_steps: 20, max_workers: 1, ..Job::default() };
    let text = set(&job.to_string(), "min", "min = 1\norphan_timeout_s = 1");
    let mut cluster = Cluster::start(Place::new());
    let mut zombie = cluster.worker();
    let id = cluster.submit(&text);
    cluster.until_status(&id, "a checkpoint", |s| s.step > 20);
    zombie.signal(libc::SIGSTOP);
    let _other = cluster.worker();
    // The lease, and the margin for clocks that differ: half a minute.
    let other = cluster.until_status(&id, "others have it", |s| s.workers == ["w2"] && s.state == "running");
    assert_eq!(other.generation, 2);
    zombie.signal(libc::SIGCONT);
    zombie.until_stderr("the step in progress is not committed here");
    let finished = cluster.until_finished(&id);
    assert_eq!((finished.generation, finished.digest()), (2, undisturbed(&job)));
    cluster.place.prove(&id);
}

/// It ended without a word.
#[test]
fn a_worker_that_leaves_while_its_coordinator_is_away_says_what_is_lost() {
    let mut cluster = Cluster::start(Place::new());
    let (busy, idle) = (cluster.worker(), cluster.worker());
    let id = cluster.submit(Job { steps: 100_000, every_steps: 20, max_workers: 1, ..Job::default() });
    let status = cluster.until_status(&id, "in mid-run", |status| status.step > 20);
    assert_eq!(status.workers, ["w1"]);
    cluster.stop();
    for (worker, words) in
        [(busy, "what this worker held of j1, up to step "), (idle, "held nothing of any job")]
    {
        worker.signal(libc::SIGTERM);
        let ended = worker.wait().ok();
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(last.contains("the coordinator is away") && last.contains(words), "{}", ended.stderr);
    }
}

#[test]
fn an_operator_on_another_host_logs_in_with_a_token_and_controls_jobs() {
    let cluster = Cluster::start(Place::new());
    let token = cluster.new_token(&["--operator"]);
    let elsewhere = Place::empty();
    elsewhere.coordinator(["login", "--coordinator", &cluster.address(), "--token", &token]).ok();
    let path = elsewhere.job_file(Job::default());
    assert_eq!(elsewhere.json(&["submit", &path.to_string_lossy()])["job"], "j1");
    assert_eq!(cluster.status("j1").state, "queued");
    elsewhere.json(&["cancel", "j1"]);
    cluster.until_status("j1", "cancelled", |status| status.state == "cancelled");
}
