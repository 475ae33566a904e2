//! Misfortunes on top of each other: what is lost while something else is under way.

use crate::scenarios::{J1, from_peers, lost, running, running_on, starts};
use crate::world::stopped;
use lockstep_common::ids::{Generation, JobId, Rank, WorkerId};
use lockstep_common::wire::{JobState, Outcome, Position, Resumption, ToWorker};
use lockstep_core::CommandError;

/// The lease of the tests' jobs, the margin, and a moment.
const LEASE_MS: u64 = 3_600_000 + 30_000 + 1_000;

#[test]
fn members_that_vanish_in_a_planned_ending_are_not_waited_for_longer_than_their_lease() {
    let mut world = running_on(1, 1);
    world.step(1, J1, 1, 40);
    world.enroll(1);
    world.say(1, lockstep_common::wire::FromWorker::Leaving);
    world.pass(200);
    let told = world.inbox();
    assert!(matches!(told[..], [(WorkerId(1), ToWorker::Stop { .. })]), "{told:?}");
    // The host is switched off before the checkpoint is there: nobody says that the port is closed.
    world.cut(1);
    world.connect(2);
    world.pass(60_000);
    assert_eq!(world.generation(J1), Generation(1), "it may still be stepping");
    assert!(world.core.unreachable(J1, world.now_ms).is_some_and(|line| line.contains("w1")));
    world.pass(LEASE_MS);
    world.find(Some(30));
    assert_eq!(starts(&mut world), [(2, Resumption::Checkpoint { step: 30 })]);
}

#[test]
fn a_member_cut_off_from_its_coordinator_in_a_planned_ending_ends_it_with_the_others() {
    let mut world = running_on(2, 1);
    world.step(1, J1, 1, 7);
    world.say(2, lockstep_common::wire::FromWorker::Leaving);
    world.pass(200);
    world.inbox();
    world.cut(1);
    assert_eq!(world.inbox(), [], "nobody is told to abort");
    world.end_with(2, J1, 1, stopped(8), Position::at(8));
    world.return_holding(1, J1, 1, 8);
    world.end_with(1, J1, 1, stopped(8), Position::at(8));
    world.pass(1_100);
    assert_eq!(starts(&mut world), [(1, from_peers(8, 0, &[0]))]);
}

#[test]
fn a_job_that_went_back_to_a_checkpoint_and_gets_on_from_there_gets_on() {
    let mut world = running();
    world.step(1, J1, 1, 190);
    for worker in [1, 2] {
        world.die(worker);
        world.connect(worker);
    }
    world.pass(1_100);
    world.find(Some(100));
    // Eleven failures over more than two minutes, none of them beyond step 190, each beyond the last one.
    for generation in 2..=12 {
        world.step(1, J1, generation, 100 + 5 * generation);
        world.end_with(1, J1, generation, lost(1), Position::at(100 + 5 * generation));
        world.end_with(2, J1, generation, lost(0), Position::at(100 + 5 * generation));
        // One of the two is left out for a while, as they cannot reach each other.
        world.pass(15_000);
        world.find(Some(100));
        assert_eq!(world.state(J1), JobState::Running, "generation {generation}: {}", world.reason(J1));
    }
}

#[test]
fn a_failed_job_can_be_resumed_and_a_finished_one_cannot() {
    let mut world = running();
    world.end(1, J1, 1, Outcome::Failed { error: "its disk is full".to_owned() });
    world.end(2, J1, 1, stopped(0));
    assert_eq!(world.state(J1), JobState::Failed);
    world.inbox();
    world.core.resume(J1, world.now_ms).unwrap();
    world.pump();
    world.find(Some(20));
    assert_eq!(starts(&mut world).len(), 2);
    for worker in [1, 2] {
        world.end(worker, J1, 2, crate::world::finished("digest"));
    }
    assert_eq!(world.state(J1), JobState::Finished);
    assert!(matches!(world.core.resume(J1, world.now_ms), Err(CommandError::NotNow { .. })));
}

#[test]
fn a_report_of_an_old_membership_costs_a_member_of_the_new_one_nothing() {
    let mut world = running();
    for worker in [1, 2] {
        world.end_with(worker, J1, 1, lost(1), Position::at(5));
    }
    world.find(None);
    assert_eq!(world.generation(J1), Generation(2));
    world.inbox();
    // It was not heard to have said this.
    world.end_with(1, J1, 1, lost(1), Position::at(5));
    assert_eq!(world.inbox(), [], "what it has of now is not to be dropped");
}

#[test]
fn a_worker_that_has_much_to_tell_is_heard_to_the_end() {
    let mut world = running_on(2, 1).restart();
    for worker in [1, 2] {
        world.return_holding(worker, J1, 1, 900);
    }
    for step in [300, 600, 890] {
        world.pass(800);
        world.step(1, J1, 1, step);
        world.step(2, J1, 1, step);
    }
    for worker in [1, 2] {
        world.end_with(worker, J1, 1, stopped(900), Position::at(900));
    }
    assert!(
        !world.trace.iter().any(|line| line.contains("came back without its work")),
        "{:#?}",
        world.trace
    );
    assert_eq!(starts(&mut world), [1, 2].map(|w| (w, from_peers(900, 0, &[0, 1]))));
}

#[test]
fn what_is_known_of_an_older_process_says_nothing_of_the_one_that_is_there() {
    let mut world = running_on(1, 1);
    world.listens(1, 7);
    world.return_with(1, J1, 1, 0, 3);
    let mut world = world.restart();
    assert_eq!(world.core.absent(), [], "port 7 may have been that of the process before");
    world.closed(1, 7);
    assert_eq!(world.generation(J1), Generation(1));
    assert_eq!(world.state(J1), JobState::Running);
}

#[test]
fn a_cancelled_worker_that_comes_back_deaf_after_a_restart_is_dismissed() {
    let mut world = running();
    world.core.cancel(J1, world.now_ms).unwrap();
    world.pump();
    let mut world = world.restart();
    world.return_with(1, J1, 1, 0, 3);
    world.return_with(2, J1, 1, 1, 3);
    world.end(2, J1, 1, stopped(3));
    world.pass(25_000);
    assert_eq!(world.state(J1), JobState::Cancelled);
    let told = world.inbox();
    assert!(
        told.iter().any(|(worker, message)| worker.0 == 1 && matches!(message, ToWorker::Dismiss { .. })),
        "{told:?}"
    );
}

#[test]
fn a_pause_that_loses_a_rank_keeps_what_the_others_have() {
    let mut world = running_on(2, 1);
    world.step(1, J1, 1, 50);
    world.core.pause(J1, world.now_ms).unwrap();
    world.pump();
    world.die(2);
    world.inbox();
    world.end_with(1, J1, 1, lost(1), Position::at(51));
    assert_eq!(world.state(J1), JobState::Paused);
    assert!(world.reason(J1).contains("after step 51, with no checkpoint"), "{}", world.reason(J1));
    assert_eq!(world.inbox(), [], "nothing is dropped");
    world.core.resume(J1, world.now_ms).unwrap();
    world.pump();
    assert_eq!(starts(&mut world), [(1, from_peers(51, 0, &[0]))]);
}

#[test]
fn states_that_were_found_to_differ_are_not_gone_on_from() {
    let mut world = running_on(3, 1);
    let mismatch =
        Outcome::Mismatch { error: "rank 2 holds another state".to_owned(), culprit: Some(Rank(2)) };
    world.end(1, J1, 1, mismatch);
    world.end_with(2, J1, 1, lost(0), Position::at(7));
    world.end_with(3, J1, 1, lost(0), Position::at(7));
    world.find(Some(4));
    assert_eq!(starts(&mut world), [1, 2, 3].map(|w| (w, Resumption::Checkpoint { step: 4 })));
}

#[test]
fn a_cancelled_job_that_waited_leaves_nothing_in_memory() {
    let mut world = running();
    world.end_with(1, J1, 1, lost(1), Position::at(5));
    world.die(2);
    world.pass(1_100);
    assert_eq!(world.state(J1), JobState::Queued);
    world.inbox();
    world.core.cancel(J1, world.now_ms).unwrap();
    world.pump();
    assert_eq!(world.inbox(), [(WorkerId(1), ToWorker::Release { job: J1 })]);
}

#[test]
fn one_that_comes_back_late_and_says_how_it_ended_still_joins() {
    let mut world = running_on(3, 1);
    world.cut(3);
    for worker in [1, 2] {
        world.end_with(worker, J1, 1, lost(2), Position::at(9));
    }
    world.pass(6_000);
    assert_eq!(world.generation(J1), Generation(2));
    world.pass(10_000);
    world.inbox();
    world.return_holding(3, J1, 1, 9);
    let told = world.inbox();
    assert!(matches!(told.last(), Some((WorkerId(3), ToWorker::Follow(_)))), "{told:?}");
    // What it has to say of then comes after that.
    world.end_with(3, J1, 1, lost(0), Position::at(9));
    assert_eq!(world.inbox(), [], "it is not told to drop what it follows");
    world.following(3, J1, 2, 12);
    world.pass(1_100);
    assert!(world.trace.iter().any(|line| line.contains("w3 is ready to join")), "{:#?}", world.trace);
}

#[test]
fn nobody_is_told_to_follow_members_that_have_not_come_back_yet() {
    let mut world = running_on(2, 1).restart();
    world.enroll(1);
    world.connect(3);
    assert_eq!(world.inbox(), []);
    world.return_with(1, J1, 1, 0, 40);
    let told = world.inbox();
    assert!(matches!(told[..], [(WorkerId(3), ToWorker::Follow(_))]), "{told:?}");
}

#[test]
fn survivors_have_the_time_to_come_back_after_a_restart() {
    let mut world = running_on(3, 1).restart();
    world.connect(1);
    world.pass(1_100); // It came back without its work: the membership is over.
    world.pass(2_000);
    assert_eq!(world.generation(J1), Generation(1), "the others are waited for");
    for worker in [2, 3] {
        world.return_holding(worker, J1, 1, 94);
        world.end_with(worker, J1, 1, lost(0), Position::at(94));
    }
    world.pass(1_100);
    assert_eq!(starts(&mut world), [2, 3].map(|w| (w, from_peers(94, 0, &[0, 1]))), "w1 follows");
}

#[test]
fn a_membership_that_was_written_down_and_never_told_costs_nothing() {
    let mut world = running_on(3, 1);
    world.die(1);
    for worker in [2, 3] {
        world.end_with(worker, J1, 1, lost(0), Position::at(58));
    }
    assert_eq!(world.generation(J1), Generation(2));
    // Killed before anybody heard of it, and again; what the members have to say, they say again.
    for _ in 0..3 {
        world = world.restart();
        for worker in [2, 3] {
            world.return_holding(worker, J1, 1, 58);
            world.end_with(worker, J1, 1, lost(0), Position::at(58));
        }
        assert_eq!(world.inbox(), [], "nothing is dropped");
        world.pass(1_100);
        assert_eq!(starts(&mut world), [2, 3].map(|w| (w, from_peers(58, 0, &[0, 1]))));
    }
    // What one that was no member of it keeps is of the past.
    world.return_holding(1, J1, 1, 58);
    assert!(world.inbox().contains(&(WorkerId(1), ToWorker::Release { job: J1 })));
}

#[test]
fn what_a_worker_says_of_another_job_does_not_make_the_first_one_wait() {
    let mut world = running_on(1, 1).restart();
    world.connect(1);
    for _ in 0..5 {
        world.pass(400);
        world.step(1, JobId(2), 1, 1);
    }
    assert!(world.trace.iter().any(|line| line.contains("came back without its work")), "{:#?}", world.trace);
}

#[test]
fn members_that_vanish_in_an_abort_that_nobody_confirms_are_not_waited_for_longer_than_their_lease() {
    let mut world = running_on(2, 1);
    world.end_with(2, J1, 1, lost(0), Position::at(5));
    // The record says that the membership is to end; the one who has ended is forgotten with the coordinator.
    let mut world = world.restart();
    world.return_with(1, J1, 1, 0, 5);
    world.cut(1);
    world.enroll(1);
    world.connect(3);
    world.pass(60_000);
    assert_eq!(world.generation(J1), Generation(1), "both may be stepping");
    world.pass(LEASE_MS);
    world.find(Some(4));
    assert_eq!(starts(&mut world), [(3, Resumption::Checkpoint { step: 4 })]);
}
