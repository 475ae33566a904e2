//! Ranks that share memory, all of them or host by host: the bits of a reduction do not depend on it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use lockstep_collectives::formats::{Block8, bf16, f16};
use lockstep_collectives::{CollectiveError, Element, Group, ReduceOp, Tag, TagKind};
use lockstep_common::ids::Rank;
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;
use lockstep_common::rng::Stream;
use proptest::prelude::*;
use std::time::Duration;
use support::{Bits, Draw, assert_same, expected, in_ranks, leaves_of, placement_strategy, reference};

const TIMEOUT: Duration = Duration::from_secs(20);

fn gradient(step: u64) -> Tag {
    Tag::new(step, 0, TagKind::Gradient)
}

/// Up to three hosts, numbered in order of their first ranks; a host's ranks need not be neighbours.
fn hosts_of(ranks: u32, seed: u64) -> Vec<usize> {
    let mut stream = Stream::new(seed, "hosts", &[]);
    let mut seen = vec![];
    (0..ranks)
        .map(|_| {
            let host = stream.below(3);
            let known = seen.iter().position(|other| *other == host);
            known.unwrap_or_else(|| {
                seen.push(host);
                seen.len() - 1
            })
        })
        .collect()
}

fn check<T: Draw + Element + Bits>(
    placement: &Placement,
    hosts: &[usize],
    len: usize,
    seed: u64,
    op: ReduceOp,
) {
    let leaves: Vec<Vec<T>> = (0..placement.shards()).map(|s| T::leaf(seed, s, len, op)).collect();
    let expected = expected(&leaves, op);
    let groups = Group::on_hosts(placement, hosts, Reduction::Exact, TIMEOUT).unwrap();
    in_ranks(&groups, |group| {
        let all = group.all_reduce(gradient(1), leaves_of(group, &leaves), op).unwrap();
        if op != ReduceOp::Moments {
            let part = group.reduce_scatter(gradient(2), leaves_of(group, &leaves), op).unwrap();
            assert_same(&part.wait().unwrap(), &expected[group.chunk(len)]);
        }
        assert_same(&all.wait().unwrap(), &expected);
    });
}

/// Lengths on both sides of where memory begins to be shared (16 KiB), of where hosts send chunks (64 KiB), and odd ones.
fn lengths() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => 0usize..40,
        2 => 4_090usize..4_100,
        2 => 16_380usize..16_500,
        1 => 100_000usize..150_000,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn sums_equal_the_reference_tree_on_any_hosts(
        placement in placement_strategy(12), one_host: bool, len in lengths(), seed: u64, dtype in 0..7, average: bool,
    ) {
        let ranks = placement.world_size();
        let hosts = if one_host { vec![0; ranks as usize] } else { hosts_of(ranks, seed) };
        let op = if average { ReduceOp::Average } else { ReduceOp::Sum };
        match dtype {
            0 => check::<f32>(&placement, &hosts, len, seed, op),
            1 => check::<f64>(&placement, &hosts, len, seed, op),
            2 => check::<bf16>(&placement, &hosts, len, seed, op),
            3 => check::<f16>(&placement, &hosts, len, seed, op),
            4 => check::<Block8>(&placement, &hosts, len / 16, seed, op),
            5 => check::<i64>(&placement, &hosts, len, seed, ReduceOp::Sum),
            _ => check::<f64>(&placement, &hosts, 2 * len + 1, seed, ReduceOp::Moments),
        }
    }

    #[test]
    fn fast_sums_are_the_same_bits_on_all_ranks_of_any_hosts_and_close_to_exact(
        placement in placement_strategy(9), one_host: bool, len in lengths(), seed: u64,
    ) {
        let ranks = placement.world_size();
        let hosts = if one_host { vec![0; ranks as usize] } else { hosts_of(ranks, seed) };
        let leaf = |s: u32| -> Vec<f64> {
            let mut stream = Stream::new(seed, "fast", &[u64::from(s)]);
            (0..len).map(|_| stream.uniform_in(1.0, 2.0)).collect()
        };
        let leaves: Vec<_> = (0..placement.shards()).map(leaf).collect();
        let groups = Group::on_hosts(&placement, &hosts, Reduction::Fast, TIMEOUT).unwrap();
        let results = in_ranks(&groups, |group| {
            group.all_reduce(gradient(1), leaves_of(group, &leaves), ReduceOp::Sum).unwrap().wait().unwrap()
        });
        for result in &results {
            assert_same(result, &results[0]);
        }
        for (sum, exact) in results[0].iter().zip(reference(&leaves, ReduceOp::Sum)) {
            prop_assert!((sum - exact).abs() <= 1e-14 * exact, "{} instead of {}", sum, exact);
        }
    }
}

/// Three threads per rank, each with its own order of the same collectives, small and large, with blobs in between.
#[test]
fn a_thousand_collectives_in_random_interleaving_keep_apart() {
    const THREADS: u16 = 3;
    const EACH: u32 = 340;
    let placement = Placement::even(5, 4);
    for hosts in [[0, 0, 0, 0], [0, 0, 1, 1]] {
        let groups = Group::on_hosts(&placement, &hosts, Reduction::Exact, TIMEOUT).unwrap();
        in_ranks(&groups, |group| {
            std::thread::scope(|scope| {
                for thread in 0..THREADS {
                    scope.spawn(move || interleave(group, thread, EACH));
                }
            });
        });
    }
}

fn interleave(group: &Group, thread: u16, each: u32) {
    let tag = |index| Tag::new(1, thread, TagKind::Gradient).index(index);
    let key = [u64::from(group.rank().0), u64::from(thread)];
    let order = Stream::new(3, "order", &key).permutation(u64::from(each));
    let (mut sums, mut gathers) = (vec![], vec![]);
    for index in order {
        let len = if index % 10 == 0 { 20_000 } else { index as usize % 7 };
        if index % 5 == 4 {
            let len = if index % 50 == 4 { 700_001 } else { len };
            let bytes = vec![group.rank().0 as u8; len];
            gathers.push((len, group.all_gather(tag(index as u32), bytes).unwrap()));
        } else {
            let leaf = |s| vec![i64::from(s) * 1000 + index as i64; len];
            let leaves = group.placement().range(group.rank()).map(leaf).collect();
            sums.push((index, len, group.all_reduce(tag(index as u32), leaves, ReduceOp::Sum).unwrap()));
        }
    }
    for (index, len, sum) in sums {
        assert_eq!(*sum.wait().unwrap(), vec![10_000 + 5 * index as i64; len]);
    }
    for (len, gather) in gathers {
        let expected: Vec<_> = (0..4u8).map(|rank| vec![rank; len]).collect();
        assert_eq!(*gather.wait().unwrap(), expected);
    }
}

#[test]
fn a_rank_that_closes_leaves_nothing_behind_undelivered() {
    const LEN: usize = 9_000_000;
    let mut groups = Group::on_hosts(&Placement::even(2, 2), &[0, 0], Reduction::Exact, TIMEOUT).unwrap();
    let (stays, leaves) = (groups.remove(0), groups.remove(0));
    let tag = Tag::new(1, 0, TagKind::Broadcast);
    // More than a ring holds, so that it is still being sent when its sender leaves.
    drop(leaves.broadcast(tag, Rank(1), Some(vec![7; LEN])).unwrap());
    let leaving = std::thread::spawn(move || leaves.close(TIMEOUT));
    assert_eq!(*stays.broadcast(tag, Rank(1), None).unwrap().wait().unwrap(), vec![7; LEN]);
    leaving.join().unwrap();
    let error = match stays.barrier(Tag::new(2, 0, TagKind::Barrier)) {
        Ok(barrier) => barrier.wait().unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(
        error,
        CollectiveError::PeerLeft { rank: Rank(1), tag: Some(Tag::new(2, 0, TagKind::Barrier)) }
    );
}

#[test]
fn an_abort_reaches_the_others_with_its_first_cause() {
    let groups = Group::on_hosts(&Placement::even(3, 3), &[0, 0, 0], Reduction::Exact, TIMEOUT).unwrap();
    let waiting: Vec<_> = groups[..2]
        .iter()
        .map(|group| group.all_reduce(gradient(1), vec![vec![1f32; 100_000]], ReduceOp::Sum).unwrap())
        .collect();
    groups[2].abort(CollectiveError::Aborted("the loss of step 1 is not a number".to_owned()));
    for pending in waiting {
        let error = pending.wait().unwrap_err();
        assert!(
            error.to_string().ends_with("ended the group: the loss of step 1 is not a number"),
            "{error}"
        );
    }
    let refused = groups[0].all_reduce(gradient(2), vec![vec![1f32; 100_000]], ReduceOp::Sum);
    assert!(refused.is_err());
}

#[test]
fn a_silent_rank_is_named_with_step_phase_and_bucket() {
    let cases = [([0, 0, 0], 4), ([0, 0, 0], 100_000), ([0, 0, 1], 100_000), ([0, 1, 1], 100_000)];
    std::thread::scope(|scope| {
        for (hosts, len) in cases {
            scope.spawn(move || check_silence(hosts, len));
        }
    });
}

fn check_silence(hosts: [usize; 3], len: usize) {
    // The last quarter is for asking who waits for whom.
    let limit = Duration::from_secs(3);
    let groups = Group::on_hosts(&Placement::even(3, 3), &hosts, Reduction::Exact, limit).unwrap();
    let tag = Tag::new(41, 1, TagKind::Gradient).index(3);
    let errors = in_ranks(&groups, |group| {
        let silent = group.rank() == Rank(2);
        (!silent).then(|| {
            let sum = group.all_reduce(tag, vec![vec![1f32; len]], ReduceOp::Sum).unwrap();
            sum.wait().unwrap_err()
        })
    });
    let errors: Vec<_> = errors.into_iter().flatten().collect();
    assert!(errors.iter().all(|error| error.culprit() == Some(Rank(2))), "{hosts:?}: {errors:?}");
    assert!(errors.iter().any(|error| {
        error.to_string().starts_with("rank 2 has not entered gradient bucket 3 of step 41, phase 1 after")
    }));
}
