//! What logical shards were given, in a form that adds up over ranks.

use serde::{Deserialize, Serialize};

/// How many bits a hash has. A number of so many is exact in an `f64`, in which it travels, and in JSON.
const HASH_BITS: u32 = 52;

/// The samples of one logical shard: how many, and a hash of their numbers in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct ShardSamples {
    /// How many.
    pub count: u64,
    /// Of their numbers, below 2^52.
    pub hash: u64,
}

impl From<(u64, u64)> for ShardSamples {
    fn from((count, hash): (u64, u64)) -> Self {
        Self { count, hash }
    }
}

impl From<ShardSamples> for (u64, u64) {
    fn from(samples: ShardSamples) -> Self {
        (samples.count, samples.hash)
    }
}

impl ShardSamples {
    /// Those that a shard was given in one phase.
    pub fn of(samples: &[u64]) -> Self {
        let mut hasher = blake3::Hasher::new();
        samples.iter().for_each(|sample| {
            hasher.update(&sample.to_le_bytes());
        });
        Self { count: samples.len() as u64, hash: truncated(&hasher) }
    }

    /// As two numbers that a sum over all shards, of which only this one's owner gives any but zero, brings to all.
    pub fn to_numbers(self) -> [f64; 2] {
        [self.count as f64, self.hash as f64]
    }

    /// What [`Self::to_numbers`] gave.
    pub fn from_numbers([count, hash]: [f64; 2]) -> Self {
        Self { count: count as u64, hash: hash as u64 }
    }
}

/// What all shards were given in the phases of a step, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepAudit(Vec<ShardSamples>);

impl StepAudit {
    /// Adds a phase. A minibatch counts in the first phase that sees it; its samples enter the hash in each.
    pub fn add_phase(&mut self, shards: impl IntoIterator<Item = ShardSamples>, first_of_minibatch: bool) {
        for (shard, phase) in shards.into_iter().enumerate() {
            if shard == self.0.len() {
                self.0.push(ShardSamples::default());
            }
            let step = &mut self.0[shard];
            let mut hasher = blake3::Hasher::new();
            hasher.update(&step.hash.to_le_bytes()).update(&phase.hash.to_le_bytes());
            step.hash = truncated(&hasher);
            step.count += if first_of_minibatch { phase.count } else { 0 };
        }
    }

    /// The whole step, by shard.
    pub fn into_shards(self) -> Vec<ShardSamples> {
        self.0
    }
}

fn truncated(hasher: &blake3::Hasher) -> u64 {
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    u64::from_le_bytes(bytes) >> (u64::BITS - HASH_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_number_and_presence_of_samples_count() {
        let hashes = [&[][..], &[0], &[0, 0], &[1, 2], &[2, 1], &[258]].map(|s| ShardSamples::of(s).hash);
        for (i, a) in hashes.iter().enumerate() {
            assert!(*a > 0 && *a < 1 << HASH_BITS);
            assert!(hashes[i + 1..].iter().all(|b| a != b), "hash {i} is not unique: {hashes:?}");
        }
    }

    #[test]
    fn numbers_survive_a_sum_with_the_other_shards_zeros() {
        for samples in [vec![], vec![7], (0..100).collect()] {
            let samples = ShardSamples::of(&samples);
            let sums = samples.to_numbers().map(|n| 0.0 + n + 0.0);
            assert_eq!(ShardSamples::from_numbers(sums), samples);
        }
        let most = ShardSamples { count: u32::MAX.into(), hash: (1 << HASH_BITS) - 1 };
        assert_eq!(ShardSamples::from_numbers(most.to_numbers()), most);
    }

    #[test]
    fn a_minibatch_seen_by_two_phases_counts_once_and_is_hashed_twice() {
        let (real, other) = (ShardSamples::of(&[1, 2]), ShardSamples::of(&[3]));
        let step = |phases: &[(ShardSamples, bool)]| {
            let mut step = StepAudit::default();
            phases.iter().for_each(|(samples, first)| step.add_phase([*samples], *first));
            step.into_shards()[0]
        };
        let both = step(&[(real, true), (real, false)]);
        assert_eq!(both.count, 2);
        assert_ne!(both.hash, step(&[(real, true)]).hash);
        assert_ne!(both.hash, step(&[(real, true), (other, false)]).hash);
        assert_eq!(step(&[(real, true), (other, true)]).count, 3);
    }
}
