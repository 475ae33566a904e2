//! Invariant 2: all replicas hold the same bits. One whose memory is changed on purpose is named, and what follows is what
//! the job file says.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::job::Job;
use lockstep_tests::place::Place;
use lockstep_tests::process::{Process, command, is_gone};
use lockstep_tests::wait::until;

/// Forty steps; checkpoints after steps 10, 20, ...
fn job(workers: u32, checks: &str) -> String {
    let job = Job { steps: 40, min_workers: workers, max_workers: workers, ..Job::default() };
    format!("{job}[checks]\n{checks}\n")
}

/// The digest of that job when nothing happens.
fn undisturbed() -> String {
    Place::new().run(job(1, ""), 1).digest()
}

/// A worker for each of these faults, in the order of the ranks that they begin with.
fn cluster(faults: &[&str]) -> (Cluster, Vec<Process>) {
    let mut cluster = Cluster::start(Place::new());
    let token = cluster.token();
    let join = |faults: &&str| {
        let mut command = cluster.join_command(&token);
        command.env("LOCKSTEP_FAULTS", faults);
        cluster.join(command)
    };
    let processes = faults.iter().map(join).collect();
    (cluster, processes)
}

/// How often each worker's replica was found wrong, in the order in which they joined.
fn mismatches(cluster: &Cluster) -> Vec<f64> {
    cluster.scrape_workers().iter().map(|w| w.value("lockstep_replica_mismatches_total", "")).collect()
}

#[test]
fn a_flipped_bit_is_found_at_once_and_the_odd_one_gets_the_state_from_the_others() {
    let (cluster, _workers) = cluster(&["", "", "flip:step=12"]);
    let id = cluster.submit(job(3, ""));
    let status = cluster.until_finished(&id);
    assert_eq!(status.digest(), undisturbed());
    let log = cluster.place.log(&id);
    let line = "after step 12 rank 2 (w3 on ";
    assert!(
        log.contains(line) && log.contains("found its state changed though nothing had written"),
        "{log}"
    );
    assert!(log.contains("g2 starts from step 12, which its members have kept"), "{log}");
    assert_eq!((status.generation, mismatches(&cluster)), (2, vec![0.0, 0.0, 1.0]));
    assert_eq!(cluster.place.prove(&id)["undone"], 0);
}

/// However far from a checkpoint, whichever worker, and with one other worker only. Ranks change
/// hands when one is healed, so a fault may happen to two workers.
#[test]
fn no_flipped_bit_has_anything_come_of_it() {
    let undisturbed = undisturbed();
    for workers in [2, 3] {
        let flips =
            [(1, 2), (0, 6), (1, 11), (1, 12), (0, 15), (1, 18), (1, 19), (0, 20), (1, 27), (0, 33), (1, 39)];
        let mut faults: Vec<_> = flips.iter().map(|(r, s)| format!("flip:rank={r},step={s}")).collect();
        faults.push("flip:rank=1,step=23,phase=reduce".to_owned());
        let (cluster, _workers) = cluster(&vec![faults.join(";").as_str(); workers as usize]);
        let id = cluster.submit(job(workers, ""));
        let status = cluster.until_finished(&id);
        let log = cluster.place.log(&id);
        assert_eq!(status.digest(), undisturbed, "{log}");
        assert!(mismatches(&cluster).iter().sum::<f64>() >= faults.len() as f64, "{log}");
        assert_eq!(cluster.place.prove(&id)["undone"], 0, "{log}");
    }
}

#[test]
fn a_jobs_only_worker_finds_its_own_memory_changed() {
    let (cluster, _workers) = cluster(&["flip:step=13;flip:step=40"]);
    let id = cluster.submit(job(1, ""));
    let status = cluster.until_finished(&id);
    let log = cluster.place.log(&id);
    assert_eq!(status.digest(), undisturbed(), "{log}");
    assert!(log.contains("g2 starts from the checkpoint of step 10"), "{log}");
    assert!(log.contains("g3 starts from the checkpoint of step 30"), "{log}");
    assert_eq!(mismatches(&cluster), [2.0]);
}

/// The survivor's state is the wrong one, and nobody is left to compare it with.
#[test]
fn a_flipped_bit_is_found_though_the_right_replica_dies_before_the_next_comparison() {
    for kill in ["kill:step=13,phase=backward", "kill:step=13,phase=reduce"] {
        let (cluster, _workers) = cluster(&[kill, "flip:step=12"]);
        let id = cluster.submit(Job { steps: 40, min_workers: 1, max_workers: 2, ..Job::default() });
        let status = cluster.until_finished(&id);
        let log = cluster.place.log(&id);
        assert_eq!(status.digest(), undisturbed(), "{log}");
        assert!(log.contains("starts from the checkpoint of step 10"), "{kill}: {log}");
        assert_eq!(mismatches(&cluster), [1.0]);
    }
}

/// A worker that joins copies nothing that has changed by itself.
#[test]
fn a_flipped_bit_is_not_handed_to_one_that_joins() {
    let job = Job { steps: 400, min_workers: 1, max_workers: 2, ..Job::default() };
    let undisturbed = Place::new().run(&job, 1).digest();
    let (mut cluster, _first) = cluster(&["flip:phase=copy"]);
    let id = cluster.submit(&job);
    cluster.until_step(&id, 30);
    let _second = cluster.worker();
    let status = cluster.until_finished(&id);
    let log = cluster.place.log(&id);
    assert_eq!(status.digest(), undisturbed, "{log}");
    assert!(log.contains("rank 0 found its state changed"), "{log}");
    assert_eq!(mismatches(&cluster), [1.0, 0.0], "{log}");
}

/// An update that comes to something else on one rank: it is not known by the rank itself.
#[test]
fn a_replica_that_an_update_has_made_different_is_named_by_the_majority() {
    let (cluster, _workers) = cluster(&["", "flip:step=12,phase=optimizer", ""]);
    let id = cluster.submit(job(3, ""));
    let status = cluster.until_finished(&id);
    let log = cluster.place.log(&id);
    assert_eq!(status.digest(), undisturbed(), "{log}");
    assert!(
        log.contains("after step 12 rank 1 (w2 on ") && log.contains("another state than most ranks"),
        "{log}"
    );
    assert_eq!((status.generation, mismatches(&cluster)), (2, vec![0.0, 1.0, 0.0]));
    assert_eq!(cluster.place.prove(&id)["undone"], 0);
}

#[test]
fn of_two_replicas_that_updates_have_made_different_nobody_can_tell_which_is_right() {
    let (cluster, _workers) = cluster(&["", "flip:step=12,phase=optimizer"]);
    let id = cluster.submit(job(2, ""));
    let status = cluster.until_finished(&id);
    let log = cluster.place.log(&id);
    assert_eq!(status.digest(), undisturbed(), "{log}");
    assert!(
        log.contains("after step 12 rank 1 (w2 on ") && log.contains("cannot be told who is right"),
        "{log}"
    );
    assert!(log.contains("g2 starts from the checkpoint of step 10"), "{log}");
    assert_eq!(mismatches(&cluster), [0.0, 0.0], "nobody is known to be at fault");
    assert_eq!(cluster.place.prove(&id)["undone"], 2);
}

/// One's update comes to something wrong, and the other's memory changes behind its own: nobody bears either out.
#[test]
fn one_that_is_left_alone_with_its_state_is_not_believed() {
    let (cluster, _workers) = cluster(&["flip:step=12", "flip:step=12,phase=optimizer"]);
    let id = cluster.submit(job(2, ""));
    let status = cluster.until_finished(&id);
    let log = cluster.place.log(&id);
    assert_eq!(status.digest(), undisturbed(), "{log}");
    assert!(log.contains("after step 12 rank 0 (w1 on ") && log.contains("found its state changed"), "{log}");
    assert!(log.contains("g2 starts from the checkpoint of step 10"), "{log}");
}

/// Wrong gradients may have been applied between two comparisons, so nobody's state is gone on from.
#[test]
fn a_job_that_compares_seldom_goes_back_to_its_checkpoint() {
    let (cluster, _workers) = cluster(&["", "", "flip:step=13"]);
    let id = cluster.submit(job(3, "digest_every_steps = 7"));
    let status = cluster.until_finished(&id);
    let log = cluster.place.log(&id);
    assert_eq!(status.digest(), undisturbed(), "{log}");
    assert!(log.contains("g2 starts from the checkpoint of step 10"), "{log}");
    assert_eq!((status.generation, mismatches(&cluster)), (2, vec![0.0, 0.0, 1.0]));
}

#[test]
fn a_job_that_says_so_is_stopped_with_rank_host_and_step() {
    let (cluster, _workers) = cluster(&["", "", "flip:step=12"]);
    let id = cluster.submit(job(3, "on_mismatch = \"stop\""));
    let status = cluster.until_status(&id, "failed", |status| status.state == "failed");
    assert!(status.reason.contains("after step 12 rank 2 (w3 on "), "{}", status.reason);
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
