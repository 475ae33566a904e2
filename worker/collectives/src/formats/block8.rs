//! Blocks of 64 numbers as 8-bit integers with one scale.
//!
//! Two kinds of rounding, for two places:
//! - A leaf, one shard's own numbers, is rounded to nearest, and what that loses is kept by the shard and added the
//!   next time ([`Block8::quantise`]): error feedback.
//! - A node of the tree has no one to keep what it loses, and rounding to nearest would lose the same small number
//!   every time beside the same large one. So nodes round up or down with the probability that makes the expected
//!   error zero. The coin is a hash of the operands, so whoever adds them gets the same bits.
//!
//! Seide et al., "1-bit stochastic gradient descent", 2014 (error feedback); Alistarh et al., "QSGD", 2017 (unbiased
//! rounding).

use crate::op::sealed::Sealed;
use crate::op::{DivideFn, Element, MergeFn};
use bytemuck::{Pod, Zeroable};

/// Numbers of a block.
const LEN: usize = 64;

/// The integers' largest magnitude. −128 is left out, so that a block and its negative are equally exact.
const MOST: f32 = 127.0;

/// A block whose largest magnitude is less than this counts as zeros: its scale would not be a normal number.
const LEAST: f32 = MOST * f32::MIN_POSITIVE;

/// 64 numbers: the i-th is `scale * values[i]`.
///
/// A block with a number that is not finite has a NaN for its scale, so that all its numbers are NaN, in every sum
/// too.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block8 {
    scale: f32,
    values: [i8; LEN],
}

impl Block8 {
    /// Numbers of a block.
    pub const LEN: usize = LEN;

    /// Writes `values` plus `residual` to `blocks` and leaves in `residual` what the blocks lack of them; nothing where
    /// they are not finite. `values` and `residual` have the same length, `blocks` one element for each 64 begun.
    pub fn quantise(values: &[f32], residual: &mut [f32], blocks: &mut [Self]) {
        let parts = values.chunks(LEN).zip(residual.chunks_mut(LEN));
        for ((values, residual), block) in parts.zip(blocks) {
            let mut wanted = [0f32; LEN];
            for ((wanted, value), residual) in wanted.iter_mut().zip(values).zip(&*residual) {
                *wanted = value + residual;
            }
            *block = Self::nearest(&wanted);
            let sent = block.numbers();
            let finite = block.scale.is_finite();
            for ((residual, wanted), sent) in residual.iter_mut().zip(wanted).zip(sent) {
                *residual = if finite { wanted - sent } else { 0.0 };
            }
        }
    }

    /// Writes what `blocks` stand for to `values`, one block to each 64 begun.
    pub fn dequantise(blocks: &[Self], values: &mut [f32]) {
        for (block, values) in blocks.iter().zip(values.chunks_mut(LEN)) {
            values.copy_from_slice(&block.numbers()[..values.len()]);
        }
    }

    fn numbers(&self) -> [f32; LEN] {
        self.values.map(|v| self.scale * f32::from(v))
    }

    fn nearest(numbers: &[f32; LEN]) -> Self {
        Self::rounded(numbers, &[0.0; LEN])
    }

    /// Rounds to the nearest multiple of the scale after adding `dither`, in multiples of the scale and below ½ in
    /// magnitude.
    fn rounded(numbers: &[f32; LEN], dither: &[f32; LEN]) -> Self {
        // The bits of magnitudes are ordered like the magnitudes, and those of NaN come last. Unlike a maximum of
        // floating-point numbers this one may be taken in any order.
        let largest = numbers.iter().map(|n| n.to_bits() & 0x7fff_ffff).fold(0, u32::max);
        let largest = f32::from_bits(largest);
        if !largest.is_finite() {
            return Self { scale: f32::NAN, values: [0; LEN] };
        }
        if largest < LEAST {
            return Self::zeroed();
        }
        let inverse = MOST / largest;
        let mut values = [0; LEN];
        for ((value, number), dither) in values.iter_mut().zip(numbers).zip(dither) {
            *value = to_nearest((number * inverse).clamp(-MOST, MOST) + dither);
        }
        Self { scale: largest / MOST, values }
    }

    /// Numbers in (−½, ½), one for each place, keyed by both operands.
    fn dither(&self, other: &Self) -> [f32; LEN] {
        let (a, b): ([u32; 16], [u32; 16]) = (bytemuck::cast(self.values), bytemuck::cast(other.values));
        // NH: sums of products of keyed words (Black et al., "UMAC", 1999), independent of each other.
        let mut hash = u64::from(self.scale.to_bits()) << 32 | u64::from(other.scale.to_bits());
        for i in 0..16 {
            let (x, y) = (a[i].wrapping_add(KEYS[i]), b[i].wrapping_add(KEYS[16 + i]));
            hash = hash.wrapping_add(u64::from(x) * u64::from(y));
        }
        let start = (finalised(hash) >> 32) as u32;
        // Multiples of the golden ratio fill the circle evenly from any start.
        std::array::from_fn(|i| {
            let at = start.wrapping_add((i as u32).wrapping_mul(0x9e37_79b9)) >> 16;
            // Centres of 2^16 parts of (−½, ½): exact beside any integer below 128, which therefore stays.
            (at as f32 - 32767.5) * (1.0 / 65536.0)
        })
    }
}

impl Sealed for Block8 {}

impl Element for Block8 {
    const CODE: u8 = 6;
    const NAME: &'static str = "int8 blocks";
    const MOMENTS: Option<MergeFn<Self>> = None;
    const DIVIDE: Option<DivideFn<Self>> =
        Some(|sums, by| sums.iter_mut().for_each(|s| s.scale /= by as f32));

    fn plus(self, other: Self) -> Self {
        let mut sum = self.numbers();
        f32::add(&mut sum, &other.numbers());
        Self::rounded(&sum, &self.dither(&other))
    }
}

/// Rounds to the nearest integer, ties to even. `value` is at most 127.5 in magnitude.
///
/// Beside 1.5 · 2²³ an `f32` has no room for fractions. Unlike `round_ties_even` this is two plain instructions on
/// every processor, and so becomes vector instructions.
fn to_nearest(value: f32) -> i8 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as i8
}

/// The finaliser of MurmurHash3: every bit of the input changes every bit of the output half of the time.
fn finalised(mut hash: u64) -> u64 {
    hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 33
}

/// Keys of the hash: SplitMix64 from 0, halves. (Vigna, 2015.)
const KEYS: [u32; 32] = {
    let mut keys = [0; 32];
    let (mut i, mut state) = (0, 0u64);
    while i < 32 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        keys[i] = z as u32;
        keys[i + 1] = (z >> 32) as u32;
        i += 2;
    }
    keys
};

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::rng::Stream;
    use proptest::prelude::*;

    fn numbers(len: std::ops::Range<usize>) -> impl Strategy<Value = Vec<f32>> {
        let number = prop_oneof![
            20 => -1f32..1.0,
            4 => -1e-3f32..1e-3,
            1 => Just(0.0f32),
            1 => Just(-0.0f32),
            1 => any::<f32>().prop_filter("finite", |n| n.abs() < 1e30),
        ];
        prop::collection::vec(number, len)
    }

    /// The definition, one number after the other.
    fn plain(numbers: &[f32]) -> (f32, Vec<i8>) {
        let largest = numbers.iter().fold(0f32, |l, n| l.max(n.abs()));
        if numbers.iter().any(|n| !n.is_finite()) {
            return (f32::NAN, vec![0; numbers.len()]);
        }
        if largest < 127.0 * f32::MIN_POSITIVE {
            return (0.0, vec![0; numbers.len()]);
        }
        let values =
            numbers.iter().map(|n| (n * (127.0 / largest)).clamp(-127.0, 127.0).round_ties_even() as i8);
        (largest / 127.0, values.collect())
    }

    proptest! {
        #[test]
        fn leaves_are_rounded_to_nearest_and_lose_nothing_for_good(values in numbers(1..300), seed: u64) {
            let mut stream = Stream::new(seed, "residual", &[]);
            let before: Vec<f32> = values.iter().map(|_| stream.uniform_in(-0.01, 0.01) as f32).collect();
            let mut residual = before.clone();
            let mut blocks = vec![Block8::zeroed(); values.len().div_ceil(LEN)];
            Block8::quantise(&values, &mut residual, &mut blocks);
            let mut sent = vec![0f32; values.len()];
            Block8::dequantise(&blocks, &mut sent);
            for (b, block) in blocks.iter().enumerate() {
                let range = b * LEN..values.len().min((b + 1) * LEN);
                let wanted: Vec<f32> = range.clone().map(|i| values[i] + before[i]).collect();
                let (scale, integers) = plain(&wanted);
                prop_assert_eq!(block.scale.to_bits(), scale.to_bits());
                prop_assert_eq!(&block.values[..wanted.len()], &integers[..]);
                for (i, w) in range.zip(wanted) {
                    prop_assert_eq!(residual[i].to_bits(), (w - sent[i]).to_bits());
                    prop_assert!(residual[i].abs() <= 0.5001 * scale);
                }
            }
        }

        #[test]
        fn a_node_is_within_one_part_in_127_of_its_operands_sum(a in numbers(64..65), b in numbers(64..65)) {
            let of = |v: &[f32]| Block8::nearest(v.try_into().unwrap());
            let (a, b) = (of(&a), of(&b));
            let sum = a.plus(b);
            for ((x, y), s) in a.numbers().into_iter().zip(b.numbers()).zip(sum.numbers()) {
                prop_assert!((s - (x + y)).abs() <= 1.0001 * sum.scale);
            }
        }
    }

    #[test]
    fn what_is_not_finite_reaches_every_sum_and_leaves_no_residual() {
        let ones = Block8::nearest(&[1.0; LEN]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (mut residual, mut block) = ([0.5; LEN], [Block8::zeroed()]);
            let mut values = [1.0; LEN];
            values[17] = bad;
            Block8::quantise(&values, &mut residual, &mut block);
            assert_eq!(residual, [0.0; LEN]);
            for sum in [block[0].plus(ones), ones.plus(block[0]), block[0].plus(ones).plus(ones)] {
                assert!(sum.numbers().iter().all(|n| n.is_nan()));
            }
        }
        let huge = Block8::nearest(&[f32::MAX; LEN]);
        assert!(huge.plus(huge).numbers()[0].is_nan(), "a sum beyond f32 is not finite");
    }

    #[test]
    fn zeros_and_numbers_too_small_for_a_scale_are_zeros() {
        for tiny in [0.0, -0.0, f32::MIN_POSITIVE, 1e-40] {
            assert_eq!(Block8::nearest(&[tiny; LEN]), Block8::zeroed());
        }
        assert_ne!(Block8::nearest(&[2.0 * LEAST; LEN]), Block8::zeroed());
        let mut block = Block8::nearest(&std::array::from_fn(|i| i as f32 - 20.0));
        let values = block.values;
        block = block.plus(Block8::zeroed());
        assert_eq!(block.values, values, "a shard without samples changes no integer");
    }

    /// Beside a large number a small one is less than half of what 8 bits resolve. To nearest, it would be lost every
    /// time.
    #[test]
    fn nodes_lose_nothing_on_average() {
        const ROUNDS: usize = 4000;
        let mut stream = Stream::new(1, "bias", &[]);
        let (mut sum, mut exact) = (0f64, 0f64);
        let mut quantum = 0f32;
        for _ in 0..ROUNDS {
            let mut draw = |small: f32| {
                let mut numbers = [0f32; LEN];
                numbers.iter_mut().for_each(|n| *n = small * stream.uniform() as f32);
                numbers[0] = 100.0;
                Block8::nearest(&numbers)
            };
            let (a, b) = (draw(1.0), draw(0.0));
            let node = a.plus(b);
            quantum = quantum.max(node.scale);
            for i in 1..LEN {
                sum += f64::from(node.numbers()[i]);
                exact += f64::from(a.numbers()[i]) + f64::from(b.numbers()[i]);
            }
        }
        // Each error is at most one quantum and has at most half of one as its standard deviation. The numbers of one
        // block share their coin, so a block counts as one draw.
        let bound = 5.0 * 0.5 * f64::from(quantum) * (LEN as f64) * (ROUNDS as f64).sqrt();
        assert!(exact > 2.0 * bound, "the test would not see a loss: {exact} against {bound}");
        assert!((sum - exact).abs() <= bound, "{sum} instead of {exact}, bound {bound}");
    }
}
