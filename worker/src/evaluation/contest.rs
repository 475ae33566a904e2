//! Several classifiers judge the same test set in this process.

use super::candidate::Network;
use super::judge::{Judged, judge};
use super::tally::Tally;
use super::views::Views;
use crate::data::batch::Decoder;
use crate::tasks::LaneTask;
use crate::train::Number;
use crate::train::error::TrainError;
use lockstep_common::ids::LogicalShard;
use lockstep_common::sampler::EvalPlan;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// A classifier and what it is shown. Its errors, and those of its judge, begin with its name.
pub(crate) trait Entrant {
    /// Test samples.
    fn samples(&self) -> u64;

    /// The classifier at work, for one thread.
    fn judge(&self) -> Result<Box<dyn Judge>, TrainError>;
}

/// A classifier at work.
pub(crate) trait Judge: Send {
    /// Judges `samples`.
    fn judge(&mut self, samples: Range<u64>) -> Result<Vec<Judged>, TrainError>;
}

/// How the work is divided.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Division {
    /// Parts of the test set whose sums are kept apart: V of the job whose evaluation this is to equal.
    pub(crate) shards: u32,
    /// Samples at a time.
    pub(crate) batch: u64,
    /// Threads that judge.
    pub(crate) threads: usize,
}

/// One network and its view of the data.
pub(crate) struct Entry<T> {
    /// What errors call it.
    pub(crate) name: String,
    pub(crate) network: Network,
    pub(crate) data: Arc<Decoder<T>>,
}

impl<T: Number> Entrant for Entry<T> {
    fn samples(&self) -> u64 {
        self.data.len()
    }

    fn judge(&self) -> Result<Box<dyn Judge>, TrainError> {
        let name = self.name.clone();
        let task = self.network.lane().map_err(|e| named(&name, &e))?;
        Ok(Box::new(Lane { name, task, data: self.data.clone() }))
    }
}

struct Lane<T> {
    name: String,
    task: Box<dyn LaneTask>,
    data: Arc<Decoder<T>>,
}

impl<T: Number> Judge for Lane<T> {
    fn judge(&mut self, samples: Range<u64>) -> Result<Vec<Judged>, TrainError> {
        judge(self.task.as_mut(), &self.data, samples, &|| Ok(())).map_err(|e| named(&self.name, &e))
    }
}

fn named(name: &str, error: &TrainError) -> TrainError {
    TrainError::Fatal(format!("{name}: {error}"))
}

/// The tallies of a test set: each entrant's, and that of all together.
pub(crate) struct Outcome {
    pub(crate) each: Vec<Tally>,
    /// Of the average of all entrants' softmax.
    pub(crate) together: Tally,
}

/// Lets `entrants`, who have the same test set and classes, judge all of it. `progress` hears of every sample done.
///
/// The same bits on any number of threads, and for each entrant those of its job's evaluation where the division is that
/// job's.
pub(crate) fn hold(
    entrants: &[Box<dyn Entrant>],
    division: Division,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Outcome, TrainError> {
    let samples = entrants.first().map_or(0, |entrant| entrant.samples());
    let plan = EvalPlan::new(samples, division.shards, division.batch)
        .map_err(|e| TrainError::Fatal(e.to_string()))?;
    let (next, failed) = (AtomicU32::new(0), AtomicBool::new(false));
    let teams: Vec<Vec<Box<dyn Judge>>> = (0..division.threads.min(division.shards as usize).max(1))
        .map(|_| entrants.iter().map(|entrant| entrant.judge()).collect())
        .collect::<Result<_, _>>()?;
    let work = &|mut team: Vec<Box<dyn Judge>>| -> Result<Vec<(u32, Vec<Tally>)>, TrainError> {
        // As in training: what a shard computes must not depend on how many cores there are.
        tch::set_num_threads(1);
        let mut done = Vec::new();
        loop {
            let shard = next.fetch_add(1, Ordering::Relaxed);
            if shard >= division.shards || failed.load(Ordering::Relaxed) {
                return Ok(done);
            }
            let tallies = tch::no_grad(|| judge_shard(&mut team, &plan, LogicalShard(shard), progress));
            failed.fetch_or(tallies.is_err(), Ordering::Relaxed);
            done.push((shard, tallies?));
        }
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = teams.into_iter().map(|team| scope.spawn(move || work(team))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut shards = Vec::new();
    for result in results {
        let panicked = |_| TrainError::Fatal("internal error: a thread panicked".to_owned());
        shards.extend(result.map_err(panicked)??);
    }
    shards.sort_by_key(|(shard, _)| *shard);
    let mut sums = vec![Tally::default(); entrants.len() + 1];
    for (_, tallies) in &shards {
        sums.iter_mut().zip(tallies).for_each(|(sum, tally)| sum.append(tally));
    }
    let together = sums.pop().unwrap_or_default();
    Ok(Outcome { each: sums, together })
}

/// The tallies of one shard: each judge's, then that of all together.
fn judge_shard(
    team: &mut [Box<dyn Judge>],
    plan: &EvalPlan,
    shard: LogicalShard,
    progress: &dyn Fn(u64),
) -> Result<Vec<Tally>, TrainError> {
    let mut tallies = vec![Tally::default(); team.len() + 1];
    for samples in plan.batches(shard) {
        let count = samples.end - samples.start;
        let judged =
            team.iter_mut().map(|judge| judge.judge(samples.clone())).collect::<Result<Vec<_>, _>>()?;
        for (tally, judged) in tallies.iter_mut().zip(&judged) {
            judged.iter().for_each(|one| tally.add(one.label, &one.views));
        }
        let together = tallies.len() - 1;
        for sample in 0..count as usize {
            let opinions: Vec<&Judged> = judged.iter().filter_map(|one| one.get(sample)).collect();
            if let Some(first) = opinions.first() {
                let views = Views::together(opinions.iter().map(|one| &one.views));
                tallies[together].add(first.label, &views);
            }
        }
        progress(count);
    }
    Ok(tallies)
}
