//! Which samples belong to which step and logical shard.
//!
//! (seed, epoch) determines a permutation of the dataset, (epoch, step) the global batch, and the logical shard
//! its part of that batch. Nothing here knows workers, so membership cannot change what is trained on.

use crate::ids::LogicalShard;
use crate::rng::Stream;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;

/// Epochs whose permutation is kept: loaders that prefetch across the end of an epoch need two at once.
const KEPT_EPOCHS: usize = 2;

/// A value from which no sampler or plan can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SamplerError {
    /// The dataset is empty.
    #[error("the dataset has no samples; import it again with `coordinator dataset add`")]
    NoSamples,
    /// The batch holds nothing.
    #[error("the batch size is 0; set it to at least 1")]
    EmptyBatch,
    /// There are no logical shards.
    #[error("the number of logical shards is 0; set `logical_shards` to at least 1")]
    NoShards,
}

/// The order in which a job sees its training samples.
#[derive(Debug)]
pub struct Sampler {
    seed: u64,
    samples: u64,
    global_batch: u64,
    logical_shards: u32,
    shuffle: bool,
    permutations: Mutex<Vec<(u64, Arc<[u64]>)>>,
}

/// A place in the order of training: the step within the epoch is the sampler's whole state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The epoch, from 0.
    pub epoch: u64,
    /// The step within the epoch, from 0.
    pub step_in_epoch: u64,
}

impl Sampler {
    /// A sampler of `samples` samples in batches of `global_batch`, each split over `logical_shards`. Without
    /// `shuffle`, samples come in the dataset's order.
    pub fn new(
        seed: u64,
        samples: u64,
        global_batch: u64,
        logical_shards: u32,
        shuffle: bool,
    ) -> Result<Self, SamplerError> {
        check(samples, global_batch, logical_shards)?;
        Ok(Self { seed, samples, global_batch, logical_shards, shuffle, permutations: Mutex::default() })
    }

    /// Steps that it takes to see every sample once; the last may be smaller than the others.
    pub fn steps_per_epoch(&self) -> u64 {
        self.samples.div_ceil(self.global_batch)
    }

    /// Where the job's `step`, counted from 0 over all epochs, lies.
    pub fn position(&self, step: u64) -> Position {
        let steps = self.steps_per_epoch();
        Position { epoch: step / steps, step_in_epoch: step % steps }
    }

    /// Samples in the global batch of this step, by which losses and gradients are averaged; 0 past the epoch.
    pub fn batch_size(&self, step_in_epoch: u64) -> u64 {
        let batch = self.batch(step_in_epoch);
        batch.end - batch.start
    }

    /// The samples of `shard` in this step, in order.
    ///
    /// The shards' sizes differ by at most one, the larger first; an uneven last batch may leave a shard
    /// without samples. Empty for a step past the epoch or a shard that does not exist.
    pub fn shard_samples(&self, epoch: u64, step_in_epoch: u64, shard: LogicalShard) -> Vec<u64> {
        let batch = self.batch(step_in_epoch);
        let part = part(batch.end - batch.start, self.logical_shards, shard);
        let range = batch.start + part.start..batch.start + part.end;
        if self.shuffle && !range.is_empty() {
            self.permutation(epoch)[range.start as usize..range.end as usize].to_vec()
        } else {
            range.collect()
        }
    }

    /// The batch as a range of places in the epoch's order.
    fn batch(&self, step_in_epoch: u64) -> Range<u64> {
        let start = step_in_epoch.saturating_mul(self.global_batch).min(self.samples);
        start..start.saturating_add(self.global_batch).min(self.samples)
    }

    fn permutation(&self, epoch: u64) -> Arc<[u64]> {
        let mut kept = self.permutations.lock();
        if let Some((_, order)) = kept.iter().find(|(e, _)| *e == epoch) {
            return order.clone();
        }
        let order: Arc<[u64]> = Stream::new(self.seed, "shuffle", &[epoch]).permutation(self.samples).into();
        if kept.len() == KEPT_EPOCHS {
            kept.remove(0);
        }
        kept.push((epoch, order.clone()));
        order
    }
}

/// How a test set is spread over the logical shards: contiguous parts, each sample exactly once.
///
/// Parts and batches depend on the job alone, so an evaluation adds up the same numbers in the same order on
/// any number of workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalPlan {
    samples: u64,
    logical_shards: u32,
    batch: u64,
}

impl EvalPlan {
    /// A plan for `samples` samples over `logical_shards`, in batches of `batch` within each shard.
    pub fn new(samples: u64, logical_shards: u32, batch: u64) -> Result<Self, SamplerError> {
        check(samples, batch, logical_shards)?;
        Ok(Self { samples, logical_shards, batch })
    }

    /// All samples of `shard`; empty for a shard that does not exist.
    pub fn shard_range(&self, shard: LogicalShard) -> Range<u64> {
        part(self.samples, self.logical_shards, shard)
    }

    /// The samples of `shard`, batch by batch.
    pub fn batches(&self, shard: LogicalShard) -> impl Iterator<Item = Range<u64>> + use<> {
        let (Range { start, end }, batch) = (self.shard_range(shard), self.batch);
        (0..(end - start).div_ceil(batch)).map(move |i| {
            let from = start + i * batch;
            from..from.saturating_add(batch).min(end)
        })
    }
}

fn check(samples: u64, batch: u64, logical_shards: u32) -> Result<(), SamplerError> {
    match (samples, batch, logical_shards) {
        (0, _, _) => Err(SamplerError::NoSamples),
        (_, 0, _) => Err(SamplerError::EmptyBatch),
        (_, _, 0) => Err(SamplerError::NoShards),
        _ => Ok(()),
    }
}

/// The part of `0..length` that belongs to `shard` when it is cut into `shards` parts whose sizes differ by at
/// most one, the larger first.
fn part(length: u64, shards: u32, shard: LogicalShard) -> Range<u64> {
    if shard.0 >= shards {
        return length..length;
    }
    let (each, larger, index) = (length / u64::from(shards), length % u64::from(shards), u64::from(shard.0));
    let start = index * each + index.min(larger);
    start..start + each + u64::from(index < larger)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shards(sampler: &Sampler, epoch: u64, step: u64) -> Vec<Vec<u64>> {
        (0..sampler.logical_shards).map(|s| sampler.shard_samples(epoch, step, LogicalShard(s))).collect()
    }

    fn epoch_order(sampler: &Sampler, epoch: u64) -> Vec<u64> {
        (0..sampler.steps_per_epoch()).flat_map(|step| shards(sampler, epoch, step).concat()).collect()
    }

    proptest! {
        #[test]
        fn every_sample_comes_once_per_epoch_in_parts_one_apart(
            seed: u64, epoch in 0u64..1000, samples in 1u64..500, batch in 1u64..70, parts in 1u32..12, shuffle: bool,
        ) {
            let sampler = Sampler::new(seed, samples, batch, parts, shuffle).unwrap();
            let steps = sampler.steps_per_epoch();
            for step in 0..steps {
                let sizes: Vec<_> = shards(&sampler, epoch, step).iter().map(Vec::len).collect();
                prop_assert_eq!(sizes.iter().sum::<usize>() as u64, sampler.batch_size(step));
                prop_assert!(sampler.batch_size(step) == batch || step == steps - 1);
                prop_assert!(sizes.is_sorted_by(|a, b| a >= b), "the larger come first: {:?}", sizes);
                prop_assert!(sizes[0] - sizes[sizes.len() - 1] <= 1);
            }
            let mut seen = epoch_order(&sampler, epoch);
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..samples).collect::<Vec<_>>());
            prop_assert_eq!(sampler.batch_size(steps), 0);
            prop_assert_eq!(shards(&sampler, epoch, steps).concat(), Vec::<u64>::new());
        }

        #[test]
        fn evaluation_counts_every_sample_once(samples in 1u64..3000, batch in 1u64..70, parts in 1u32..12) {
            let plan = EvalPlan::new(samples, parts, batch).unwrap();
            let mut seen = Vec::new();
            for shard in (0..parts).map(LogicalShard) {
                for b in plan.batches(shard) {
                    prop_assert!(!b.is_empty() && b.end - b.start <= batch);
                    prop_assert!(b.end - b.start == batch || b.end == plan.shard_range(shard).end);
                    seen.extend(b);
                }
            }
            prop_assert_eq!(seen, (0..samples).collect::<Vec<_>>());
        }
    }

    #[test]
    fn seed_and_epoch_alone_determine_the_order() {
        let order = |seed, epoch| epoch_order(&Sampler::new(seed, 1000, 64, 8, true).unwrap(), epoch);
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        assert_eq!(epoch_order(&Sampler::new(1, 10, 4, 2, false).unwrap(), 3), (0..10).collect::<Vec<_>>());
    }

    /// Pinned: another order would change the result of every job.
    #[test]
    fn the_order_is_stable_between_releases() {
        let sampler = Sampler::new(1, 60_000, 8, 2, true).unwrap();
        assert_eq!(shards(&sampler, 0, 0), [[38881, 33575, 56485, 23604], [25170, 57321, 9401, 32080]]);
    }

    /// The number of shards and the batch cut the same order differently; they do not change it.
    #[test]
    fn the_order_does_not_depend_on_how_it_is_cut() {
        let order = |batch, parts| epoch_order(&Sampler::new(5, 1000, batch, parts, true).unwrap(), 2);
        assert_eq!(order(64, 8), order(10, 3));
    }

    #[test]
    fn a_kept_permutation_is_the_one_of_its_epoch_in_any_order_of_asking() {
        let sampler = Sampler::new(1, 100, 10, 2, true).unwrap();
        let fresh = |epoch| epoch_order(&Sampler::new(1, 100, 10, 2, true).unwrap(), epoch);
        for epoch in [0, 1, 0, 2, 1, 3, 0] {
            assert_eq!(epoch_order(&sampler, epoch), fresh(epoch), "epoch {epoch}");
        }
        assert!(sampler.permutations.lock().len() <= KEPT_EPOCHS);
    }

    #[test]
    fn position_follows_steps_over_epochs() {
        let sampler = Sampler::new(1, 100, 30, 2, true).unwrap();
        assert_eq!(sampler.position(3), Position { epoch: 0, step_in_epoch: 3 });
        assert_eq!(sampler.position(4), Position { epoch: 1, step_in_epoch: 0 });
        assert_eq!(sampler.batch_size(3), 10);
    }

    #[test]
    fn senseless_values_are_refused_by_name() {
        assert_eq!(Sampler::new(1, 0, 1, 1, true).unwrap_err(), SamplerError::NoSamples);
        assert_eq!(Sampler::new(1, 1, 0, 1, true).unwrap_err(), SamplerError::EmptyBatch);
        assert_eq!(EvalPlan::new(1, 0, 1).unwrap_err(), SamplerError::NoShards);
    }
}
