//! Forms in which numbers travel in fewer bytes.
//!
//! Each is an [`Element`](crate::Element) with an addition of its own, so that a compressed all-reduce is the same
//! tree as any other: whoever computes a node rounds it, and the result's bits depend neither on the number of ranks
//! nor on which shards they own.
//!
//! | element | bytes per number | relative error of one rounding |
//! |---|---|---|
//! | [`struct@f16`] | 2 | 2⁻¹¹ of the number, from 6·10⁻⁵ to 65504 |
//! | [`bf16`] | 2 | 2⁻⁸ of the number, in all of `f32`'s range |
//! | [`Block8`] | 1.06 | 1/254 of the largest number of its block of 64 |

mod block8;
mod halves;

pub use block8::Block8;
pub use half::{bf16, f16};
pub use halves::{narrow, widen};
