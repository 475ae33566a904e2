//! The checker: recomputes from the job file what the audit must say.

use super::line::{AuditEntry, AuditLine, AuditStart};
use super::samples::{ShardSamples, StepAudit};
use crate::ids::{Generation, LogicalShard};
use crate::job::JobSpec;
use crate::sampler::{Sampler, SamplerError};
use crate::wire::Position;
use thiserror::Error;

/// What has been proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proof {
    /// Each of the steps 1 to this one counted exactly once.
    pub steps: u64,
    /// All steps of the job.
    pub total_steps: u64,
    /// Epochs in which every sample counted exactly once; in the one after them no sample counted twice.
    pub epochs: u64,
    /// Samples counted over all epochs.
    pub samples: u64,
    /// Generations that were started.
    pub generations: u64,
    /// Steps that were committed, undone by the end of their generation and done again.
    pub undone: u64,
}

impl Proof {
    /// Whether the audit covers the job to its last step.
    pub fn is_complete(&self) -> bool {
        self.steps == self.total_steps
    }
}

/// What an audit cannot say if every sample counted once.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Violation {
    /// A line is damaged.
    #[error("line {line} is damaged: {problem}")]
    Syntax {
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The job has no sampler.
    #[error("{0}")]
    Sampler(#[from] SamplerError),
    /// Generations do not follow each other.
    #[error("line {line}: {generation} starts after {newest}")]
    Generations {
        /// The line.
        line: u64,
        /// The generation that starts.
        generation: Generation,
        /// The newest one before.
        newest: Generation,
    },
    /// A step was committed by a generation that never started.
    #[error("line {line}: step {step} was committed by {generation}, which never started")]
    NeverStarted {
        /// The line.
        line: u64,
        /// The step.
        step: u64,
        /// Its generation.
        generation: Generation,
    },
    /// A step is not there.
    #[error("step {step} is missing: line {line} goes on with step {next}")]
    Missing {
        /// The line.
        line: u64,
        /// The missing step.
        step: u64,
        /// The one that comes instead.
        next: u64,
    },
    /// A step counted twice.
    #[error("step {step} counted twice: line {line} has it again, from {generation}")]
    Twice {
        /// The line.
        line: u64,
        /// The step.
        step: u64,
        /// The generation that committed it again.
        generation: Generation,
    },
    /// A generation committed a step on the wrong side of where the newest one starts.
    #[error("line {line}: step {step} was committed by {generation}, though {newest} starts from {from}")]
    Side {
        /// The line.
        line: u64,
        /// The step.
        step: u64,
        /// The generation that committed it.
        generation: Generation,
        /// The newest generation.
        newest: Generation,
        /// Where that one starts.
        from: Position,
    },
    /// There are more steps than the job has.
    #[error("line {line}: step {step} of a job of {total} steps")]
    Beyond {
        /// The line.
        line: u64,
        /// The step.
        step: u64,
        /// The job's steps.
        total: u64,
    },
    /// A step is in the wrong epoch.
    #[error("line {line}: step {step} is said to be of epoch {found}; it is of epoch {expected}")]
    Epoch {
        /// The line.
        line: u64,
        /// The step.
        step: u64,
        /// The epoch in the audit.
        found: u64,
        /// The right one.
        expected: u64,
    },
    /// A step has not as many logical shards as the job.
    #[error("line {line}: step {step} has {found} shards instead of {expected}")]
    Shards {
        /// The line.
        line: u64,
        /// The step.
        step: u64,
        /// Shards in the audit.
        found: usize,
        /// V.
        expected: u32,
    },
    /// A shard was given fewer or more samples than it should.
    #[error("step {step}, {shard}: {found} samples counted instead of {expected} (line {line})")]
    Count {
        /// The line.
        line: u64,
        /// The step.
        step: u64,
        /// The shard.
        shard: LogicalShard,
        /// Samples in the audit.
        found: u64,
        /// Samples that it should have been given.
        expected: u64,
    },
    /// A shard was given the right number of other samples.
    #[error(
        "step {step}, {shard}: other samples counted than those of its place in epoch {epoch} (line {line})"
    )]
    Samples {
        /// The line.
        line: u64,
        /// The step.
        step: u64,
        /// The shard.
        shard: LogicalShard,
        /// The epoch.
        epoch: u64,
    },
    /// The sampler itself is wrong.
    #[error("step {step}, {shard}: sample {sample} comes a second time in epoch {epoch}")]
    Repeated {
        /// The step.
        step: u64,
        /// The shard.
        shard: LogicalShard,
        /// The sample.
        sample: u64,
        /// The epoch.
        epoch: u64,
    },
    /// The sampler itself leaves a sample out.
    #[error("sample {sample} does not come in epoch {epoch}")]
    LeftOut {
        /// The sample.
        sample: u64,
        /// The epoch.
        epoch: u64,
    },
}

/// Checks the whole text of an `audit.jsonl` against the job and the number of samples in its training set.
///
/// A last line without an end is one that is being written, or was when its coordinator was killed: nobody was told
/// that it is there, so it does not count.
pub fn check(job: &JobSpec, samples: u64, text: &[u8]) -> Result<Proof, Violation> {
    let mut checker = Checker::new(job, samples)?;
    for line in text.split_inclusive(|b| *b == b'\n') {
        if let Some(line) = line.strip_suffix(b"\n") {
            checker.handle_line(line)?;
        }
    }
    checker.finish()
}

/// [`check`] line by line, for audits that are larger than memory.
pub struct Checker {
    sampler: Sampler,
    shards: u32,
    samples: u64,
    /// The minibatch that each phase of a step sees.
    phases: Vec<usize>,
    per_step: u64,
    total_steps: u64,
    line: u64,
    /// The newest generation and where it started.
    newest: Option<(Generation, Position)>,
    /// Steps 1 to this one count.
    counted: u64,
    generations: u64,
    undone: u64,
}

impl Checker {
    /// A checker for an audit of `job`, whose training set has so many `samples`.
    pub fn new(job: &JobSpec, samples: u64) -> Result<Self, Violation> {
        let sampler = Sampler::new(job.seed, samples, u64::from(job.global_batch), job.logical_shards, true)?;
        let phases = job.phase_minibatches();
        let per_step = phases.iter().max().map_or(1, |m| *m as u64 + 1);
        let total_steps = job.total_steps(sampler.steps_per_epoch().div_ceil(per_step));
        Ok(Self {
            sampler,
            shards: job.logical_shards,
            samples,
            phases,
            per_step,
            total_steps,
            line: 0,
            newest: None,
            counted: 0,
            generations: 0,
            undone: 0,
        })
    }

    /// The next line, without its end.
    pub fn handle_line(&mut self, json: &[u8]) -> Result<(), Violation> {
        self.line += 1;
        match AuditLine::from_json(json) {
            Ok(AuditLine::Start(start)) => self.handle_start(&start),
            Ok(AuditLine::Entry(entry)) => self.handle_entry(&entry),
            Err(e) => Err(Violation::Syntax { line: self.line, problem: e.to_string() }),
        }
    }

    fn handle_start(&mut self, start: &AuditStart) -> Result<(), Violation> {
        let (line, generation) = (self.line, start.generation);
        if let Some((newest, _)) = self.newest
            && newest >= generation
        {
            return Err(Violation::Generations { line, generation, newest });
        }
        self.newest = Some((generation, start.from));
        self.generations += 1;
        self.undone += self.counted.saturating_sub(start.from.step);
        self.counted = self.counted.min(start.from.step);
        Ok(())
    }

    fn handle_entry(&mut self, entry: &AuditEntry) -> Result<(), Violation> {
        let (line, step, generation) = (self.line, entry.step, entry.generation);
        let Some((newest, from)) = self.newest.filter(|(newest, _)| *newest >= generation) else {
            return Err(Violation::NeverStarted { line, step, generation });
        };
        if step <= self.counted {
            return Err(Violation::Twice { line, step, generation });
        }
        if step != self.counted + 1 {
            return Err(Violation::Missing { line, step: self.counted + 1, next: step });
        }
        if (generation == newest) != (step > from.step) {
            return Err(Violation::Side { line, step, generation, newest, from });
        }
        if step > self.total_steps {
            return Err(Violation::Beyond { line, step, total: self.total_steps });
        }
        self.compare(entry)?;
        self.counted = step;
        Ok(())
    }

    /// Compares what the shards were given with what they should have been.
    fn compare(&self, entry: &AuditEntry) -> Result<(), Violation> {
        let (line, step) = (self.line, entry.step);
        let (epoch, places) = self.places(step);
        if entry.epoch != epoch + 1 {
            return Err(Violation::Epoch { line, step, found: entry.epoch, expected: epoch + 1 });
        }
        if entry.shards.len() != self.shards as usize {
            return Err(Violation::Shards { line, step, found: entry.shards.len(), expected: self.shards });
        }
        for (shard, found) in (0..).map(LogicalShard).zip(&entry.shards) {
            let expected = self.expected(epoch, &places, shard);
            if found.count != expected.count {
                let (found, expected) = (found.count, expected.count);
                return Err(Violation::Count { line, step, shard, found, expected });
            }
            if *found != expected {
                return Err(Violation::Samples { line, step, shard, epoch: epoch + 1 });
            }
        }
        Ok(())
    }

    /// The epoch, from 0, of a step, and the places of its minibatches in the epoch's order.
    fn places(&self, step: u64) -> (u64, Vec<u64>) {
        let batches = self.sampler.steps_per_epoch();
        let steps = batches.div_ceil(self.per_step);
        let (epoch, first) = ((step - 1) / steps, (step - 1) % steps * self.per_step);
        (epoch, (first..batches.min(first + self.per_step)).collect())
    }

    /// The samples that `step`, from 1, has been given or should be: its epoch, from 1, and for each of its minibatches, for
    /// each logical shard, their numbers in the dataset.
    pub fn samples(&self, step: u64) -> (u64, Vec<Vec<Vec<u64>>>) {
        let (epoch, places) = self.places(step.max(1));
        let shard = |place, shard| self.sampler.shard_samples(epoch, place, LogicalShard(shard));
        let minibatch = |place: &u64| (0..self.shards).map(|s| shard(*place, s)).collect();
        (epoch + 1, places.iter().map(minibatch).collect())
    }

    fn expected(&self, epoch: u64, places: &[u64], shard: LogicalShard) -> ShardSamples {
        let mut step = StepAudit::default();
        let mut seen = 0;
        for &minibatch in &self.phases {
            let Some(&place) = places.get(minibatch) else { continue };
            let samples = self.sampler.shard_samples(epoch, place, shard);
            step.add_phase([ShardSamples::of(&samples)], minibatch >= seen);
            seen = seen.max(minibatch + 1);
        }
        step.into_shards().first().copied().unwrap_or_default()
    }

    /// The proof for all lines so far.
    ///
    /// All steps that count have been seen to hold the sampler's samples. What is left is that the sampler's samples
    /// are each of the training set's exactly once.
    pub fn finish(&self) -> Result<Proof, Violation> {
        let mut proof = Proof {
            steps: self.counted,
            total_steps: self.total_steps,
            epochs: 0,
            samples: 0,
            generations: self.generations,
            undone: self.undone,
        };
        let steps = self.sampler.steps_per_epoch().div_ceil(self.per_step);
        for epoch in 0..self.counted.div_ceil(steps) {
            let last = ((epoch + 1) * steps).min(self.counted);
            let mut seen = vec![false; self.samples as usize];
            for step in epoch * steps + 1..=last {
                proof.samples += self.mark(epoch, step, &mut seen)?;
            }
            if last == (epoch + 1) * steps {
                if let Some(sample) = seen.iter().position(|seen| !seen) {
                    return Err(Violation::LeftOut { sample: sample as u64, epoch: epoch + 1 });
                }
                proof.epochs += 1;
            }
        }
        Ok(proof)
    }

    /// Marks the samples of a step as seen and says how many they are.
    fn mark(&self, epoch: u64, step: u64, seen: &mut [bool]) -> Result<u64, Violation> {
        let mut count = 0;
        for place in self.places(step).1 {
            for shard in (0..self.shards).map(LogicalShard) {
                for sample in self.sampler.shard_samples(epoch, place, shard) {
                    let first =
                        seen.get_mut(sample as usize).is_some_and(|seen| !std::mem::replace(seen, true));
                    if !first {
                        return Err(Violation::Repeated { step, shard, sample, epoch: epoch + 1 });
                    }
                    count += 1;
                }
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
