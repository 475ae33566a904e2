//! What rank 0 tells the coordinator about steps: in batches, at most five a second.

use crate::control::Control;
use lockstep_common::audit::ShardSamples;
use lockstep_common::ids::{Generation, JobId, Rank};
use lockstep_common::wire::{Assignment, FromWorker, StepRecord};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(200);

pub(crate) struct Reporter {
    control: Control,
    job: JobId,
    generation: Generation,
    total_steps: u64,
    /// Only rank 0 reports.
    speaks: bool,
    records: Vec<StepRecord>,
    sent: Instant,
}

impl Reporter {
    pub(crate) fn new(control: Control, assignment: &Assignment, total_steps: u64) -> Self {
        Self {
            control,
            job: assignment.job,
            generation: assignment.generation,
            total_steps,
            speaks: assignment.rank == Rank(0),
            records: Vec::new(),
            sent: Instant::now(),
        }
    }

    /// A step is committed.
    pub(crate) fn step(
        &mut self,
        step: u64,
        epoch: u64,
        samples: u64,
        seconds: f64,
        values: BTreeMap<String, f64>,
        shards: Vec<ShardSamples>,
    ) {
        if !self.speaks {
            return;
        }
        self.records.push(StepRecord {
            generation: self.generation,
            step,
            epoch,
            total_steps: self.total_steps,
            samples,
            seconds,
            values,
            shards,
        });
        if self.sent.elapsed() >= INTERVAL || step == self.total_steps {
            self.flush();
        }
    }

    /// Figures that belong to a step.
    pub(crate) fn metrics(&mut self, step: u64, epoch: u64, values: BTreeMap<String, f64>) {
        if self.speaks {
            self.flush();
            let (job, generation) = (self.job, self.generation);
            self.control.tell(FromWorker::Metrics { job, generation, step, epoch, values });
        }
    }

    /// A line for the job's log.
    pub(crate) fn log(&self, line: String) {
        if self.speaks {
            self.control.tell(FromWorker::Log { job: self.job, generation: self.generation, line });
        }
    }

    /// Sends what has gathered.
    pub(crate) fn flush(&mut self) {
        if !self.records.is_empty() {
            let records = std::mem::take(&mut self.records);
            self.control.tell(FromWorker::Steps { job: self.job, generation: self.generation, records });
        }
        self.sent = Instant::now();
    }
}
