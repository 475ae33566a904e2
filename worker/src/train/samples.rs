//! Which samples the shards were given, on its way to all ranks.
//!
//! The small sum that commits a phase carries two numbers for each logical shard, of which only the shard's own leaf has
//! any but zero.

use lockstep_common::audit::ShardSamples;
use lockstep_common::ids::LogicalShard;

/// Numbers for each shard.
const NUMBERS: usize = 2;

/// What the leaf of `shard`, one of so many `shards`, adds.
pub(super) fn leaf(shards: u32, shard: LogicalShard, samples: ShardSamples) -> Vec<f64> {
    let mut leaf = vec![0.0; shards as usize * NUMBERS];
    leaf[shard.index() * NUMBERS..][..NUMBERS].copy_from_slice(&samples.to_numbers());
    leaf
}

/// Splits the sum's numbers, behind those that come before, into all shards' samples and the rest.
pub(super) fn split(sums: &[f64], shards: u32) -> (Vec<ShardSamples>, &[f64]) {
    let (own, rest) = sums.split_at_checked(shards as usize * NUMBERS).unwrap_or_default();
    let (pairs, _) = own.as_chunks::<NUMBERS>();
    (pairs.iter().map(|pair| ShardSamples::from_numbers(*pair)).collect(), rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_all_leaves_has_every_shards_samples_and_the_rest() {
        let samples = [ShardSamples::of(&[3, 1]), ShardSamples::of(&[]), ShardSamples::of(&[70_000])];
        let leaves = (0..3).map(|s| leaf(3, LogicalShard(s), samples[s as usize]));
        let mut sums =
            leaves.fold(vec![0.0; 6], |sums, leaf| sums.iter().zip(leaf).map(|(a, b)| a + b).collect());
        sums.push(7.0);
        assert_eq!(split(&sums, 3), (samples.to_vec(), &[7.0][..]));
    }
}
