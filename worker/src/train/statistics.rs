//! Running batch-norm statistics, brought up to date when a phase is committed.
//!
//! With synchronized batch norm every shard has seen the same global statistics. With local batch norm each shard
//! has its own; the running ones move towards their average, weighted by how many values each has seen, so that
//! all replicas hold the same bits.

use super::error::TrainError;
use lockstep_collectives::{Group, Numbers, Pending, ReduceOp, Tag, TagKind};
use lockstep_common::job::BatchNorm;
use lockstep_nn::forward::BnRecord;
use lockstep_nn::moments::{apply_running_stats, average_records, weighted_records};
use lockstep_nn::vars::Vars;

/// A phase's statistics on their way to being the same on all replicas.
pub(crate) struct PhaseStatistics {
    records: Vec<BnRecord>,
    pending: Option<Pending<Numbers<f64>>>,
}

impl PhaseStatistics {
    /// Starts to average the owned shards' `records` (by shard, in order) over all shards, where they differ.
    pub(crate) fn start(
        group: &Group,
        step: u64,
        phase: u16,
        modes: &[BatchNorm],
        mut records: Vec<Vec<BnRecord>>,
    ) -> Result<Self, TrainError> {
        let differ = modes.contains(&BatchNorm::Local);
        let pending = if differ && records.iter().any(|r| !r.is_empty()) {
            let leaves = records.iter().map(|r| weighted_records(r)).collect();
            let tag = Tag::new(step, phase, TagKind::Statistics).index(1);
            Some(group.all_reduce(tag, leaves, ReduceOp::Sum)?)
        } else {
            None
        };
        Ok(Self { records: if records.is_empty() { Vec::new() } else { records.swap_remove(0) }, pending })
    }

    /// The records to apply.
    pub(crate) fn finish(mut self) -> Result<Vec<BnRecord>, TrainError> {
        if let Some(pending) = self.pending {
            average_records(&mut self.records, pending.wait()?.as_slice())?;
        }
        Ok(self.records)
    }
}

/// Moves the running statistics in `vars`.
pub(super) fn apply<'a>(
    vars: &Vars,
    records: impl IntoIterator<Item = &'a BnRecord>,
) -> Result<(), TrainError> {
    Ok(apply_running_stats(vars, records)?)
}
