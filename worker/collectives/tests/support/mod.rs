//! Reference results and the means to run one closure per rank.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

pub(crate) mod cluster;

use lockstep_collectives::formats::{Block8, bf16, f16};
use lockstep_collectives::{Element, Group, ReduceOp};
use lockstep_common::placement::Placement;
use lockstep_common::rng::Stream;
use proptest::prelude::*;
use std::fmt::Debug;

/// Runs `body` on a thread per rank and returns what each returned.
pub(crate) fn in_ranks<R: Send>(groups: &[Group], body: impl Fn(&Group) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = groups.iter().map(|group| scope.spawn(|| body(group))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The vectors of the shards that `group`'s rank owns.
pub(crate) fn leaves_of<T: Clone>(group: &Group, leaves: &[Vec<T>]) -> Vec<Vec<T>> {
    group.placement().range(group.rank()).map(|s| leaves[s as usize].clone()).collect()
}

/// Placements of up to `most` shards on any number of ranks, of any sizes, none empty.
pub(crate) fn placement_strategy(most: u32) -> impl Strategy<Value = Placement> {
    (1..=most).prop_flat_map(|shards| {
        let inner: Vec<u32> = (1..shards).collect();
        let cuts = inner.len();
        proptest::sample::subsequence(inner, 0..=cuts.min(5)).prop_map(move |mut ends| {
            ends.push(shards);
            serde_json::from_value(serde_json::json!({ "ends": ends })).unwrap()
        })
    })
}

/// The tree of the documentation, written down as it is defined.
pub(crate) fn reference<T: Element + Draw>(leaves: &[Vec<T>], op: ReduceOp) -> Vec<T> {
    if let [leaf] = leaves {
        return leaf.clone();
    }
    let mut middle = 1;
    while middle * 2 < leaves.len() {
        middle *= 2;
    }
    let (left, right) = leaves.split_at(middle);
    T::merge(&reference(left, op), &reference(right, op), op)
}

/// What [`Group`]s make of `leaves`.
pub(crate) fn expected<T: Element + Draw>(leaves: &[Vec<T>], op: ReduceOp) -> Vec<T> {
    let root = reference(leaves, op);
    match op {
        ReduceOp::Average => root.into_iter().map(|sum| sum.divided(leaves.len() as u32)).collect(),
        ReduceOp::Sum | ReduceOp::Moments => root,
    }
}

/// Random vectors that make any other order of addition show, and a plain merge of two of them.
pub(crate) trait Draw: Sized {
    fn leaf(seed: u64, shard: u32, len: usize, op: ReduceOp) -> Vec<Self>;
    fn merge(left: &[Self], right: &[Self], op: ReduceOp) -> Vec<Self>;
    /// For [`ReduceOp::Average`].
    fn divided(self, by: u32) -> Self;
}

impl Draw for f64 {
    fn leaf(seed: u64, shard: u32, len: usize, op: ReduceOp) -> Vec<f64> {
        let mut stream = Stream::new(seed, "leaf", &[u64::from(shard)]);
        let mut leaf: Vec<_> = (0..len)
            .map(|_| match stream.below(200) {
                0 => f64::NAN,
                1 => f64::INFINITY,
                2 => f64::NEG_INFINITY,
                3 => -0.0,
                _ => stream.normal() * 10f64.powi(stream.below(40) as i32 - 20),
            })
            .collect();
        if op == ReduceOp::Moments {
            leaf[0] = stream.below(3) as f64;
        }
        leaf
    }

    fn merge(left: &[f64], right: &[f64], op: ReduceOp) -> Vec<f64> {
        if op != ReduceOp::Moments {
            return left.iter().zip(right).map(|(l, r)| l + r).collect();
        }
        let (nl, nr) = (left[0], right[0]);
        if nr == 0.0 {
            return left.to_vec();
        }
        if nl == 0.0 {
            return right.to_vec();
        }
        let (n, c) = (nl + nr, left.len() / 2);
        let delta = |i: usize| right[1 + i] - left[1 + i];
        let mean = (0..c).map(|i| left[1 + i] + delta(i) * (nr / n));
        let m2 = (0..c).map(|i| left[1 + c + i] + (right[1 + c + i] + delta(i) * delta(i) * (nl * (nr / n))));
        std::iter::once(n).chain(mean).chain(m2).collect()
    }

    fn divided(self, by: u32) -> Self {
        self / f64::from(by)
    }
}

impl Draw for f32 {
    fn leaf(seed: u64, shard: u32, len: usize, op: ReduceOp) -> Vec<f32> {
        f64::leaf(seed, shard, len, op).into_iter().map(|v| v as f32).collect()
    }

    fn merge(left: &[f32], right: &[f32], _op: ReduceOp) -> Vec<f32> {
        left.iter().zip(right).map(|(l, r)| l + r).collect()
    }

    fn divided(self, by: u32) -> Self {
        self / by as f32
    }
}

impl Draw for i64 {
    fn leaf(seed: u64, shard: u32, len: usize, _op: ReduceOp) -> Vec<i64> {
        let mut stream = Stream::new(seed, "leaf", &[u64::from(shard)]);
        (0..len).map(|_| stream.next_u64() as i64).collect()
    }

    fn merge(left: &[i64], right: &[i64], _op: ReduceOp) -> Vec<i64> {
        left.iter().zip(right).map(|(l, r)| l.wrapping_add(*r)).collect()
    }

    fn divided(self, by: u32) -> Self {
        unreachable!("{by}: integers have no average")
    }
}

macro_rules! draw_half {
    ($half:ty) => {
        impl Draw for $half {
            fn leaf(seed: u64, shard: u32, len: usize, op: ReduceOp) -> Vec<Self> {
                f64::leaf(seed, shard, len, op).into_iter().map(Self::from_f64).collect()
            }

            fn merge(left: &[Self], right: &[Self], _op: ReduceOp) -> Vec<Self> {
                let sum = |(l, r): (&Self, &Self)| Self::from_f64(l.to_f64() + r.to_f64());
                left.iter().zip(right).map(sum).collect()
            }

            fn divided(self, by: u32) -> Self {
                Self::from_f32(self.to_f32() / by as f32)
            }
        }

        impl Bits for $half {
            fn bits(self) -> Option<u64> {
                (!self.is_nan()).then_some(u64::from(self.to_bits()))
            }
        }
    };
}

draw_half!(bf16);
draw_half!(f16);

/// The sum of two blocks has tests of its own; here it is about who adds which.
impl Draw for Block8 {
    fn leaf(seed: u64, shard: u32, len: usize, _op: ReduceOp) -> Vec<Self> {
        let mut stream = Stream::new(seed, "leaf", &[u64::from(shard)]);
        // Rarely NaN, since one makes a whole block NaN in every sum.
        let mut draw = || if stream.below(4000) == 0 { f32::NAN } else { stream.normal() as f32 };
        let values: Vec<f32> = (0..len * Self::LEN).map(|_| draw()).collect();
        let mut blocks = vec![bytemuck::Zeroable::zeroed(); len];
        Self::quantise(&values, &mut vec![0.0; values.len()], &mut blocks);
        blocks
    }

    fn merge(left: &[Self], right: &[Self], _op: ReduceOp) -> Vec<Self> {
        left.iter().zip(right).map(|(l, r)| l.plus(*r)).collect()
    }

    fn divided(self, by: u32) -> Self {
        let mut words: [u32; 17] = bytemuck::cast(self);
        words[0] = (f32::from_bits(words[0]) / by as f32).to_bits();
        bytemuck::cast(words)
    }
}

impl Bits for Block8 {
    fn bits(self) -> Option<u64> {
        let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        Some(bytemuck::bytes_of(&self).iter().fold(0xcbf2_9ce4_8422_2325, fold))
    }
}

/// Bits to compare. All NaNs are one: IEEE 754 leaves open which operand's payload a sum keeps.
pub(crate) trait Bits: Copy + Debug {
    fn bits(self) -> Option<u64>;
}

impl Bits for f32 {
    fn bits(self) -> Option<u64> {
        (!self.is_nan()).then_some(u64::from(self.to_bits()))
    }
}

impl Bits for f64 {
    fn bits(self) -> Option<u64> {
        (!self.is_nan()).then_some(self.to_bits())
    }
}

impl Bits for i64 {
    fn bits(self) -> Option<u64> {
        Some(self as u64)
    }
}

/// Panics at the first place where the bits differ.
pub(crate) fn assert_same<T: Bits>(actual: &[T], expected: &[T]) {
    assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert_eq!(a.bits(), e.bits(), "at {i} of {}: {a:?} instead of {e:?}", expected.len());
    }
}
