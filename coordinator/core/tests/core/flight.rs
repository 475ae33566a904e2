//! What the core makes of where ranks are: on which host, and in which collective.

use crate::world::{World, job, stopped};
use lockstep_common::ids::{JobId, Rank, WorkerId};
use lockstep_common::wire::{Assignment, FlightReport, InFlight, Missing, Outcome, ToWorker};

const J1: JobId = JobId(1);
const BUCKET: &str = "gradient bucket 3 of step 41, phase 0";

fn waits(waits_ms: u64, missing: u32) -> FlightReport {
    let missing = vec![Missing { rank: Rank(missing), entered: false }];
    let signature = "sum of f32".to_owned();
    let waits = InFlight { name: BUCKET.to_owned(), signature, bytes: 8, waits_ms, missing };
    FlightReport { in_flight: vec![waits], in_flight_count: 1, ..FlightReport::default() }
}

fn starts(world: &mut World) -> Vec<(u64, Assignment)> {
    let start = |(worker, message): (WorkerId, ToWorker)| match message {
        ToWorker::Start(assignment) => Some((worker.0, *assignment)),
        _ => None,
    };
    world.inbox().into_iter().filter_map(start).collect()
}

#[test]
fn ranks_of_one_host_are_neighbours_and_each_is_told_the_addresses_that_it_can_reach() {
    let mut world = World::new();
    world.enroll(5);
    let hosts = [[10, 0, 0, 1], [10, 0, 0, 2], [10, 0, 0, 1], [10, 0, 0, 2]];
    (1..).zip(hosts).for_each(|(worker, ip)| world.connect_from(worker, ip));
    world.connect(5); // From a host that cannot be told.
    world.submit(job(5, 5));
    world.find(None);
    let starts = starts(&mut world);
    let order: Vec<_> = starts.iter().map(|(worker, assignment)| (*worker, assignment.rank.0)).collect();
    assert_eq!(order, [(1, 0), (3, 1), (2, 2), (4, 3), (5, 4)]);
    let peers = &starts[0].1.peers;
    let reached: Vec<Vec<String>> =
        peers.iter().map(|p| p.addresses.iter().map(ToString::to_string).collect()).collect();
    let (one, two) = (vec!["10.0.0.1:7".to_owned()], vec!["10.0.0.2:7".to_owned()]);
    assert_eq!(reached, [one.clone(), one, two.clone(), two, vec![]]);
    assert!(peers[0].host_key.is_some() && peers[0].host_key == peers[1].host_key);
    assert!(peers[0].host_key != peers[2].host_key && peers[4].host_key.is_none());
    let line = "log j1 rank 2 (w2 on host2) at 10.0.0.2:7 (eth0, host shared with rank 3, subnet shared with ranks 0, 1, \
                no subnet shared with rank 4)";
    assert!(world.trace.iter().any(|l| l == line), "{:#?}", world.trace);
}

#[test]
fn a_wait_is_shown_and_logged_and_stays_visible_after_the_failure_until_the_job_steps() {
    let mut world = World::new();
    world.enroll(3);
    (1..=3).for_each(|worker| world.connect(worker));
    world.submit(job(3, 3));
    world.find(None);
    assert_eq!(world.core.flight(J1, world.now_ms), None);
    world.fly(1, J1, 1, waits(1_200, 2));
    world.fly(2, J1, 1, waits(1_100, 2));
    let shown = |world: &World| world.core.flight(J1, world.now_ms).map(|f| (f.generation.0, f.waiting));
    let (_, waiting) = shown(&world).unwrap();
    assert!(waiting[0].starts_with("rank 2 (w3 on host3) has not entered"), "{waiting:?}");
    let logged = |world: &World| world.trace.iter().filter(|l| l.contains("waits: rank 2")).count();
    world.pass(3_000);
    assert_eq!(logged(&world), 0);
    world.pass(1_000);
    world.pass(1_000);
    assert_eq!(logged(&world), 1, "{:#?}", world.trace);

    let failure = Some("rank 2 has not entered it after 7.0 s".to_owned());
    for worker in [1, 2] {
        world.fly(worker, J1, 1, FlightReport { failure: failure.clone(), ..waits(7_000, 2) });
        let error = "rank 2 has not entered it".to_owned();
        world.end(worker, J1, 1, Outcome::Lost { error, culprit: Some(Rank(2)) });
    }
    world.end(3, J1, 1, stopped(0));
    let kept = world.core.flight(J1, world.now_ms).unwrap();
    assert_eq!((kept.generation.0, &kept.failure), (1, &failure));
    assert!(kept.waiting[0].contains("others wait 7 s"), "{:?}", kept.waiting);
    world.pass(60_000);
    world.find(None);
    assert_eq!(world.generation(J1).0, 2);
    world.fly(1, J1, 2, FlightReport::default());
    assert_eq!(world.core.flight(J1, world.now_ms), Some(kept));
    // A report of the old generation is of no interest any more.
    world.fly(2, J1, 1, waits(9_000, 0));
    assert_eq!(shown(&world).unwrap().0, 1);
    world.step(1, J1, 2, 1);
    assert_eq!(shown(&world), Some((2, vec![])));
}
