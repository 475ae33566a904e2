//! The 16-bit floating-point types: added in `f32`, rounded to nearest, ties to even.
//!
//! The sum of two numbers of 8 or 11 significant bits, rounded to the 24 of `f32` and then back, is the exact sum
//! rounded once: 24 ≥ 2 · 11 + 2. (Figueroa, "When is double rounding innocuous?", 1995.)

use crate::op::sealed::Sealed;
use crate::op::{DivideFn, Element, MergeFn};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

impl Sealed for bf16 {}
impl Sealed for f16 {}

impl Element for bf16 {
    const CODE: u8 = 4;
    const NAME: &'static str = "bf16";
    const MOMENTS: Option<MergeFn<Self>> = None;
    const DIVIDE: Option<DivideFn<Self>> = Some(|sums, by| {
        for sum in sums.reinterpret_cast_mut() {
            *sum = rounded(widened(*sum) / by as f32);
        }
    });

    fn plus(self, other: Self) -> Self {
        Self::from_bits(rounded(widened(self.to_bits()) + widened(other.to_bits())))
    }
}

impl Element for f16 {
    const CODE: u8 = 5;
    const NAME: &'static str = "f16";
    const MOMENTS: Option<MergeFn<Self>> = None;
    const DIVIDE: Option<DivideFn<Self>> = Some(|sums, by| {
        for sum in sums {
            *sum = Self::from_f32(sum.to_f32() / by as f32);
        }
    });

    fn plus(self, other: Self) -> Self {
        Self::from_f32(self.to_f32() + other.to_f32())
    }

    /// Converts whole slices, for which `half` uses the processor's instructions where it has them; like its own
    /// conversion they round to nearest even.
    fn add(left: &mut [Self], right: &[Self]) {
        const AT_ONCE: usize = 256;
        let (mut sums, mut others) = ([0f32; AT_ONCE], [0f32; AT_ONCE]);
        for (left, right) in left.chunks_mut(AT_ONCE).zip(right.chunks(AT_ONCE)) {
            let (sums, others) = (&mut sums[..left.len()], &mut others[..left.len()]);
            left.convert_to_f32_slice(sums);
            right.convert_to_f32_slice(others);
            f32::add(sums, others);
            left.convert_from_f32_slice(sums);
        }
    }
}

/// Rounds numbers to `bf16`. Both slices have the same length. A NaN stays one.
pub fn narrow(from: &[f32], to: &mut [bf16]) {
    for (from, to) in from.iter().zip(to.reinterpret_cast_mut()) {
        *to = rounded(*from);
    }
}

/// The numbers that `bf16`s stand for, exactly. Both slices have the same length.
pub fn widen(from: &[bf16], to: &mut [f32]) {
    for (from, to) in from.reinterpret_cast().iter().zip(to) {
        *to = widened(*from);
    }
}

fn widened(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Without a branch, so that the loops above become vector instructions. `half`'s own conversion branches for NaN.
fn rounded(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // Rounding up must not make an infinity or a zero of a NaN.
    let quiet = bits | 0x0040_0000;
    let kept = if value.is_nan() { quiet } else { nearest };
    (kept >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Neighbours and ties of the 16-bit types, NaNs, infinities and subnormals come up often enough.
    fn bits() -> impl Strategy<Value = u16> {
        prop_oneof![4 => any::<u16>(), 1 => 0x7f7eu16..=0x7f82, 1 => 0x7bfeu16..=0x7c02, 1 => 0u16..4, 1 => 0xff7eu16..]
    }

    fn same(is_nan: [bool; 2], bits: [u16; 2]) -> bool {
        is_nan == [true, true] || (is_nan == [false, false] && bits[0] == bits[1])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn sums_are_the_exact_sum_rounded_once(a in bits(), b in bits(), len in 1usize..70) {
            let (x, y) = (bf16::from_bits(a), bf16::from_bits(b));
            let mut sums = vec![x; len];
            bf16::add(&mut sums, &vec![y; len]);
            // f64 holds the exact sum of two f32, unless they are more than 2^29 apart, where the smaller is no tie.
            let exact = bf16::from_f64(f64::from(x) + f64::from(y));
            for sum in sums {
                prop_assert!(same([sum.is_nan(), exact.is_nan()], [sum.to_bits(), exact.to_bits()]), "{x} + {y} = {sum}");
                prop_assert!(same([sum.is_nan(), x.plus(y).is_nan()], [sum.to_bits(), x.plus(y).to_bits()]));
            }
            let (x, y) = (f16::from_bits(a), f16::from_bits(b));
            let mut sums = vec![x; len];
            f16::add(&mut sums, &vec![y; len]);
            let exact = f16::from_f64(f64::from(x) + f64::from(y));
            for sum in sums {
                prop_assert!(same([sum.is_nan(), exact.is_nan()], [sum.to_bits(), exact.to_bits()]), "{x} + {y} = {sum}");
                prop_assert!(same([sum.is_nan(), x.plus(y).is_nan()], [sum.to_bits(), x.plus(y).to_bits()]));
            }
        }

        #[test]
        fn narrow_rounds_to_nearest_even_and_widen_is_exact(high in bits(), low in prop_oneof![Just(0x8000u16), Just(0x7fff), any::<u16>()], len in 1usize..40) {
            let value = f32::from_bits(u32::from(high) << 16 | u32::from(low));
            let mut narrowed = vec![bf16::ZERO; len];
            narrow(&vec![value; len], &mut narrowed);
            let expected = bf16::from_f32(value);
            let mut back = vec![0.0; len];
            widen(&narrowed, &mut back);
            for (n, b) in narrowed.iter().zip(back) {
                prop_assert!(same([n.is_nan(), expected.is_nan()], [n.to_bits(), expected.to_bits()]), "{value} to {n}");
                prop_assert!(b.to_bits() == n.to_f32().to_bits() || b.is_nan() && n.is_nan());
            }
        }
    }
}
