//! What rank 0 tells the coordinator about steps: in batches, at most five a second.

use crate::control::Control;
use lockstep_common::ids::{Generation, JobId, Rank};
use lockstep_common::wire::{Assignment, FromWorker, StepRecord};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(200);

pub(crate) struct Reporter {
    control: Control,
    job: JobId,
    generation: Generation,
    /// Only rank 0 reports.
    speaks: bool,
    records: Vec<StepRecord>,
    sent: Instant,
}

impl Reporter {
    pub(crate) fn new(control: Control, assignment: &Assignment) -> Self {
        Self {
            control,
            job: assignment.job,
            generation: assignment.generation,
            speaks: assignment.rank == Rank(0),
            records: Vec::new(),
            sent: Instant::now(),
        }
    }

    /// Steps of earlier generations that the coordinator may not know. It leaves out those that it does.
    pub(crate) fn catch_up<'a>(&mut self, records: impl Iterator<Item = &'a StepRecord>) {
        if self.speaks {
            self.records.extend(records.cloned());
        }
    }

    /// A step is committed.
    pub(crate) fn step(&mut self, record: StepRecord) {
        if !self.speaks {
            return;
        }
        let last = record.step == record.total_steps;
        self.records.push(record);
        if self.sent.elapsed() >= INTERVAL || last {
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
        /// Many steps' records, and shards of them, in far less than a message may have.
        const RECORDS: usize = 500;
        const SHARDS: usize = 1 << 16;
        let shards = self.records.first().map_or(0, |record| record.shards.len());
        let at_a_time = (SHARDS / shards.max(1)).clamp(1, RECORDS);
        let (job, generation) = (self.job, self.generation);
        let mut rest = std::mem::take(&mut self.records).into_iter();
        loop {
            let records: Vec<StepRecord> = rest.by_ref().take(at_a_time).collect();
            if records.is_empty() {
                break;
            }
            self.control.tell(FromWorker::Steps { job, generation, records });
        }
        self.sent = Instant::now();
    }
}
