//! What is reduced and how two operands become one.

use crate::numbers::Numbers;
use crate::tree::Merge;
use bytemuck::Pod;
use lockstep_common::moments;

/// How two vectors become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// Element by element. Integers wrap.
    Sum,
    /// [`Sum`](Self::Sum) divided once, at the end, by the number of leaves, which is the number of logical shards.
    /// Floating point only.
    Average,
    /// Count, means and sums of squared deviations, laid out `[n, mean[C], m2[C]]`, `f64` only. Operands with
    /// `n = 0` change no bit of the other.
    ///
    /// Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    Moments,
}

pub(crate) mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for i64 {}
}

/// Merges the right vector into the left one.
pub(crate) type MergeFn<T> = fn(&mut [T], &[T]);
/// Divides every element by a number of leaves.
pub(crate) type DivideFn<T> = fn(&mut [T], u32);

/// A type that can be all-reduced: numbers, and the compressed forms of [`crate::formats`].
pub trait Element: Pod + Send + Sync + sealed::Sealed {
    /// Names the type on the wire.
    #[doc(hidden)]
    const CODE: u8;
    /// What errors call the type.
    #[doc(hidden)]
    const NAME: &'static str;
    /// [`ReduceOp::Moments`], for the types that have it.
    #[doc(hidden)]
    const MOMENTS: Option<MergeFn<Self>>;
    /// The last step of [`ReduceOp::Average`], for the types that have it.
    #[doc(hidden)]
    const DIVIDE: Option<DivideFn<Self>>;
    /// The sum of two values.
    #[doc(hidden)]
    fn plus(self, other: Self) -> Self;
    /// [`plus`](Self::plus) for each pair, into the left one. Both slices have the same length.
    #[doc(hidden)]
    fn add(left: &mut [Self], right: &[Self]) {
        for (l, r) in left.iter_mut().zip(right) {
            *l = l.plus(*r);
        }
    }
}

impl Element for f32 {
    const CODE: u8 = 1;
    const NAME: &'static str = "f32";
    const MOMENTS: Option<MergeFn<Self>> = None;
    const DIVIDE: Option<DivideFn<Self>> = Some(|sums, by| sums.iter_mut().for_each(|s| *s /= by as f32));
    fn plus(self, other: Self) -> Self {
        self + other
    }
}

impl Element for f64 {
    const CODE: u8 = 2;
    const NAME: &'static str = "f64";
    const MOMENTS: Option<MergeFn<Self>> = Some(moments::merge);
    const DIVIDE: Option<DivideFn<Self>> = Some(|sums, by| sums.iter_mut().for_each(|s| *s /= f64::from(by)));
    fn plus(self, other: Self) -> Self {
        self + other
    }
}

impl Element for i64 {
    const CODE: u8 = 3;
    const NAME: &'static str = "i64";
    const MOMENTS: Option<MergeFn<Self>> = None;
    const DIVIDE: Option<DivideFn<Self>> = None;
    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
}

impl ReduceOp {
    /// Names operation and element type on the wire.
    pub(crate) fn signature<T: Element>(self) -> u8 {
        let op = match self {
            ReduceOp::Sum => 0,
            ReduceOp::Moments => 1,
            ReduceOp::Average => 2,
        };
        op << 4 | T::CODE
    }

    /// The word for an operation's code.
    pub(crate) fn word(code: u8) -> &'static str {
        match code {
            0 => "sum",
            1 => "moments",
            2 => "average",
            4 => "scattered sum",
            6 => "scattered average",
            _ => "unknown operation",
        }
    }

    /// Why `len` elements of `T` cannot be reduced this way, if so.
    pub(crate) fn refuse<T: Element>(self, len: usize) -> Option<String> {
        match self {
            ReduceOp::Sum => None,
            ReduceOp::Average if T::DIVIDE.is_none() => {
                Some(format!("{} has no average: sum, and divide where the result is used", T::NAME))
            }
            ReduceOp::Average => None,
            ReduceOp::Moments if T::MOMENTS.is_none() => {
                Some(format!("moments are reduced in f64, not {}", T::NAME))
            }
            ReduceOp::Moments if len.is_multiple_of(2) => {
                Some(format!("moments are laid out [n, mean[C], m2[C]], an odd length, not {len}"))
            }
            ReduceOp::Moments => None,
        }
    }

    /// Merges leaves in place. All have the same length.
    pub(crate) fn merge_in_place<T: Element>(self, leaves: &mut [Numbers<T>], merges: &[Merge]) {
        let len = leaves.first().map_or(0, |leaf| leaf.len());
        let block = self.block::<T>(len);
        for start in (0..len).step_by(block) {
            let range = start..len.min(start + block);
            for merge in merges {
                let (head, tail) = leaves.split_at_mut(merge.from);
                self.merge(&mut head[merge.into][range.clone()], &tail[0][range.clone()]);
            }
        }
    }

    /// What is left to do to the root of a tree of `leaves` leaves.
    pub(crate) fn finish<T: Element>(self, root: &mut [T], leaves: u32) {
        if let (ReduceOp::Average, Some(divide)) = (self, T::DIVIDE) {
            divide(root, leaves);
        }
    }

    /// Writes what `merges` make of `inputs` to `out`. All have the same length.
    pub(crate) fn combine<T: Element>(self, out: &mut [T], inputs: &[&[T]], merges: &[Merge]) {
        let block = self.block::<T>(out.len());
        let mut sums = vec![T::zeroed(); if inputs.len() > 2 { inputs.len() * block } else { 0 }];
        let is_sum: Vec<bool> = (0..inputs.len()).map(|i| merges.iter().any(|m| m.into == i)).collect();
        for start in (0..out.len()).step_by(block) {
            let range = start..out.len().min(start + block);
            let out = &mut out[range.clone()];
            let n = out.len();
            out.copy_from_slice(&inputs[0][range.clone()]);
            for i in (1..inputs.len()).filter(|&i| is_sum[i]) {
                sums[i * block..][..n].copy_from_slice(&inputs[i][range.clone()]);
            }
            for merge in merges {
                let (head, tail) = if is_sum[merge.from] || merge.into > 0 {
                    sums.split_at_mut(merge.from * block)
                } else {
                    Default::default()
                };
                let right = if is_sum[merge.from] { &tail[..n] } else { &inputs[merge.from][range.clone()] };
                let left = if merge.into == 0 { &mut *out } else { &mut head[merge.into * block..][..n] };
                self.merge(left, right);
            }
        }
    }

    /// How many elements are merged at a time: for sums so many that a handful of operands stay in the cache.
    fn block<T>(self, len: usize) -> usize {
        match self {
            ReduceOp::Sum | ReduceOp::Average => (8192 / size_of::<T>()).min(len).max(1),
            ReduceOp::Moments => len.max(1),
        }
    }

    fn merge<T: Element>(self, left: &mut [T], right: &[T]) {
        match (self, T::MOMENTS) {
            (ReduceOp::Moments, Some(merge)) => merge(left, right),
            _ => T::add(left, right),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f64]) -> Vec<f64> {
        let n = values.len() as f64;
        if values.is_empty() {
            return vec![0.0, 0.0, 0.0];
        }
        let mean = values.iter().sum::<f64>() / n;
        vec![n, mean, values.iter().map(|v| (v - mean).powi(2)).sum()]
    }

    #[test]
    fn merged_moments_are_those_of_all_values() {
        let values: Vec<f64> = (0..50).map(|i| 1e3 + f64::from(i * i % 17)).collect();
        let mut left = of(&values[..13]);
        moments::merge(&mut left, &of(&values[13..]));
        for (merged, whole) in left.iter().zip(of(&values)) {
            assert!((merged - whole).abs() <= 1e-10 * whole.abs(), "{merged} instead of {whole}");
        }
    }

    #[test]
    fn an_empty_side_leaves_the_other_bit_for_bit() {
        let some = [3.0, 0.1, -0.0];
        for empty in [[0.0, 0.0, 0.0], [0.0, f64::NAN, f64::INFINITY]] {
            let mut left = some;
            moments::merge(&mut left, &empty);
            assert_eq!(left.map(f64::to_bits), some.map(f64::to_bits));
            let mut left = empty;
            moments::merge(&mut left, &some);
            assert_eq!(left.map(f64::to_bits), some.map(f64::to_bits));
        }
    }

    #[test]
    fn moments_refuse_even_lengths_and_other_types() {
        assert!(ReduceOp::Moments.refuse::<f32>(3).is_some());
        assert!(ReduceOp::Moments.refuse::<f64>(4).is_some());
        assert!(ReduceOp::Moments.refuse::<f64>(3).is_none());
    }

    #[test]
    fn integers_have_no_average() {
        assert!(ReduceOp::Average.refuse::<i64>(3).is_some());
        assert!(ReduceOp::Average.refuse::<f32>(3).is_none());
    }
}
