//! What survives the coordinator's death: records, and checkpoints that are whole.

use crate::chain::State;
use lockstep_common::ids::{JobId, WorkerId};
use lockstep_core::{Action, JobRecord, Restored, WorkerRecord};
use std::collections::BTreeMap;

/// The coordinator's disk.
#[derive(Default)]
pub(crate) struct Store {
    jobs: BTreeMap<JobId, JobRecord>,
    workers: BTreeMap<WorkerId, WorkerRecord>,
    checkpoints: BTreeMap<JobId, BTreeMap<u64, State>>,
    /// No record can be written.
    pub(crate) records_full: bool,
    /// No checkpoint can be written.
    pub(crate) checkpoints_full: bool,
}

impl Store {
    /// What a coordinator that starts finds.
    pub(crate) fn restored(&self) -> Restored {
        Restored {
            jobs: self.jobs.values().cloned().collect(),
            workers: self.workers.values().cloned().collect(),
            ..Restored::default()
        }
    }

    /// The write of this action's record has reached the disk.
    pub(crate) fn write(&mut self, action: &Action) {
        match action {
            Action::PersistJob(record) => drop(self.jobs.insert(record.id, (**record).clone())),
            Action::PersistWorker(record) => drop(self.workers.insert(record.id, record.clone())),
            _ => {}
        }
    }

    /// A checkpoint becomes visible; all but the newest `keep` go.
    pub(crate) fn install(&mut self, job: JobId, state: State, keep: usize) {
        let kept = self.checkpoints.entry(job).or_default();
        kept.insert(state.position.step, state);
        while kept.len() > keep.max(1) {
            let oldest = kept.keys().copied().find(|step| *step != state.position.step);
            oldest.map(|step| kept.remove(&step));
        }
    }

    /// The newest checkpoint's step.
    pub(crate) fn newest(&self, job: JobId) -> Option<u64> {
        self.checkpoints.get(&job)?.keys().next_back().copied()
    }

    /// A checkpoint.
    pub(crate) fn checkpoint(&self, job: JobId, step: u64) -> Option<State> {
        self.checkpoints.get(&job)?.get(&step).copied()
    }
}
