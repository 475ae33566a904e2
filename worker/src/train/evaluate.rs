//! Evaluation on the test set, distributed: every sample counted exactly once.

use super::Number;
use super::error::TrainError;
use super::trainer::Trainer;
use crate::data::batch::Decoder;
use crate::evaluation::judge::{batch, judge};
use crate::evaluation::report::{Report, Subject};
use crate::evaluation::tally::Tally;
use crate::fault::{self, Point};
use lockstep_collectives::{Tag, TagKind};
use lockstep_common::ids::LogicalShard;
use lockstep_common::sampler::EvalPlan;
use lockstep_common::wire::{decode, encode};
use lockstep_nn::models;
use std::sync::Arc;

/// Evaluates the network on the test set. The same bits on every rank, and on any number of workers.
pub(crate) fn evaluate<T: Number>(
    trainer: &Trainer<T>,
    test: &Arc<Decoder<T>>,
) -> Result<Report, TrainError> {
    let plan = EvalPlan::new(test.len(), trainer.job.logical_shards, batch(test.views()))
        .map_err(|e| TrainError::Fatal(e.to_string()))?;
    let range = trainer.group.placement().range(trainer.group.rank());
    let owed: Vec<_> = range
        .zip(trainer.lanes())
        .map(|(shard, lane)| {
            let (shard, plan, test) = (LogicalShard(shard), plan.clone(), test.clone());
            let (group, step) = (trainer.group.clone(), trainer.replica.step);
            lane.evaluate(move |task| {
                let progress = || {
                    fault::point(Point::Evaluation, step);
                    // Ranks with fewer samples, or faster cores, wait for this one.
                    group.note_progress();
                    group.failure().map_or(Ok(()), |cause| Err(cause.into()))
                };
                let mut tally = Tally::default();
                for samples in plan.batches(shard) {
                    for judged in judge(task, &test, samples, &progress)? {
                        tally.add(judged.label, &judged.views);
                    }
                }
                Ok(tally)
            })
        })
        .collect();
    let own = owed.into_iter().map(|o| o.wait()).collect::<Result<Vec<Tally>, _>>()?;
    let tally = add_up(trainer, &own)?;
    if tally.samples != test.len() {
        return Err(TrainError::Fatal(format!(
            "the evaluation counted {} of {} test samples",
            tally.samples,
            test.len()
        )));
    }
    let Some(model) = &trainer.job.model else {
        return Err(TrainError::Fatal("a job without a `[model]` is not evaluated".to_owned()));
    };
    let manifest = test.manifest();
    let subject = Subject {
        dataset: manifest.name.to_string(),
        classes: models::classes(model)? as usize,
        labels: manifest.classes as usize,
        names: manifest.class_names.clone(),
        crops: trainer.job.evaluation.crops,
    };
    Ok(Report::new(&subject, &tally))
}

/// The tallies of all shards, added in the order of shards.
fn add_up<T: Number>(trainer: &Trainer<T>, own: &[Tally]) -> Result<Tally, TrainError> {
    let own = encode(&own).map_err(|e| TrainError::Fatal(e.to_string()))?;
    let tag = Tag::new(trainer.replica.step, 0, TagKind::Evaluation);
    let mut sum = Tally::default();
    // Ranks own consecutive shards, in order.
    for (rank, bytes) in trainer.group.all_gather(tag, own)?.wait()?.iter().enumerate() {
        let tallies: Vec<Tally> = decode(bytes)
            .map_err(|_| TrainError::Fatal(format!("rank {rank} sent an unintelligible evaluation")))?;
        tallies.iter().for_each(|tally| sum.append(tally));
    }
    Ok(sum)
}
