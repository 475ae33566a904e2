//! Randomness that depends on what it is for, never on who draws it or when.
//!
//! Every random number of a job comes from a [`Stream`] keyed by the job's seed, a purpose and coordinates such
//! as (epoch, sample). Two workers that draw for the same purpose and coordinates draw the same numbers, so
//! moving a logical shard from one worker to another changes nothing.
//!
//! The generator is ChaCha8, whose output is fixed by its definition; the transformations to other
//! distributions are written here and use `libm`, because those of other crates may change between releases
//! and a platform's own `ln` or `cos` may differ in the last bit.

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

/// A reproducible stream of random numbers.
#[derive(Clone, Debug)]
pub struct Stream {
    rng: ChaCha8Rng,
    spare_normal: Option<f64>,
}

impl Stream {
    /// The stream for `purpose` at `coordinates` under the job's `seed`.
    ///
    /// The key is BLAKE3 in key-derivation mode over all three, with the purpose's length, so that no two
    /// different triples share a key.
    pub fn new(seed: u64, purpose: &str, coordinates: &[u64]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("lockstep 2026-11 random stream");
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(purpose.len() as u64).to_le_bytes());
        hasher.update(purpose.as_bytes());
        for c in coordinates {
            hasher.update(&c.to_le_bytes());
        }
        Self { rng: ChaCha8Rng::from_seed(*hasher.finalize().as_bytes()), spare_normal: None }
    }

    /// 32 uniform bits.
    pub fn next_u32(&mut self) -> u32 {
        self.rng.next_u32()
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.rng.next_u64()
    }

    /// Fills `bytes` with uniform bits.
    pub fn fill_bytes(&mut self, bytes: &mut [u8]) {
        self.rng.fill_bytes(bytes);
    }

    /// Uniform in `0..n` without bias (Lemire's multiplication with rejection). `n` must not be 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "below(0) has no value to return");
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// Uniform in [0, 1) with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in [`low`, `high`).
    pub fn uniform_in(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Standard normal (Box–Muller, both values used).
    pub fn normal(&mut self) -> f64 {
        if let Some(z) = self.spare_normal.take() {
            return z;
        }
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.uniform()));
        let angle = 2.0 * std::f64::consts::PI * self.uniform();
        self.spare_normal = Some(radius * libm::sin(angle));
        radius * libm::cos(angle)
    }

    /// True with probability `p`.
    pub fn bernoulli(&mut self, p: f64) -> bool {
        self.uniform() < p
    }

    /// A uniformly random permutation of `0..n` (Fisher–Yates).
    pub fn permutation(&mut self, n: u64) -> Vec<u64> {
        let mut order: Vec<u64> = (0..n).collect();
        for i in (1..order.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            order.swap(i, j);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_key_same_numbers_other_key_other_numbers() {
        let draw = |seed, purpose, at: &[u64]| Stream::new(seed, purpose, at).next_u64();
        assert_eq!(draw(1, "dropout", &[3, 4]), draw(1, "dropout", &[3, 4]));
        assert_ne!(draw(1, "dropout", &[3, 4]), draw(2, "dropout", &[3, 4]));
        assert_ne!(draw(1, "dropout", &[3, 4]), draw(1, "flip", &[3, 4]));
        assert_ne!(draw(1, "dropout", &[3, 4]), draw(1, "dropout", &[4, 3]));
    }

    /// Pinned: a change of these values would change every run of every user.
    #[test]
    fn streams_are_stable_between_releases() {
        let mut s = Stream::new(1, "test", &[2, 3]);
        let drawn =
            (s.next_u64(), s.below(1000), s.uniform().to_bits(), s.normal().to_bits(), s.normal().to_bits());
        let pinned = (
            14_231_912_902_681_171_022,
            877,
            4_601_907_752_553_812_758,
            4_610_825_477_077_220_577,
            4_601_075_749_703_559_897,
        );
        assert_eq!(drawn, pinned);
    }

    #[test]
    fn permutation_holds_every_value_once() {
        let mut order = Stream::new(7, "shuffle", &[0]).permutation(1000);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let mut s = Stream::new(5, "normal", &[]);
        let n = 200_000;
        let draws: Vec<f64> = (0..n).map(|_| s.normal()).collect();
        let mean = draws.iter().sum::<f64>() / n as f64;
        let var = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        // Five standard errors: 1/sqrt(n) for the mean, sqrt(2/n) for the variance.
        assert!(mean.abs() < 5.0 / (n as f64).sqrt(), "mean {mean}");
        assert!((var - 1.0).abs() < 5.0 * (2.0 / n as f64).sqrt(), "variance {var}");
    }

    #[test]
    fn below_is_uniform() {
        let mut s = Stream::new(5, "below", &[]);
        let mut counts = [0u32; 6];
        for _ in 0..60_000 {
            counts[s.below(6) as usize] += 1;
        }
        // Each count is binomial(60000, 1/6): standard deviation 91.
        assert!(counts.iter().all(|&c| (f64::from(c) - 10_000.0).abs() < 5.0 * 91.3), "{counts:?}");
    }
}
