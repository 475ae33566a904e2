//! What is kept of a job and of a worker: the records survive a restart of the coordinator.

use crate::cause::Cause;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::placement::Placement;
use lockstep_common::wire::{DatasetBrief, JobState, StopMode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// A job as it is submitted, already checked.
#[derive(Clone, Debug, PartialEq)]
pub struct NewJob {
    /// The job file's name, for messages.
    pub file: String,
    /// The job file.
    pub toml: String,
    /// The job's name.
    pub name: String,
    /// V.
    pub logical_shards: u32,
    /// The job waits until this many workers are free.
    pub min_workers: u32,
    /// The job never takes more.
    pub max_workers: u32,
    /// How many checkpoints are kept.
    pub keep_checkpoints: u32,
    /// Its datasets by content.
    pub datasets: Vec<DatasetBrief>,
    /// Waits for exactly this many workers, whatever the range says, as long as nobody has its state in memory.
    pub wait_for: Option<u32>,
    /// Whether its workers can hand its whole state over from memory to memory.
    pub state_in_memory: bool,
    /// How long its workers may step without a word from their coordinator.
    pub orphan_timeout_ms: u64,
}

/// All that is kept of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Its number.
    pub id: JobId,
    /// The job file's name, for messages.
    pub file: String,
    /// The job file.
    pub toml: String,
    /// Its name.
    pub name: String,
    /// V.
    pub logical_shards: u32,
    /// The smallest membership.
    pub min_workers: u32,
    /// The largest membership.
    pub max_workers: u32,
    /// How many checkpoints are kept.
    pub keep_checkpoints: u32,
    /// Its datasets by content.
    pub datasets: Vec<DatasetBrief>,
    /// Waits for exactly this many workers, whatever the range says, as long as nobody has its state in memory.
    pub wait_for: Option<u32>,
    /// Whether its workers can hand its whole state over from memory to memory.
    pub state_in_memory: bool,
    /// How long its workers may step without a word from their coordinator.
    pub orphan_timeout_ms: u64,
    /// When it was submitted, in the core's milliseconds.
    pub submitted_ms: u64,
    /// Its state.
    pub state: JobState,
    /// Why it is in that state.
    pub reason: String,
    /// Its newest membership.
    pub generation: Generation,
    /// The newest membership that workers have been started in.
    pub started: Generation,
    /// The memberships under whose names its members may keep the state that it started from; none if that was not in
    /// their memory.
    #[serde(default)]
    pub resumed_from: Vec<Generation>,
    /// Whether one of its members was found not to have been told of it: then nobody has stepped in it.
    #[serde(default)]
    pub undelivered: bool,
    /// The workers of that membership by rank; empty while it has none.
    pub members: Vec<WorkerId>,
    /// The logical shards that they own; of use only while there are members.
    pub placement: Option<Placement>,
    /// Why that membership is being ended, if it is.
    pub ending: Option<Ending>,
    /// The last committed step that was reported.
    pub step: u64,
    /// All of its steps; 0 until known.
    pub total_steps: u64,
    /// The epoch of that step.
    pub epoch: u64,
    /// The newest figures by name.
    pub metrics: BTreeMap<String, f64>,
    /// BLAKE3 of the final weights, once rank 0 has finished.
    pub weights_digest: Option<String>,
    /// The step of the newest stored checkpoint.
    pub checkpoint: Option<u64>,
    /// Generations in a row that failed without getting further.
    pub fruitless: u32,
    /// The step at the last failure.
    #[serde(alias = "furthest")]
    pub failed_at: u64,
    /// When the first of those failures was, in the core's milliseconds.
    #[serde(default)]
    pub fruitless_since_ms: u64,
    /// The error of the first of those failures.
    pub first_error: String,
}

impl JobRecord {
    pub(crate) fn new(id: JobId, job: NewJob, now_ms: u64) -> Self {
        Self {
            id,
            file: job.file,
            toml: job.toml,
            name: job.name,
            logical_shards: job.logical_shards,
            min_workers: job.min_workers,
            max_workers: job.max_workers,
            keep_checkpoints: job.keep_checkpoints,
            datasets: job.datasets,
            wait_for: job.wait_for,
            state_in_memory: job.state_in_memory,
            orphan_timeout_ms: job.orphan_timeout_ms,
            submitted_ms: now_ms,
            state: JobState::Queued,
            reason: String::new(),
            generation: Generation(0),
            started: Generation(0),
            resumed_from: Vec::new(),
            undelivered: false,
            members: Vec::new(),
            placement: None,
            ending: None,
            step: 0,
            total_steps: 0,
            epoch: 0,
            metrics: BTreeMap::new(),
            weights_digest: None,
            checkpoint: None,
            fruitless: 0,
            fruitless_since_ms: 0,
            failed_at: 0,
            first_error: String::new(),
        }
    }

    /// Takes in the newest figures. One that is no number any more is not known any more: JSON has no way to write it.
    pub(crate) fn take_in(&mut self, figures: BTreeMap<String, f64>) {
        for (name, value) in figures {
            if value.is_finite() {
                self.metrics.insert(name, value);
            } else {
                self.metrics.remove(&name);
            }
        }
    }

    /// The job back in the queue, to go on from its newest checkpoint with its attempts counted anew. The workers that
    /// it had are taken for gone.
    pub fn requeued(self) -> Self {
        Self {
            state: JobState::Queued,
            reason: String::new(),
            members: Vec::new(),
            placement: None,
            ending: None,
            fruitless: 0,
            fruitless_since_ms: 0,
            first_error: String::new(),
            ..self
        }
    }
}

/// Why a generation is being ended, which decides what comes after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// The job goes on in another generation.
    Next {
        /// What happened.
        cause: Cause,
        /// How the ranks are told to end this one.
        mode: StopMode,
    },
    /// An error that another generation would meet again.
    Fail {
        /// The first error.
        error: String,
    },
    /// An operator wants it gone.
    Cancel,
    /// An operator wants it stopped with a checkpoint.
    Pause,
}

impl Ending {
    /// How ranks are told to leave for this reason.
    pub(crate) fn stop_mode(&self) -> StopMode {
        match self {
            Self::Pause => StopMode::Checkpoint,
            Self::Cancel | Self::Fail { .. } => StopMode::Abort,
            Self::Next { mode, .. } => *mode,
        }
    }

    /// Whether this reason takes the place of `other`: a failure that of a planned change, an operator's wish that of
    /// both, and what ends the job that of all else. The first of two equals stays.
    pub(crate) fn outweighs(&self, other: &Self) -> bool {
        let weight = |ending: &Self| match ending {
            Self::Next { cause, .. } if !cause.is_failure() => 0,
            Self::Next { .. } => 1,
            Self::Pause => 2,
            Self::Cancel | Self::Fail { .. } => 3,
        };
        weight(self) > weight(other)
    }
}

/// All that is kept of a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// Its number, which is in its certificate.
    pub id: WorkerId,
    /// The name of the host that enrolled.
    pub host: String,
    /// When it enrolled, in the core's milliseconds.
    pub enrolled_ms: u64,
    /// Where its last process listened, if its host would say so should nobody listen there any more.
    #[serde(default)]
    pub port: Option<SocketAddr>,
}
