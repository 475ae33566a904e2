//! Scenarios: what happens to a cluster, and the trace that must come of it.

use crate::world::{World, finished, job, stopped};
use lockstep_common::ids::{Generation, JobId, Rank, WorkerId};
use lockstep_common::wire::{FromWorker, JobState, Outcome, Position, Resumption, StopMode, ToWorker};
use lockstep_core::{Config, Core, NewJob, Reception, Restored};

pub(crate) const J1: JobId = JobId(1);

pub(crate) fn lost(culprit: u32) -> Outcome {
    Outcome::Lost { error: "step 7, phase backward, bucket 2".to_owned(), culprit: Some(Rank(culprit)) }
}

/// Two workers run job 1 in generation 1.
pub(crate) fn running() -> World {
    let mut world = World::new();
    world.enroll(2);
    world.connect(1);
    world.connect(2);
    world.submit(job(2, 8));
    world.find(None);
    assert_eq!(world.state(J1), JobState::Running);
    world
}

/// Workers 1 to `workers` run job 1, which goes on with as few as `min`.
pub(crate) fn running_on(workers: u64, min: u32) -> World {
    let mut world = World::new();
    world.enroll(workers);
    (1..=workers).for_each(|w| world.connect(w));
    let job = NewJob { wait_for: Some(workers as u32), ..job(min, 8) };
    world.submit(job);
    world.find(None);
    assert_eq!(world.core.job(J1).unwrap().members.len() as u64, workers);
    world.core.set_wait_for(J1, None, world.now_ms).unwrap();
    world.pump();
    world.inbox();
    world
}

/// The resumption that each started worker was told.
pub(crate) fn starts(world: &mut World) -> Vec<(u64, Resumption)> {
    let start = |(worker, message): (WorkerId, ToWorker)| match message {
        ToWorker::Start(assignment) => Some((worker.0, assignment.resume)),
        _ => None,
    };
    world.inbox().into_iter().filter_map(start).collect()
}

pub(crate) fn from_peers(step: u64, phase: u16, sources: &[u32]) -> Resumption {
    let sources = sources.iter().copied().map(Rank).collect();
    Resumption::Peers { position: Position { step, phase }, sources }
}

#[test]
fn a_job_starts_when_enough_workers_are_idle_and_every_rank_gets_the_same_peers() {
    let mut world = World::new();
    world.enroll(3);
    world.submit(job(2, 8));
    assert_eq!(world.reason(J1), "needs 2 workers, 0 are free");
    world.connect(2);
    assert_eq!(world.reason(J1), "needs 2 workers, 1 is free");
    world.connect(3);
    world.find(None);
    let starts: Vec<_> = world
        .inbox()
        .into_iter()
        .map(|(worker, message)| match message {
            ToWorker::Start(assignment) => (worker, *assignment),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(starts.iter().map(|(w, a)| (w.0, a.rank.0)).collect::<Vec<_>>(), [(2, 0), (3, 1)]);
    assert_eq!(starts[0].1.peers, starts[1].1.peers);
    assert_eq!(starts[0].1.placement.world_size(), 2);
    assert_eq!(starts[0].1.placement.shards(), 8);
    assert_eq!(starts[0].1.resume, Resumption::Fresh);
}

#[test]
fn a_record_is_durable_before_the_workers_hear_of_it() {
    let mut world = running();
    let start = world.trace.iter().position(|line| line.contains("start j1 g1")).unwrap();
    let persist = world.trace.iter().position(|line| line == "persist j1 running g1").unwrap();
    assert!(persist < start, "{:#?}", world.trace);
    world.trace.clear();
    world.core.pause(J1, world.now_ms).unwrap();
    world.pump();
    assert_eq!(world.trace[1], "persist j1 stopping g1", "{:#?}", world.trace);
}

#[test]
fn worker_death_reported_by_a_peer_starts_the_next_generation_with_who_is_left() {
    let mut world = running();
    world.core.handle_checkpoint_stored(J1, 40);
    world.cut(2);
    assert_eq!(world.state(J1), JobState::Running, "a lost connection is not yet a lost worker");
    world.end(1, J1, 1, lost(1));
    world.pass(1_100);
    assert_eq!(
        world.reason(J1),
        "needs 2 workers, 1 is free; it was stopped by: rank 1 (w2 on host2), as rank 0 (w1 on host1) says: step 7, phase \
         backward, bucket 2"
    );
    world.connect(2);
    world.find(Some(40));
    assert_eq!(world.generation(J1), Generation(2));
    let mut resumes = world.inbox().into_iter().filter_map(|(_, m)| match m {
        ToWorker::Start(a) => Some(a.resume),
        _ => None,
    });
    assert_eq!(resumes.next_back(), Some(Resumption::Checkpoint { step: 40 }));
}

/// It began with the rank that had told of it, as if that were to blame.
#[test]
fn the_reason_of_a_recovery_begins_with_the_culprit_where_there_is_one() {
    let check = |culprit: Option<u32>, reason: &str| {
        let mut world = running();
        let outcome = Outcome::Lost { error: "silence".to_owned(), culprit: culprit.map(Rank) };
        world.end(1, J1, 1, outcome);
        assert_eq!(world.reason(J1), reason);
    };
    check(Some(1), "recovers: rank 1 (w2 on host2), as rank 0 (w1 on host1) says: silence");
    check(None, "recovers: rank 0 (w1 on host1): silence");
    check(Some(0), "recovers: rank 0 (w1 on host1): silence");
    // What a worker says is not trusted.
    check(Some(9), "recovers: rank 0 (w1 on host1): silence");
}

/// The worker that waited for it was blamed.
#[test]
fn a_last_checkpoint_that_the_disk_does_not_take_is_blamed_on_no_worker_and_the_job_can_be_resumed() {
    let mut world = running();
    world.core.handle_checkpoint_stored(J1, 90);
    for worker in [1, 2] {
        world.end(worker, J1, 1, Outcome::Unstored { error: "`/disk` is full; free space there".to_owned() });
    }
    assert_eq!(world.state(J1), JobState::Failed);
    assert_eq!(
        world.reason(J1),
        "the coordinator's disk has not taken the last checkpoint: `/disk` is full; free space there; then resume the job, \
         which goes on from the checkpoint of step 90"
    );
    world.core.resume(J1, world.now_ms).unwrap();
    world.pump();
    world.inbox();
    world.find(Some(90));
    assert_eq!(starts(&mut world), [1, 2].map(|w| (w, Resumption::Checkpoint { step: 90 })));
}

#[test]
fn a_worker_that_only_the_coordinator_cannot_reach_disturbs_nobody_until_a_peer_misses_it() {
    let mut world = running();
    world.inbox();
    world.cut(2);
    world.pass(60_000);
    assert_eq!((world.state(J1), world.inbox()), (JobState::Running, Vec::new()), "its peers step with it");
    world.end(1, J1, 1, lost(1));
    world.pass(1_100);
    assert!(world.reason(J1).starts_with("needs 2 workers, 1 is free"), "{}", world.reason(J1));
}

#[test]
fn a_worker_whose_process_has_ended_is_lost_at_once_and_the_others_are_aborted() {
    let mut world = running();
    world.die(2);
    let stop = ToWorker::Stop { job: J1, generation: Generation(1), mode: StopMode::Abort };
    assert_eq!(world.inbox().last(), Some(&(WorkerId(1), stop)));
    world.end(1, J1, 1, stopped(3));
    assert_eq!(world.state(J1), JobState::Queued);
}

#[test]
fn a_worker_that_comes_back_with_its_work_is_adopted_undisturbed() {
    let mut world = running();
    world.inbox();
    world.cut(2);
    world.return_with(2, J1, 1, 1, 17);
    world.pass(60_000);
    assert_eq!(world.state(J1), JobState::Running);
    assert_eq!(world.generation(J1), Generation(1));
    assert_eq!(world.inbox(), []);
    assert_eq!(world.core.job(J1).unwrap().step, 17);
}

#[test]
fn a_worker_that_comes_back_without_its_work_is_lost_unless_its_report_follows() {
    let mut world = running();
    world.cut(1);
    world.connect(1);
    world.end(1, J1, 1, finished("a"));
    world.end(2, J1, 1, finished("a"));
    assert_eq!(world.state(J1), JobState::Finished);

    let mut world = running();
    world.cut(1);
    world.connect(1);
    world.pass(1_100);
    world.end(2, J1, 1, stopped(3));
    assert_eq!(world.generation(J1), Generation(2));
}

#[test]
fn a_killed_coordinator_finds_its_job_running_and_does_not_touch_it() {
    let world = running();
    let mut world = world.restart();
    assert_eq!(world.state(J1), JobState::Running);
    world.return_with(1, J1, 1, 0, 50);
    world.return_with(2, J1, 1, 1, 50);
    world.pass(60_000);
    assert_eq!((world.state(J1), world.generation(J1)), (JobState::Running, Generation(1)));
    assert_eq!(world.inbox(), []);
    world.end(1, J1, 1, finished("a"));
    world.end(2, J1, 1, finished("a"));
    assert_eq!(world.state(J1), JobState::Finished);
}

#[test]
fn after_a_restart_the_end_of_one_rank_shows_that_one_that_stays_away_is_lost() {
    let mut world = running().restart();
    world.return_with(1, J1, 1, 0, 50);
    world.pass(60_000);
    assert_eq!(world.inbox(), [], "the rank that is back steps, so the other one does");
    world.end(1, J1, 1, lost(1));
    world.pass(1_100);
    assert!(world.reason(J1).starts_with("needs 2 workers, 1 is free"), "{}", world.reason(J1));
}

#[test]
fn a_worker_that_died_while_the_coordinator_was_away_is_found_dead_by_its_closed_port() {
    let mut world = running_on(1, 1);
    world.listens(1, 7);
    let mut world = world.restart();
    world.enroll(1);
    world.connect(2);
    assert_eq!(world.core.absent(), [(WorkerId(1), ([10, 0, 0, 1], 7).into())]);
    world.pass(60_000);
    assert_eq!(world.generation(J1), Generation(1), "it may still be stepping");
    let told = world.core.unreachable(J1, world.now_ms).unwrap();
    assert!(told.contains("w1") && told.contains("after 3570 s at the latest"), "{told}");
    world.closed(1, 8);
    assert_eq!(world.state(J1), JobState::Running, "another process's port says nothing");
    world.closed(1, 7);
    world.find(Some(40));
    assert_eq!(starts(&mut world), [(2, Resumption::Checkpoint { step: 40 })]);
    assert_eq!(world.core.absent(), []);
}

#[test]
fn a_closed_port_says_nothing_of_a_worker_that_is_there() {
    let mut world = running_on(1, 1);
    world.listens(1, 7);
    world.closed(1, 7);
    assert_eq!((world.state(J1), world.generation(J1)), (JobState::Running, Generation(1)));
}

#[test]
fn messages_of_an_old_generation_are_ignored_and_counted() {
    let mut world = running();
    world.end(1, J1, 1, lost(1));
    world.end(2, J1, 1, stopped(0));
    world.find(None);
    assert_eq!(world.generation(J1), Generation(2));
    let before = world.core.stale_messages();
    let old = FromWorker::Ended { job: J1, generation: Generation(1), outcome: finished("x"), held: None };
    assert_eq!(world.core.handle_message(WorkerId(1), old, world.now_ms), Reception::Stale);
    assert_eq!(world.core.stale_messages(), before + 1);
    assert_eq!(world.state(J1), JobState::Running);
    assert!(!world.core.is_current(WorkerId(1), J1, Generation(1)));
    assert!(world.core.is_current(WorkerId(1), J1, Generation(2)));
}

#[test]
fn a_returning_worker_of_an_old_generation_is_told_to_abort() {
    let mut world = running();
    world.cut(2);
    world.end(1, J1, 1, lost(1));
    world.pass(1_100);
    world.inbox();
    world.return_with(2, J1, 1, 1, 9);
    let stop = ToWorker::Stop { job: J1, generation: Generation(1), mode: StopMode::Abort };
    assert_eq!(world.inbox(), [(WorkerId(2), stop)]);
    world.find(None);
    assert_eq!(world.state(J1), JobState::Queued, "it is not free before it has stopped");
    world.end(2, J1, 1, stopped(9));
    world.find(None);
    assert_eq!(world.state(J1), JobState::Running);
}

#[test]
fn worker_death_mid_step_heals_from_furthest_replica() {
    let mut world = running_on(4, 1);
    world.die(4);
    world.end_with(1, J1, 1, lost(3), Position::at(7));
    world.end_with(2, J1, 1, lost(3), Position { step: 7, phase: 1 });
    world.end_with(3, J1, 1, lost(3), Position { step: 7, phase: 1 });
    let resume = from_peers(7, 1, &[1, 2]);
    assert_eq!(starts(&mut world), [1, 2, 3].map(|w| (w, resume.clone())));
}

#[test]
fn a_checkpoint_beyond_what_is_kept_is_the_truth() {
    let mut world = running_on(2, 1);
    world.core.handle_checkpoint_stored(J1, 9);
    world.end_with(1, J1, 1, lost(1), Position::at(7));
    world.end(2, J1, 1, stopped(0));
    world.find(Some(9));
    assert_eq!(starts(&mut world), [1, 2].map(|w| (w, Resumption::Checkpoint { step: 9 })));
    // The newest checkpoint turns out to be damaged: what is kept is further than the older one.
    let mut world = running_on(2, 1);
    world.core.handle_checkpoint_stored(J1, 9);
    world.end_with(1, J1, 1, lost(1), Position::at(7));
    world.end(2, J1, 1, stopped(0));
    world.find(Some(5));
    let resume = from_peers(7, 0, &[0]);
    assert_eq!(starts(&mut world), [1, 2].map(|w| (w, resume.clone())));
}

#[test]
fn an_accused_worker_that_says_nothing_is_fenced_and_what_it_kept_is_of_no_use() {
    let mut world = running_on(3, 1);
    world.end_with(1, J1, 1, lost(2), Position::at(5));
    world.end_with(2, J1, 1, lost(2), Position::at(5));
    assert_eq!(starts(&mut world), [], "it gets a moment to say its own end");
    world.pass(600);
    let resume = from_peers(5, 0, &[0, 1]);
    assert_eq!(starts(&mut world), [1, 2].map(|w| (w, resume.clone())));
    // The zombie wakes up: its end is of the past, it drops its state and gets ready to join.
    world.end_with(3, J1, 1, stopped(6), Position::at(6));
    let told: Vec<_> = world.inbox();
    assert!(told.contains(&(WorkerId(3), ToWorker::Release { job: J1 })), "{told:?}");
    assert!(matches!(told.last(), Some((WorkerId(3), ToWorker::Follow(_)))), "{told:?}");
}

#[test]
fn no_generation_follows_one_of_which_nobody_is_known_to_have_ended() {
    let mut world = running_on(2, 1);
    world.enroll(1);
    world.connect(3);
    world.inbox();
    world.cut(1);
    world.cut(2);
    world.pass(3_600_000);
    assert_eq!((world.generation(J1), world.state(J1)), (Generation(1), JobState::Running));
    // The coordinator was cut off; they have been stepping all the time.
    world.return_with(1, J1, 1, 0, 70);
    world.return_with(2, J1, 1, 1, 70);
    assert_eq!((world.generation(J1), world.core.job(J1).unwrap().step), (Generation(1), 70));
    // This time they do not come back for longer than they may step without a coordinator.
    world.cut(1);
    world.cut(2);
    world.pass(3_600_000 + 30_000);
    world.find(Some(60));
    assert_eq!(
        (world.generation(J1), world.core.job(J1).unwrap().members.clone()),
        (Generation(2), vec![WorkerId(3)])
    );
}

#[test]
fn a_process_that_is_known_to_have_ended_lets_the_next_generation_start() {
    let mut world = running_on(2, 1);
    world.enroll(1);
    world.connect(3);
    world.cut(1);
    world.die(2);
    world.pass(1_100);
    world.find(Some(4));
    assert_eq!(world.core.job(J1).unwrap().members, [WorkerId(3)]);
}

#[test]
fn workers_that_kept_the_state_while_the_coordinator_was_away_go_on_from_it() {
    let mut world = running_on(3, 1).restart();
    for worker in [1, 2] {
        world.return_holding(worker, J1, 1, 33);
        world.end_with(worker, J1, 1, lost(2), Position::at(33));
    }
    // The third may still be on its way back.
    world.pass(5_100);
    let resume = from_peers(33, 0, &[0, 1]);
    assert_eq!(starts(&mut world), [1, 2].map(|w| (w, resume.clone())));
}

#[test]
fn a_job_whose_wires_keep_state_takes_newcomers_from_a_checkpoint() {
    let mut world = World::new();
    world.enroll(2);
    world.connect(1);
    world.submit(NewJob { state_in_memory: false, ..job(1, 8) });
    world.find(None);
    world.step(1, J1, 1, 3);
    world.inbox();
    world.connect(2);
    assert!(matches!(world.inbox()[..], [(WorkerId(1), ToWorker::Stop { mode: StopMode::Checkpoint, .. })]));
}

#[test]
fn a_job_that_waits_for_exactly_n_starts_with_n() {
    let mut world = World::new();
    world.enroll(3);
    (1..=2).for_each(|w| world.connect(w));
    let mut exact = job(1, 8);
    exact.wait_for = Some(3);
    world.submit(exact);
    assert_eq!(world.reason(J1), "needs 3 workers, 2 are free");
    world.core.set_wait_for(J1, Some(2), world.now_ms).unwrap();
    world.pump();
    world.find(None);
    assert_eq!(world.core.job(J1).unwrap().members.len(), 2);
}

/// Between the loss of its old work and the return of its other work it once counted as idle, and was started anew.
#[test]
fn a_worker_that_comes_back_with_other_work_is_started_only_when_that_has_ended() {
    let mut world = World::new();
    world.enroll(1);
    world.connect(1);
    world.submit(job(1, 1));
    world.find(None);
    world.submit(job(2, 2));
    world.inbox();
    world.return_with(1, JobId(2), 7, 0, 3);
    world.find(None);
    let generation = Generation(7);
    let abort = ToWorker::Stop { job: JobId(2), generation, mode: StopMode::Abort };
    assert_eq!(world.inbox(), [(WorkerId(1), abort)]);
    world.end(1, JobId(2), 7, stopped(3));
    world.find(None);
    assert_eq!(starts(&mut world), [(1, Resumption::Fresh)]);
}

/// An order of the first process, sent to the second one in the same worker's newer session, once made it step in a
/// generation that counted as over.
#[test]
fn an_order_decided_for_an_earlier_session_is_not_sent_in_a_later_one() {
    let mut world = World::new();
    world.enroll(1);
    world.connect(1);
    world.submit(job(1, 1));
    // While the store cannot be written, the order to start waits, and the worker's process is replaced.
    world.core.handle_checkpoint_found(J1, Generation(1), Ok(None), world.now_ms);
    world.connect(1);
    assert_eq!(world.inbox(), []);
    world.pass(1_100);
    world.find(None);
    assert_eq!(world.generation(J1), Generation(2));
    assert_eq!(starts(&mut world), [(1, Resumption::Fresh)]);
}

#[test]
fn numbers_of_jobs_and_workers_are_never_used_again() {
    let restored = Restored { last_job: JobId(7), last_worker: WorkerId(4), ..Restored::default() };
    let mut core = Core::new(Config::default(), restored, 0);
    assert_eq!(core.submit(job(1, 1), 0), JobId(8));
    assert_eq!(core.handle_enrolled("host".to_owned(), 0), WorkerId(5));
}
