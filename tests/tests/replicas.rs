//! Invariant 2: all replicas hold the same bits. One whose memory is changed on purpose is named, and what follows is what
//! the job file says.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::job::Job;
use lockstep_tests::place::Place;
use lockstep_tests::process::{Process, command, is_gone};
use lockstep_tests::wait::until;

/// Checkpoints after steps 10, 20, ...; comparisons after every seventh step too.
fn job(workers: u32, on_mismatch: &str) -> String {
    let job = Job { steps: 40, min_workers: workers, max_workers: workers, ..Job::default() };
    format!("{job}[checks]\ndigest_every_steps = 7\non_mismatch = \"{on_mismatch}\"\n")
}

/// So many workers, of which the last has this fault.
fn cluster(workers: u32, fault: &str) -> (Cluster, Vec<Process>) {
    let mut cluster = Cluster::start(Place::new());
    let mut processes: Vec<_> = (1..workers).map(|_| cluster.worker()).collect();
    let token = cluster.token();
    let mut command = cluster.join_command(&token);
    command.env("LOCKSTEP_FAULTS", fault);
    processes.push(cluster.join(command));
    (cluster, processes)
}

/// Mismatches that each worker has counted, in the order in which they joined.
fn mismatches(cluster: &Cluster) -> Vec<f64> {
    cluster.scrape_workers().iter().map(|w| w.value("lockstep_replica_mismatches_total", "")).collect()
}

#[test]
fn a_flipped_bit_is_named_by_the_majority_and_changes_nothing_in_the_end() {
    let job = job(3, "heal");
    let (cluster, _workers) = cluster(3, "flip:step=12");
    let id = cluster.submit(&job);
    let status = cluster.until_finished(&id);
    assert_eq!(status.digest(), Place::new().run(job.replace("min = 3", "min = 1"), 1).digest());
    let log = cluster.place.log(&id);
    // Found at the next comparison, two steps of wrong gradients later; so all go back to the checkpoint of step 10.
    assert!(
        log.contains("after step 14 rank 2 (w3 on ") && log.contains("another state than most ranks"),
        "{log}"
    );
    assert!(log.contains("g2 starts from the checkpoint of step 10"), "{log}");
    assert_eq!((status.generation, mismatches(&cluster)), (2, vec![0.0, 0.0, 1.0]));
    assert_eq!(cluster.place.prove(&id)["undone"], 4);
}

#[test]
fn of_two_replicas_that_differ_nobody_can_tell_which_is_right() {
    let job = job(2, "heal");
    let (cluster, _workers) = cluster(2, "flip:step=13");
    let id = cluster.submit(&job);
    let status = cluster.until_finished(&id);
    assert_eq!(status.digest(), Place::new().run(job.replace("min = 2", "min = 1"), 1).digest());
    let log = cluster.place.log(&id);
    assert!(
        log.contains("after step 14 rank 1 (w2 on ") && log.contains("cannot be told who is right"),
        "{log}"
    );
    assert_eq!(mismatches(&cluster), [0.0, 1.0]);
}

#[test]
fn a_job_that_says_so_is_stopped_with_rank_host_and_step() {
    let (cluster, _workers) = cluster(3, "flip:step=12");
    let id = cluster.submit(job(3, "stop"));
    let status = cluster.until_status(&id, "failed", |status| status.state == "failed");
    assert!(status.reason.contains("after step 14 rank 2 (w3 on "), "{}", status.reason);
}

/// Each point is reached: the worker that is to die there does, and a spare one takes its place.
#[test]
fn a_worker_killed_at_any_point_of_a_step_changes_nothing_in_the_end() {
    let job = Job { steps: 40, min_workers: 2, max_workers: 2, ..Job::default() };
    let undisturbed = Place::new().run(Job { min_workers: 1, ..job.clone() }, 1).digest();
    for point in ["data", "forward", "backward", "reduce", "optimizer", "checkpoint", "boundary"] {
        // Rank 0: it joined first.
        let mut cluster = Cluster::start(Place::new());
        let token = cluster.token();
        let mut command = cluster.join_command(&token);
        command.env("LOCKSTEP_FAULTS", format!("kill:rank=0,step=20,phase={point}"));
        let doomed = cluster.join(command);
        let _others = [cluster.worker(), cluster.worker()];
        let id = cluster.submit(&job);
        until(&format!("its death at {point}"), || is_gone(doomed.id()).then_some(()));
        assert_eq!(cluster.until_finished(&id).digest(), undisturbed, "{point}");
    }
}

#[test]
fn nonsense_in_the_variable_is_refused() {
    let mut command = command("worker");
    command.args(["models"]).env("LOCKSTEP_FAULTS", "kill:phase=lunch");
    Process::start(command).wait().refused(2, &["LOCKSTEP_FAULTS: `kill:phase=lunch` has no phase `lunch`"]);
}
