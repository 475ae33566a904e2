//! Scenarios: how jobs and workers end, by themselves, by an error or by an operator.

use crate::scenarios::{J1, from_peers, lost, running, running_on, starts};
use crate::world::{World, finished, job, stopped};
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{FromWorker, JobState, Outcome, Position, StopMode, ToWorker};

#[test]
fn a_job_is_finished_when_all_ranks_are_and_their_weights_agree() {
    let mut world = running();
    world.end(1, J1, 1, finished("a"));
    assert_eq!(world.state(J1), JobState::Running);
    world.end(2, J1, 1, finished("a"));
    assert_eq!(world.state(J1), JobState::Finished);
    assert_eq!(world.core.job(J1).unwrap().weights_digest.as_deref(), Some("a"));

    let mut world = running();
    world.end(1, J1, 1, finished("a"));
    world.end(2, J1, 1, finished("b"));
    assert_eq!(world.state(J1), JobState::Failed);
    assert!(
        world.reason(J1).starts_with("rank 1 (w2 on host2) ended with other weights"),
        "{}",
        world.reason(J1)
    );
}

#[test]
fn an_error_that_would_come_back_fails_the_job_with_the_first_one() {
    let mut world = running();
    world.end(2, J1, 1, Outcome::Failed { error: "loss is NaN at step 3".to_owned() });
    world.end(1, J1, 1, Outcome::Failed { error: "told to abort".to_owned() });
    assert_eq!(world.state(J1), JobState::Failed);
    assert_eq!(world.reason(J1), "rank 1 (w2 on host2): loss is NaN at step 3");
}

#[test]
fn generations_that_get_no_further_end_in_failure_and_progress_counts_anew() {
    let mut world = running();
    for generation in 1..=9 {
        world.end(1, J1, generation, lost(1));
        world.end(2, J1, generation, stopped(0));
        world.find(None);
    }
    world.step(1, J1, 10, 12);
    // Ten failures of the cluster within moments are not the job's.
    for generation in 10..=20 {
        assert_eq!(world.state(J1), JobState::Running, "generation {generation}");
        if generation == 20 {
            world.pass(120_000);
        }
        world.end(1, J1, generation, lost(1));
        world.end(2, J1, generation, stopped(0));
        world.find(None);
    }
    assert_eq!(world.state(J1), JobState::Failed);
    assert!(
        world.reason(J1).contains("11 attempts in a row came no further, in 120 s"),
        "{}",
        world.reason(J1)
    );
    assert!(world.reason(J1).contains("bucket 2"));
}

#[test]
fn pause_asks_for_a_checkpoint_and_resume_goes_on_from_it() {
    let mut world = running();
    world.inbox();
    world.core.pause(J1, world.now_ms).unwrap();
    world.pump();
    let stop = ToWorker::Stop { job: J1, generation: Generation(1), mode: StopMode::Checkpoint };
    assert_eq!(world.inbox(), [(WorkerId(1), stop.clone()), (WorkerId(2), stop)]);
    assert_eq!(world.state(J1), JobState::Stopping);
    world.core.handle_checkpoint_stored(J1, 31);
    world.end(2, J1, 1, stopped(31));
    world.end(1, J1, 1, stopped(31));
    assert_eq!(world.state(J1), JobState::Paused);
    assert!(world.core.pause(J1, world.now_ms).is_err());
    world.core.resume(J1, world.now_ms).unwrap();
    world.pump();
    world.find(Some(31));
    assert_eq!((world.state(J1), world.core.job(J1).unwrap().step), (JobState::Running, 31));
}

#[test]
fn a_job_that_finishes_while_it_is_cancelled_is_finished() {
    let mut world = running();
    world.end(1, J1, 1, finished("a"));
    world.core.cancel(J1, world.now_ms).unwrap();
    world.pump();
    world.end(2, J1, 1, stopped(9));
    assert_eq!(world.state(J1), JobState::Finished);
}

#[test]
fn cancel_in_every_state_ends_the_job_and_frees_its_workers() {
    let mut world = World::new();
    world.enroll(1);
    world.submit(job(1, 1));
    world.core.cancel(J1, world.now_ms).unwrap();
    assert_eq!(world.state(J1), JobState::Cancelled);

    world.submit(job(1, 1));
    world.connect(1); // Reserved, not started.
    world.core.cancel(JobId(2), world.now_ms).unwrap();
    world.find(None);
    assert_eq!(world.state(JobId(2)), JobState::Cancelled);

    world.submit(job(1, 1));
    world.find(None);
    world.core.cancel(JobId(3), world.now_ms).unwrap();
    world.pump();
    world.end(1, JobId(3), 1, stopped(0));
    assert_eq!(world.state(JobId(3)), JobState::Cancelled);
    assert!(world.core.cancel(JobId(3), world.now_ms).unwrap_err().to_string().contains("is cancelled"));
    world.submit(job(1, 1));
    world.find(None);
    assert_eq!(world.state(JobId(4)), JobState::Running);
}

#[test]
fn a_worker_that_does_not_stop_is_dismissed_and_not_waited_for() {
    let mut world = running();
    world.core.cancel(J1, world.now_ms).unwrap();
    world.pump();
    world.end(1, J1, 1, stopped(0));
    world.inbox();
    world.pass(19_000);
    assert_eq!(world.state(J1), JobState::Stopping);
    world.pass(2_000);
    assert_eq!(world.state(J1), JobState::Cancelled);
    assert!(matches!(world.inbox()[..], [(WorkerId(2), ToWorker::Dismiss { .. })]));
    world.submit(job(1, 8));
    world.find(None);
    assert_eq!(
        world.core.job(JobId(2)).unwrap().members,
        [WorkerId(1)],
        "a dismissed worker gets nothing more"
    );
}

#[test]
fn a_leaving_worker_is_let_go_at_a_boundary_and_the_others_go_on_from_what_they_kept() {
    let mut world = running_on(3, 1);
    world.say(2, FromWorker::Leaving);
    assert_eq!(world.inbox(), [], "others may be about to leave too");
    world.pass(200);
    let modes: Vec<_> = world.inbox().into_iter().map(|(_, m)| m).collect();
    let stop = ToWorker::Stop { job: J1, generation: Generation(1), mode: StopMode::Boundary };
    assert_eq!(modes, vec![stop; 3]);
    (1..=3).for_each(|w| world.end_with(w, J1, 1, stopped(8), Position::at(8)));
    let resume = from_peers(8, 0, &[0, 1]);
    assert_eq!(starts(&mut world), [(1, resume.clone()), (3, resume)]);
}

#[test]
fn when_all_workers_leave_at_once_they_write_a_checkpoint_first() {
    let mut world = running_on(2, 1);
    world.say(2, FromWorker::Leaving);
    world.say(1, FromWorker::Leaving);
    world.pass(200);
    assert!(
        world.inbox().iter().all(|(_, m)| matches!(m, ToWorker::Stop { mode: StopMode::Checkpoint, .. }))
    );
}
