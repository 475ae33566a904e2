//! What a forward pass knows beside its input: which step and samples it is for, and whom batch norm talks to.

use crate::error::NnError;
use lockstep_common::ids::LogicalShard;
use std::collections::HashMap;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// One batch norm in one pass; the same on all logical shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BnCall {
    /// The network, as the trainer numbers them.
    pub network: u16,
    /// The layer's number within its network, in the order of construction.
    pub layer: u32,
    /// Which use of the layer within the phase, from 0: a discriminator sees real images, then fake ones.
    pub use_index: u16,
    /// Whether this is the exchange of the backward pass.
    pub backward: bool,
}

/// The exchange behind synchronized batch norm. Every logical shard makes the same calls in the same order;
/// each returns the merged values to all of them.
pub trait BatchNormSync: Send + Sync {
    /// Merges `[n, mean[C], M2[C]]` over all shards, as [`merge_moments`](crate::moments::merge_moments) does.
    fn merge_moments(&self, call: BnCall, shard: LogicalShard, local: Vec<f64>) -> Result<Vec<f64>, NnError>;

    /// Adds the shards' values.
    fn sum(&self, call: BnCall, shard: LogicalShard, local: Vec<f64>) -> Result<Vec<f64>, NnError>;

    /// Whether there is one shard only, so that what is merged is what it was.
    fn is_alone(&self) -> bool;
}

/// No exchange: each shard is a batch by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalOnly;

impl BatchNormSync for LocalOnly {
    fn merge_moments(&self, _: BnCall, _: LogicalShard, local: Vec<f64>) -> Result<Vec<f64>, NnError> {
        Ok(local)
    }

    fn sum(&self, _: BnCall, _: LogicalShard, local: Vec<f64>) -> Result<Vec<f64>, NnError> {
        Ok(local)
    }

    fn is_alone(&self) -> bool {
        true
    }
}

/// The statistics of one batch in one layer, for the trainer to apply when the step is committed.
#[derive(Clone, Debug, PartialEq)]
pub struct BnRecord {
    /// The network, as the trainer numbers them.
    pub network: u16,
    /// The layer's full name.
    pub layer: String,
    /// The share of this batch in the running statistics.
    pub momentum: f64,
    /// Values per channel: samples times positions.
    pub count: f64,
    /// Mean per channel.
    pub mean: Vec<f64>,
    /// Variance per channel with divisor n − 1, as running statistics hold it.
    pub var_unbiased: Vec<f64>,
}

impl BnRecord {
    /// Takes over `[mean[C], M2[C]]`.
    pub(crate) fn set_moments(&mut self, moments: &[f64]) {
        let (mean, m2) = moments.split_at(moments.len() / 2);
        let degrees = (self.count - 1.0).max(1.0);
        self.mean = mean.to_vec();
        self.var_unbiased = m2.iter().map(|v| v / degrees).collect();
    }
}

/// The context of one logical shard's forward pass, through all networks of one phase.
pub struct Forward {
    /// Whether this is training: batch statistics and dropout.
    pub train: bool,
    /// The job's seed.
    pub seed: u64,
    /// The step.
    pub step: u64,
    /// The phase within the step.
    pub phase: u16,
    /// The logical shard that computes.
    pub shard: LogicalShard,
    /// The number of the network that computes, set by the trainer before it calls each.
    pub network: u16,
    /// Whether batch statistics are recorded for the running ones.
    pub update_stats: bool,
    /// A number for each row of the input that is the same whoever computes the row.
    pub samples: Vec<u64>,
    /// Whom synchronized batch norm talks to.
    pub sync: Arc<dyn BatchNormSync>,
    /// Batch statistics so far, in the order of the calls, which is the same on all shards.
    pub(crate) records: Vec<BnRecord>,
    late: Vec<Late>,
    uses: HashMap<(u16, String), u16>,
    draws: HashMap<(u16, String), u16>,
}

/// What a GPU has normalized with, for a record.
struct Late {
    /// Of the record.
    place: usize,
    /// Mean [C] and inverse standard deviation [C].
    statistics: [Tensor; 2],
    /// In the variance of the latter.
    eps: f64,
}

impl Forward {
    /// A training pass over `samples` in network 0 and phase 0.
    pub fn training(
        seed: u64,
        step: u64,
        shard: LogicalShard,
        samples: Vec<u64>,
        sync: Arc<dyn BatchNormSync>,
    ) -> Self {
        Self {
            train: true,
            seed,
            step,
            phase: 0,
            shard,
            network: 0,
            update_stats: true,
            samples,
            sync,
            records: Vec::new(),
            late: Vec::new(),
            uses: HashMap::new(),
            draws: HashMap::new(),
        }
    }

    /// An evaluation pass: running statistics, no randomness, no exchange.
    pub fn evaluation() -> Self {
        let mut forward = Self::training(0, 0, LogicalShard(0), Vec::new(), Arc::new(LocalOnly));
        forward.train = false;
        forward.update_stats = false;
        forward
    }

    /// Goes on with the next piece of the shard's batch, of these `samples`. What is random for a sample does not depend on
    /// the piece that it is in.
    pub fn begin_piece(&mut self, samples: &[u64]) {
        samples.clone_into(&mut self.samples);
        self.draws.clear();
    }

    /// Records what a GPU has seen: mean [C] and inverse standard deviation [C], with `eps` in the variance.
    pub(crate) fn record_later(&mut self, record: BnRecord, statistics: [Tensor; 2], eps: f64) {
        self.late.push(Late { place: self.records.len(), statistics, eps });
        self.records.push(record);
    }

    /// The records so far, and none are left. Waits for a GPU.
    pub fn take_records(&mut self) -> Result<Vec<BnRecord>, NnError> {
        let late = std::mem::take(&mut self.late);
        if !late.is_empty() {
            let all: Vec<_> = late.iter().flat_map(|late| &late.statistics).collect();
            let all = Tensor::f_cat(&all, 0)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
            let all = Vec::<f64>::try_from(all)?;
            let mut rest = all.as_slice();
            for Late { place, statistics, eps } in late {
                let record = &mut self.records[place];
                let (mean, others) = rest.split_at(statistics[0].numel());
                let (inverse_std, others) = others.split_at(mean.len());
                rest = others;
                let variance = |inverse: &f64| match inverse.powi(-2) - eps {
                    // Rounded away; NaN stays.
                    variance if variance < 0.0 => 0.0,
                    variance => variance,
                };
                let m2 = inverse_std.iter().map(|inverse| variance(inverse) * record.count);
                record.set_moments(&mean.iter().copied().chain(m2).collect::<Vec<_>>());
            }
        }
        Ok(std::mem::take(&mut self.records))
    }

    /// How often the layer `name` of the current network has been used in this phase before.
    pub(crate) fn use_index(&mut self, name: &str) -> u16 {
        count(&mut self.uses, (self.network, name))
    }

    /// How often the random operation `name` of the current network has been used for these samples before.
    pub(crate) fn draw_index(&mut self, name: &str) -> u16 {
        count(&mut self.draws, (self.network, name))
    }
}

/// Counts one more of it; returns how many there were.
fn count(counts: &mut HashMap<(u16, String), u16>, (network, name): (u16, &str)) -> u16 {
    let count = counts.entry((network, name.to_owned())).or_default();
    *count += 1;
    *count - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_gpu_has_seen_is_read_into_the_records_in_their_order() {
        let mut forward = Forward::training(1, 0, LogicalShard(0), Vec::new(), Arc::new(LocalOnly));
        let record = |count, mean| BnRecord {
            network: 0,
            layer: "bn".to_owned(),
            momentum: 0.1,
            count,
            mean,
            var_unbiased: Vec::new(),
        };
        let eps = 1e-3;
        let statistics = |means: &[f64], variances: &[f64]| {
            let inverse: Vec<_> = variances.iter().map(|variance| (variance + eps).sqrt().recip()).collect();
            [Tensor::from_slice(means), Tensor::from_slice(&inverse)]
        };
        forward.record_later(record(5.0, Vec::new()), statistics(&[1.0, 2.0], &[4.0, 0.0]), eps);
        forward.records.push(record(3.0, vec![7.0]));
        forward.record_later(record(1.0, Vec::new()), statistics(&[f64::NAN], &[f64::NAN]), eps);
        let records = forward.take_records().unwrap();
        assert!(forward.take_records().unwrap().is_empty());
        assert_eq!((&records[0].mean[..], &records[1].mean[..]), (&[1.0, 2.0][..], &[7.0][..]));
        // 5 / 4 of the biased variance.
        assert!((records[0].var_unbiased[0] - 5.0).abs() < 1e-12);
        assert!(records[0].var_unbiased[1].abs() < 1e-15);
        assert!(records[2].mean[0].is_nan() && records[2].var_unbiased[0].is_nan());
    }
}
