//! The promise: the bits of a reduction do not depend on who owns which shards, nor on how they travelled.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use lockstep_collectives::formats::{Block8, bf16, f16, narrow};
use lockstep_collectives::{Element, Group, ReduceOp, Tag, TagKind};
use lockstep_common::ids::Rank;
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;
use lockstep_common::rng::Stream;
use proptest::prelude::*;
use std::time::Duration;
use support::{Bits, Draw, assert_same, expected, in_ranks, leaves_of, placement_strategy, reference};

const TIMEOUT: Duration = Duration::from_secs(20);

/// Lengths on both sides of the switch from one frame to chunks (64 KiB), and odd ones.
fn lengths() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => 0usize..40,
        2 => Just(16_384),
        2 => 8_190usize..8_196,
        2 => 16_380usize..16_500,
        1 => 100_000usize..150_000,
    ]
}

/// Two to twelve ranks, each with one shard or several.
fn wide_placement() -> impl Strategy<Value = Placement> {
    prop::collection::vec(1u32..5, 2..=12).prop_map(|owned| {
        let ends = owned.iter().scan(0, |end, owned| {
            *end += owned;
            Some(*end)
        });
        serde_json::from_value(serde_json::json!({ "ends": ends.collect::<Vec<_>>() })).unwrap()
    })
}

fn check_exact<T: Draw + Element + Bits>(placement: &Placement, len: usize, seed: u64, op: ReduceOp) {
    let groups = Group::in_process(placement, Reduction::Exact, TIMEOUT).unwrap();
    check_groups::<T>(&groups, placement, len, seed, op);
}

/// The same in rounds, where messages have room for it.
fn check_in_rounds<T: Draw + Element + Bits>(placement: &Placement, len: usize, seed: u64, op: ReduceOp) {
    let groups = Group::in_process(placement, Reduction::Exact, TIMEOUT).unwrap();
    let groups: Vec<_> = groups.into_iter().map(|group| group.direct_up_to(1)).collect();
    check_groups::<T>(&groups, placement, len, seed, op);
}

fn check_groups<T: Draw + Element + Bits>(
    groups: &[Group],
    placement: &Placement,
    len: usize,
    seed: u64,
    op: ReduceOp,
) {
    let leaves: Vec<Vec<T>> = (0..placement.shards()).map(|s| T::leaf(seed, s, len, op)).collect();
    let expected = expected(&leaves, op);
    let tag = Tag::new(1, 0, TagKind::Gradient);
    in_ranks(groups, |group| {
        let own = leaves_of(group, &leaves);
        let result = group.all_reduce(tag, own, op).unwrap().wait().unwrap();
        assert_same(&result, &expected);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn sums_equal_the_reference_tree_for_any_ownership(
        placement in placement_strategy(12), len in lengths(), seed: u64, dtype in 0..6, average: bool,
    ) {
        let op = if average { ReduceOp::Average } else { ReduceOp::Sum };
        match dtype {
            0 => check_exact::<f32>(&placement, len, seed, op),
            1 => check_exact::<f64>(&placement, len, seed, op),
            2 => check_exact::<bf16>(&placement, len, seed, op),
            3 => check_exact::<f16>(&placement, len, seed, op),
            4 => check_exact::<Block8>(&placement, len / 16, seed, op),
            _ => check_exact::<i64>(&placement, len, seed, ReduceOp::Sum),
        }
    }

    #[test]
    fn numbers_sent_as_bf16_sum_to_the_reference_tree_of_the_rounded_ones(
        placement in placement_strategy(12), len in lengths(), seed: u64, average: bool, shared: bool,
    ) {
        let op = if average { ReduceOp::Average } else { ReduceOp::Sum };
        let leaves: Vec<Vec<f32>> = (0..placement.shards()).map(|s| f32::leaf(seed, s, len, op)).collect();
        let round = |leaf: &Vec<f32>| {
            let mut rounded = vec![bf16::ZERO; len];
            narrow(leaf, &mut rounded);
            rounded
        };
        let mut expected = reference(&leaves.iter().map(round).collect::<Vec<_>>(), op);
        if average {
            expected.iter_mut().for_each(|e| *e = e.divided(placement.shards()));
        }
        let expected: Vec<f32> = expected.into_iter().map(f32::from).collect();
        let apart = usize::from(shared) + 1;
        let hosts: Vec<usize> = (0..placement.world_size() as usize).map(|rank| rank / apart).collect();
        let groups = Group::on_hosts(&placement, &hosts, Reduction::Exact, TIMEOUT).unwrap();
        let tag = Tag::new(1, 0, TagKind::Gradient);
        in_ranks(&groups, |group| {
            let own = leaves_of(group, &leaves);
            let result = group.all_reduce_bf16(tag, own, op).unwrap().wait().unwrap();
            assert_same(&result, &expected);
        });
    }

    #[test]
    fn moments_equal_the_reference_tree_for_any_ownership(
        placement in placement_strategy(12), channels in prop_oneof![0usize..20, 5_000usize..5_003], seed: u64,
    ) {
        check_exact::<f64>(&placement, 2 * channels + 1, seed, ReduceOp::Moments);
    }

    #[test]
    fn sums_in_rounds_equal_the_reference_tree_for_any_ownership(
        placement in wide_placement(), len in 0usize..300, seed: u64, dtype in 0..7, average: bool,
    ) {
        let op = if average { ReduceOp::Average } else { ReduceOp::Sum };
        match dtype {
            0 => check_in_rounds::<f32>(&placement, len, seed, op),
            1 => check_in_rounds::<f64>(&placement, len, seed, op),
            2 => check_in_rounds::<bf16>(&placement, len, seed, op),
            3 => check_in_rounds::<f16>(&placement, len, seed, op),
            4 => check_in_rounds::<Block8>(&placement, len / 16, seed, op),
            5 => check_in_rounds::<i64>(&placement, len, seed, ReduceOp::Sum),
            _ => check_in_rounds::<f64>(&placement, 2 * len + 1, seed, ReduceOp::Moments),
        }
    }

    #[test]
    fn fast_sums_are_the_same_bits_on_every_rank_and_close_to_exact(
        placement in placement_strategy(9), len in lengths(), seed: u64,
    ) {
        let leaves: Vec<Vec<f64>> = (0..placement.shards())
            .map(|s| {
                let mut stream = Stream::new(seed, "fast", &[u64::from(s)]);
                (0..len).map(|_| stream.uniform_in(1.0, 2.0)).collect()
            })
            .collect();
        let groups = Group::in_process(&placement, Reduction::Fast, TIMEOUT).unwrap();
        let tag = Tag::new(1, 0, TagKind::Gradient);
        let results = in_ranks(&groups, |group| {
            group.all_reduce(tag, leaves_of(group, &leaves), ReduceOp::Sum).unwrap().wait().unwrap()
        });
        for result in &results {
            assert_same(result, &results[0]);
        }
        for (sum, exact) in results[0].iter().zip(reference(&leaves, ReduceOp::Sum)) {
            prop_assert!((sum - exact).abs() <= 1e-14 * exact, "{} instead of {}", sum, exact);
        }
    }
}

#[test]
fn nan_and_infinity_reach_every_rank() {
    let placement = Placement::even(5, 3);
    let groups = Group::in_process(&placement, Reduction::Exact, TIMEOUT).unwrap();
    for len in [4, 40_000] {
        let mut leaves = vec![vec![1f32; len]; 5];
        leaves[4][len - 1] = f32::NAN;
        leaves[1][0] = f32::INFINITY;
        leaves[3][1] = f32::NEG_INFINITY;
        leaves[1][1] = f32::INFINITY;
        let tag = Tag::new(len as u64, 0, TagKind::Gradient);
        in_ranks(&groups, |group| {
            let sum =
                group.all_reduce(tag, leaves_of(group, &leaves), ReduceOp::Sum).unwrap().wait().unwrap();
            assert_eq!(sum[0], f32::INFINITY);
            assert!(sum[1].is_nan() && sum[len - 1].is_nan());
            assert_eq!(sum[2], 5.0);
        });
    }
}

/// Three threads per rank, each with its own order of the same collectives.
#[test]
fn a_thousand_collectives_in_random_interleaving_keep_apart() {
    const THREADS: u16 = 3;
    const EACH: u32 = 340;
    let placement = Placement::even(5, 3);
    let groups = Group::in_process(&placement, Reduction::Exact, TIMEOUT).unwrap();
    let tag = |thread, index| Tag::new(1, thread, TagKind::Gradient).index(index);
    in_ranks(&groups, |group| {
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || {
                    let key = [u64::from(group.rank().0), u64::from(thread)];
                    let order = Stream::new(3, "order", &key).permutation(u64::from(EACH));
                    let mut sums = vec![];
                    let mut gathers = vec![];
                    for index in order {
                        let len = if index % 50 == 0 { 20_000 } else { index as usize % 7 };
                        if index % 5 == 4 {
                            let bytes = vec![group.rank().0 as u8; len];
                            let tag = tag(thread, index as u32);
                            gathers.push((len, group.all_gather(tag, bytes).unwrap()));
                        } else {
                            let leaf = |s| vec![i64::from(s) * 1000 + index as i64; len];
                            let leaves = group.placement().range(group.rank()).map(leaf).collect();
                            let tag = tag(thread, index as u32);
                            sums.push((index, len, group.all_reduce(tag, leaves, ReduceOp::Sum).unwrap()));
                        }
                    }
                    for (index, len, sum) in sums {
                        assert_eq!(*sum.wait().unwrap(), vec![10_000 + 5 * index as i64; len]);
                    }
                    for (len, gather) in gathers {
                        let expected: Vec<_> = (0..3u8).map(|rank| vec![rank; len]).collect();
                        assert_eq!(*gather.wait().unwrap(), expected);
                    }
                });
            }
        });
        // Empty vectors need nobody.
        let empty = (0..EACH).filter(|i| i % 5 != 4 && i % 7 == 0 && i % 50 != 0).count() as u64;
        assert_eq!(group.stats().collectives, u64::from(THREADS) * (u64::from(EACH) - empty));
    });
}

#[test]
fn gather_broadcast_and_barrier_move_any_length() {
    let groups = Group::in_process(&Placement::even(4, 4), Reduction::Exact, TIMEOUT).unwrap();
    let bytes = |rank: u32, len: usize| (0..len).map(|i| (i as u32 * 31 + rank) as u8).collect::<Vec<_>>();
    in_ranks(&groups, |group| {
        let me = group.rank().0;
        for (step, len) in [0, 1, 65_537, 700_001].into_iter().enumerate() {
            let tag = |kind| Tag::new(step as u64, 0, kind);
            let gathered = group.all_gather(tag(TagKind::State), bytes(me, len * me as usize)).unwrap();
            let root = Rank(step as u32);
            let mine = (group.rank() == root).then(|| bytes(9, len));
            let sent = group.broadcast(tag(TagKind::Broadcast), root, mine).unwrap();
            let barrier = group.barrier(tag(TagKind::Barrier)).unwrap();
            barrier.wait().unwrap();
            assert_eq!(*sent.wait().unwrap(), bytes(9, len));
            let expected: Vec<_> = (0..4).map(|rank| bytes(rank, len * rank as usize)).collect();
            assert_eq!(*gathered.wait().unwrap(), expected);
        }
    });
}

#[test]
fn solo_gives_the_bits_of_many_ranks() {
    let leaves: Vec<Vec<f32>> = (0..7).map(|s| f32::leaf(5, s, 100, ReduceOp::Sum)).collect();
    let solo = Group::solo(Placement::even(7, 1), Reduction::Exact).unwrap();
    let tag = Tag::new(0, 0, TagKind::Gradient);
    let sum = solo.all_reduce(tag, leaves.clone(), ReduceOp::Sum).unwrap();
    assert!(sum.is_ready());
    assert_same(&sum.wait().unwrap(), &reference(&leaves, ReduceOp::Sum));
    for (shards, reduction) in
        (1..=9).flat_map(|shards| [Reduction::Exact, Reduction::Fast].map(|reduction| (shards, reduction)))
    {
        let group = Group::solo(Placement::even(shards, 1), reduction).unwrap();
        let leaves: Vec<Vec<f32>> = (0..shards).map(|s| f32::leaf(5, s, 5000, ReduceOp::Sum)).collect();
        let moved = group.all_reduce(tag, leaves.clone(), ReduceOp::Sum).unwrap().wait().unwrap();
        let mut in_place = vec![f32::NAN; 5000];
        let leaves: Vec<&[f32]> = leaves.iter().map(Vec::as_slice).collect();
        group.sum(&mut in_place, &leaves).unwrap();
        assert_same(&in_place, &moved);
        assert!(
            group.sum(&mut in_place[1..], &leaves).is_err()
                && group.sum(&mut in_place, &leaves[1..]).is_err()
        );
    }
    solo.barrier(tag).unwrap().wait().unwrap();
    assert_eq!(*solo.all_gather(tag, vec![7]).unwrap().wait().unwrap(), [vec![7u8]]);
    assert_eq!(*solo.broadcast(tag, Rank(0), Some(vec![8])).unwrap().wait().unwrap(), [8u8][..]);
}
