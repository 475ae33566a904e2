use super::*;
use crate::buffer::Pool;
use crate::{CollectiveError, Group, Numbers, Pending, ReduceOp, TagKind};
use lockstep_common::ids::Generation;
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;
use std::time::Duration;

fn groups(ranks: u32, timeout: Duration) -> Vec<Group> {
    let groups = Group::in_process(&Placement::even(ranks, ranks), Reduction::Exact, timeout).unwrap();
    groups.into_iter().map(|group| group.direct_up_to(1)).collect()
}

fn tag() -> Tag {
    Tag::new(41, 1, TagKind::Gradient).index(3)
}

fn start(group: &Group) -> Pending<Numbers<f32>> {
    group.all_reduce(tag(), vec![vec![1f32, 2.0]], ReduceOp::Sum).unwrap()
}

/// In every world, what a rank sends in a round is what its receiver expects, and after all rounds everyone has all.
#[test]
fn rounds_bring_every_part_to_every_rank_once() {
    for world in 1..40 {
        for rank in 0..world {
            let mut seen = vec![0; world];
            seen[rank] += 1;
            for round in 0..rounds(world) {
                let first = 1 << round;
                (first..first + parts(world, round)).for_each(|d| seen[(rank + d) % world] += 1);
            }
            assert_eq!(seen, vec![1; world], "rank {rank} of {world}");
        }
        assert_eq!(rounds(world), (world as f64).log2().ceil() as usize);
    }
}

#[test]
fn each_rank_sends_one_message_a_round() {
    for (world, messages) in [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (11, 4)] {
        let groups = groups(world, Duration::from_secs(20));
        let pending: Vec<_> = groups.iter().map(start).collect();
        for (group, pending) in groups.iter().zip(pending) {
            assert_eq!(*pending.wait().unwrap(), [world as f32, 2.0 * world as f32]);
            let payload = 8 * (u64::from(world) - 1);
            let headers = messages * crate::frame::HEADER_LEN as u64;
            assert_eq!(group.stats().bytes_sent, headers + payload, "{} of {world}", group.rank());
        }
    }
}

#[test]
fn the_largest_message_carries_the_heaviest_run_of_ranks() {
    assert_eq!(largest_message(&[5]), 0);
    assert_eq!(largest_message(&[1, 3]), 3);
    // Rounds of 1, 2 and 1 parts.
    assert_eq!(largest_message(&[1, 3, 1, 1, 4]), 5);
    assert_eq!(largest_message(&[1; 64]), 32);
    assert_eq!(largest_message(&[1; 100]), 36);
    assert_eq!(largest_message(&[1; 96]), 32);
}

#[test]
fn what_does_not_fit_a_frame_goes_directly() {
    for (channels, directly) in [(16_000, false), (17_000, true)] {
        let groups = groups(8, Duration::from_secs(20));
        let moments = vec![1f64; 2 * channels + 1];
        let start = |group: &Group| group.all_reduce(tag(), vec![moments.clone()], ReduceOp::Moments);
        let pending: Vec<_> = groups.iter().map(|group| start(group).unwrap()).collect();
        pending.iter().for_each(|pending| drop(pending.wait().unwrap()));
        let payload = 7 * (2 * channels as u64 + 1) * 8;
        let frames = (groups[0].stats().bytes_sent - payload) / crate::frame::HEADER_LEN as u64;
        assert_eq!(frames > 3, directly, "{frames} frames");
    }
}

/// Rank 0 of five, whose second round is due from rank 2: two parts of 8 bytes.
#[test]
fn dishonest_frames_end_the_group_and_name_the_sender() {
    let honest = Header {
        generation: Generation(0),
        source: Rank(2),
        tag: tag(),
        signature: 1,
        stage: Stage::Contribution,
        offset: 1,
        total: 40,
        payload_len: 16,
    };
    let cases: [(Header, &str); 7] = [
        (Header { signature: 2, ..honest }, "another operation or element type"),
        (Header { total: 80, ..honest }, "all parts have 80 bytes, expected 40"),
        (Header { stage: Stage::Result, ..honest }, "a result piece"),
        (Header { offset: 0, ..honest }, "round 0 where it has round 1"),
        (Header { payload_len: 8, ..honest }, "8 bytes in round 1, expected 16"),
        (Header { source: Rank(3), ..honest }, "from a rank that sends this one none"),
        (honest, "round 1 a second time"),
    ];
    for (header, expected) in cases {
        let groups = groups(5, Duration::from_secs(20));
        let pending = start(&groups[0]);
        let deliver = |header: Header| {
            let payload = Pool::default().take(header.payload_len);
            groups[0].engine().handle_frame(header.source, header, payload);
        };
        if header == honest {
            deliver(honest);
            assert_eq!(groups[0].failure(), None);
        }
        deliver(header);
        let error = pending.wait().unwrap_err();
        assert_eq!(error.culprit(), Some(header.source), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// The sum fits one frame on all ranks but one, which has a longer vector under the same tag.
#[test]
fn another_length_is_a_mismatch() {
    for other in [3, 40_000] {
        let groups = groups(3, Duration::from_secs(20));
        let pending: Vec<_> = groups[..2].iter().map(start).collect();
        let _other = groups[2].all_reduce(tag(), vec![vec![1f32; other]], ReduceOp::Sum).unwrap();
        for pending in pending {
            let error = pending.wait().unwrap_err();
            assert!(error.to_string().contains("disagrees about"), "{error}");
        }
    }
}

fn check_culprit(groups: &[Group], silent: Rank, late: bool) {
    let waiting: Vec<_> = groups.iter().filter(|group| group.rank() != silent).collect();
    let pending: Vec<_> = waiting.iter().map(|group| start(group)).collect();
    if late {
        // As a bucket of gradients that is waited for after the rest of the backward pass.
        while groups.iter().any(|g| g.rank() != silent && g.oldest_wait() < Some(g.timeout())) {
            std::thread::yield_now();
        }
    }
    let errors = std::thread::scope(|scope| {
        let waiters: Vec<_> = pending.iter().map(|pending| scope.spawn(|| pending.wait())).collect();
        waiters.into_iter().map(|waiter| waiter.join().unwrap().unwrap_err()).collect::<Vec<_>>()
    });
    assert!(errors.iter().all(|error| error.culprit() == Some(silent)), "{silent}: {errors:?}");
    let text = format!("{silent} has not entered gradient bucket 3 of step 41, phase 1 after");
    assert!(errors.iter().any(|error| error.to_string().starts_with(&text)), "{errors:?}");
    assert!(errors.iter().any(|error| matches!(error, CollectiveError::TimedOut { .. })));
}

/// Most ranks wait for one that waits for another; all name the one at the end.
#[test]
fn a_silent_rank_is_named_by_all() {
    // The last quarter is for asking who waits for whom.
    let limit = Duration::from_secs(2);
    std::thread::scope(|scope| {
        for (silent, late) in [(0, false), (3, false), (6, false), (3, true)] {
            scope.spawn(move || check_culprit(&groups(7, limit), Rank(silent), late));
        }
    });
}

#[test]
fn a_rank_that_leaves_without_its_part_is_named() {
    let mut groups = groups(7, Duration::from_secs(20));
    drop(groups.remove(4));
    let barrier = Tag::new(42, 0, TagKind::Barrier);
    let errors = groups.iter().map(|group| match group.barrier(barrier) {
        Ok(barrier) => barrier.wait().unwrap_err(),
        Err(error) => error,
    });
    errors.for_each(|error| assert_eq!(error.culprit(), Some(Rank(4)), "{error}"));
}

#[test]
fn a_barrier_holds_until_the_last_rank_is_there() {
    for world in [2, 3, 7, 8] {
        let groups = groups(world, Duration::from_secs(20));
        let barrier = Tag::new(42, 0, TagKind::Barrier);
        let waiting: Vec<_> = groups[1..].iter().map(|group| group.barrier(barrier).unwrap()).collect();
        // What the others can do without rank 0 has been done when everybody's next collective is complete.
        let next = Tag::new(42, 1, TagKind::Barrier);
        let passed: Vec<_> = groups.iter().map(|group| group.all_gather(next, vec![1]).unwrap()).collect();
        passed.iter().for_each(|pending| drop(pending.wait().unwrap()));
        assert!(waiting.iter().all(|pending| !pending.is_ready()));
        groups[0].barrier(barrier).unwrap().wait().unwrap();
        waiting.iter().for_each(|pending| drop(pending.wait().unwrap()));
    }
}
