//! Scenarios: workers that join a running job, and those that its others cannot reach.

use crate::scenarios::{J1, from_peers, lost, running, running_on, starts};
use crate::world::{World, job, stopped};
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{JobState, Position, StopMode, ToWorker};

#[test]
fn a_newcomer_follows_and_joins_at_a_boundary_when_it_is_ready() {
    let mut world = running_on(2, 1);
    world.enroll(1);
    world.connect(3);
    let told = world.inbox();
    let [(WorkerId(3), ToWorker::Follow(following))] = &told[..] else { panic!("{told:?}") };
    assert_eq!(following.sources.iter().map(|p| p.worker.0).collect::<Vec<_>>(), [1, 2]);
    world.following(3, J1, 1, 20);
    let stop = ToWorker::Stop { job: J1, generation: Generation(1), mode: StopMode::Boundary };
    assert_eq!(world.inbox(), [(WorkerId(1), stop.clone()), (WorkerId(2), stop)]);
    world.end_with(1, J1, 1, stopped(21), Position::at(21));
    world.end_with(2, J1, 1, stopped(21), Position::at(21));
    let resume = from_peers(21, 0, &[0, 1]);
    assert_eq!(starts(&mut world), [1, 2, 3].map(|w| (w, resume.clone())));
}

#[test]
fn a_queued_job_gets_the_workers_that_were_about_to_join_another() {
    let mut world = running_on(2, 1);
    world.enroll(2);
    world.connect(3);
    world.connect(4);
    world.inbox();
    world.submit(job(2, 2));
    world.find(None);
    assert_eq!(world.core.job(JobId(2)).unwrap().members, [WorkerId(3), WorkerId(4)]);
}

#[test]
fn a_death_while_somebody_follows_makes_it_follow_the_next_generation() {
    let mut world = running_on(3, 1);
    world.enroll(1);
    world.connect(4);
    world.inbox();
    world.die(3);
    world.end_with(1, J1, 1, lost(2), Position::at(5));
    world.end_with(2, J1, 1, lost(2), Position::at(5));
    let told = world.inbox();
    let follows = told.iter().filter(|(w, m)| {
        matches!(m, ToWorker::Follow(f) if *w == WorkerId(4) && f.generation == Generation(2) && f.sources.len() == 2)
    });
    assert_eq!(follows.count(), 1, "{told:?}");
    world.following(4, J1, 1, 5);
    assert_eq!(world.inbox(), [], "that was the old generation");
    world.following(4, J1, 2, 6);
    assert_eq!(world.inbox().len(), 2);
}

#[test]
fn a_worker_that_its_peers_cannot_reach_is_left_out_for_a_while() {
    let mut world = running_on(3, 1);
    world.end_with(1, J1, 1, lost(2), Position::at(5));
    world.end_with(2, J1, 1, lost(2), Position::at(5));
    world.end_with(3, J1, 1, lost(0), Position::at(5));
    let resume = from_peers(5, 0, &[0, 1]);
    let told = world.inbox();
    assert!(told.contains(&(WorkerId(3), ToWorker::Release { job: J1 })), "{told:?}");
    assert!(told.iter().all(|(w, m)| *w != WorkerId(3) || !matches!(m, ToWorker::Follow(_))), "{told:?}");
    let started = told.into_iter().filter_map(|(w, m)| match m {
        ToWorker::Start(a) => Some((w.0, a.resume)),
        _ => None,
    });
    assert_eq!(started.collect::<Vec<_>>(), [1, 2].map(|w| (w, resume.clone())));
    world.pass(10_100);
    assert!(matches!(world.inbox()[..], [(WorkerId(3), ToWorker::Follow(_))]), "then it is tried again");
}

/// It was taken in again every 10 s, and the others stood still for a time-out each time.
#[test]
fn a_worker_that_its_peers_cannot_reach_is_tried_ever_more_seldom_until_it_has_stepped_for_a_while() {
    let mut world = running_on(3, 1);
    let cut_off = |world: &mut World, generation: u64| {
        for (worker, culprit) in [(1, 2), (2, 2), (3, 0)] {
            world.end_with(worker, J1, generation, lost(culprit), Position::at(5));
        }
        world.inbox();
    };
    // It is taken in again after so many seconds, and not before; the generation in which it is.
    let taken_in_after = |world: &mut World, seconds: u64, generation: u64| {
        world.pass(1000 * seconds - 100);
        assert_eq!(world.inbox(), [], "not before {seconds} s");
        world.pass(200);
        assert!(matches!(world.inbox()[..], [(WorkerId(3), ToWorker::Follow(_))]), "after {seconds} s");
        world.following(3, J1, generation, 5);
        for worker in [1, 2] {
            world.end_with(worker, J1, generation, stopped(5), Position::at(5));
        }
        assert_eq!(starts(world).len(), 3);
        generation + 1
    };
    let mut generation = 1;
    for seconds in [10, 20, 40] {
        cut_off(&mut world, generation);
        generation = taken_in_after(&mut world, seconds, generation + 1);
    }
    world.step(1, J1, generation, 6);
    world.pass(60_000);
    cut_off(&mut world, generation);
    generation = taken_in_after(&mut world, 10, generation + 1);
    // A few steps are no proof.
    world.step(1, J1, generation, 7);
    world.pass(59_000);
    cut_off(&mut world, generation);
    taken_in_after(&mut world, 20, generation + 1);
}

#[test]
fn a_job_that_lacks_workers_takes_one_back_that_its_peers_could_not_reach_after_the_first_time() {
    let mut world = running();
    for generation in 1..=4 {
        for worker in [1, 2] {
            let outcome = lost(2 - worker as u32);
            world.end_with(worker, J1, generation, outcome, Position::at(5));
        }
        world.pass(9_900);
        assert_eq!(world.state(J1), JobState::Queued, "{}", world.reason(J1));
        world.pass(200);
        assert_eq!(world.generation(J1), Generation(generation + 1), "{}", world.reason(J1));
    }
}
