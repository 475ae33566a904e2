//! Jobs and workers as lists and `status` show them.

use super::flight::FlightSummary;
use super::messages::Pace;
use crate::ids::{Generation, JobId, Rank, WorkerId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// The state of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Waits for workers.
    Queued,
    /// Its workers step.
    Running,
    /// Is being stopped at a step boundary.
    Stopping,
    /// Stopped by an operator, with a checkpoint.
    Paused,
    /// Its last step is done.
    Finished,
    /// Ended by an error.
    Failed,
    /// Ended by an operator.
    Cancelled,
}

impl JobState {
    /// Whether the job will never step again.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Finished | Self::Failed | Self::Cancelled)
    }
}

impl std::fmt::Display for JobState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Paused => "paused",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        })
    }
}

/// A job as lists and `status` show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSummary {
    /// The job.
    pub id: JobId,
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: JobState,
    /// Why it is in that state: what it waits for, or the error.
    pub reason: String,
    /// Its membership.
    pub generation: Generation,
    /// The last committed step.
    pub step: u64,
    /// All of its steps; 0 until known.
    pub total_steps: u64,
    /// The epoch of the last committed step.
    pub epoch: u64,
    /// The workers in it.
    pub workers: Vec<WorkerId>,
    /// The newest figures by name.
    pub metrics: BTreeMap<String, f64>,
    /// BLAKE3 of the final weights, once finished.
    pub weights_digest: Option<String>,
    /// The folder of the newest checkpoint.
    pub checkpoint: Option<String>,
    /// Seconds since it was submitted.
    pub age_s: u64,
    /// Estimated seconds to its end, while it runs.
    pub eta_s: Option<u64>,
    /// What its ranks wait for, or waited for when its last generation failed; only in the answer to `Status`.
    pub flight: Option<FlightSummary>,
    /// Its ranks that are persistently slow.
    pub stragglers: Vec<Straggler>,
    /// Its newest checkpoints, if they could not be stored.
    pub checkpoint_failure: Option<CheckpointFailure>,
}

/// Checkpoints in a row that the coordinator could not store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFailure {
    /// The step of the newest.
    pub step: u64,
    /// What kept it from being stored.
    pub error: String,
    /// How many they are.
    pub checkpoints: u64,
    /// The step of the first.
    pub first_step: u64,
    /// The step of the newest that is stored.
    pub stored: Option<u64>,
}

/// A rank that is persistently slow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Straggler {
    /// The rank.
    pub rank: Rank,
    /// The worker.
    pub worker: WorkerId,
    /// Its host's name.
    pub host: String,
    /// How many times the median of the others a logical shard takes it.
    pub times: f64,
    /// Where its time goes.
    pub pace: Pace,
}

/// A worker as lists show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerSummary {
    /// The worker.
    pub id: WorkerId,
    /// Its host's name.
    pub host: String,
    /// `cpu` or `cuda:0`.
    pub device: String,
    /// `idle`, `busy` or `away`.
    pub state: String,
    /// The job that it is in.
    pub job: Option<JobId>,
    /// Where other workers reach it.
    pub addresses: Vec<SocketAddr>,
    /// Where its metrics are served.
    pub metrics: Option<SocketAddr>,
    /// Where its host would tell if its process ended unseen; `None` if it would not, or that is not known yet.
    pub watched: Option<SocketAddr>,
    /// Seconds since it was last heard of.
    pub silent_s: u64,
}

/// A line of a job's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Its place in the log, from 0.
    pub number: u64,
    /// The line, with time and origin.
    pub text: String,
}
