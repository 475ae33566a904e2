//! Evaluation on the test set, distributed: every sample counted exactly once.

use super::Number;
use super::error::TrainError;
use super::trainer::Trainer;
use crate::data::batch::Decoder;
use lockstep_collectives::{ReduceOp, Tag, TagKind};
use lockstep_common::ids::LogicalShard;
use lockstep_common::sampler::EvalPlan;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Samples that a shard evaluates at a time.
const BATCH: u64 = 100;

/// Averages of the task's evaluation figures over the test set. The same bits on any number of workers.
pub(crate) fn evaluate<T: Number>(
    trainer: &Trainer<T>,
    test: &Arc<Decoder<T>>,
) -> Result<BTreeMap<String, f64>, TrainError> {
    let names = trainer.plan.evaluation;
    let plan = EvalPlan::new(test.len(), trainer.job.logical_shards, BATCH)
        .map_err(|e| TrainError::Fatal(e.to_string()))?;
    let range = trainer.group.placement().range(trainer.group.rank());
    let owed: Vec<_> = range
        .zip(trainer.lanes())
        .map(|(shard, lane)| {
            let (shard, plan, test) = (LogicalShard(shard), plan.clone(), test.clone());
            let group = trainer.group.clone();
            lane.evaluate(move |task| {
                let mut sums = vec![0.0; names.len() + 1];
                for samples in plan.batches(shard) {
                    let batch = test.plain(samples)?;
                    for (sum, value) in sums[..names.len()].iter_mut().zip(task.evaluate(&batch)?) {
                        *sum += value;
                    }
                    sums[names.len()] += batch.samples.len() as f64;
                    // Ranks with fewer samples, or faster cores, wait for this one.
                    group.note_progress();
                }
                Ok(sums)
            })
        })
        .collect();
    let leaves = owed.into_iter().map(|o| o.wait()).collect::<Result<Vec<_>, _>>()?;
    let tag = Tag::new(trainer.replica.step, 0, TagKind::Evaluation);
    let sums = trainer.group.all_reduce(tag, leaves, ReduceOp::Sum)?.wait()?;
    let count = sums[names.len()];
    if count != test.len() as f64 {
        return Err(TrainError::Fatal(format!(
            "the evaluation counted {count} of {} test samples",
            test.len()
        )));
    }
    Ok(names.iter().zip(sums.iter()).map(|(name, sum)| ((*name).to_owned(), sum / count)).collect())
}
