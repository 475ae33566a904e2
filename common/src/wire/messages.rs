//! What a worker and its coordinator say to each other. Whatever concerns a running job carries its generation; one of an
//! old generation is refused.
//!
//! A worker's [`Request::Session`](super::Request::Session) stays open and carries [`FromWorker`] one way and [`ToWorker`]
//! the other.

use super::flight::FlightReport;
use crate::audit::ShardSamples;
use crate::ids::{Generation, HostKey, JobId, Rank, WorkerId};
use crate::placement::Placement;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// A worker's introduction, also after it lost its coordinator for a while.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Register {
    /// The host's name.
    pub host: String,
    /// `cpu` or `cuda:0`.
    pub device: String,
    /// Threads that compute at a time.
    pub threads: u32,
    /// What it has in common with the other workers of its host; `None` if that cannot be told.
    pub host_key: Option<HostKey>,
    /// Where it listens, by interface, best first; at most [`MAX_ADDRESSES`].
    pub addresses: Vec<InterfaceAddress>,
    /// What other workers are to use instead, best first; at most [`MAX_ADDRESSES`].
    pub advertised: Vec<SocketAddr>,
    /// Where its metrics are served, if they are.
    pub metrics: Option<SocketAddr>,
    /// The job that it is in the middle of, if any.
    pub running: Option<Running>,
    /// What it keeps of a job whose generation has ended, if it keeps anything.
    pub held: Option<Held>,
}

impl Register {
    /// Where it wants to be reached, best first.
    pub fn offered(&self) -> Vec<SocketAddr> {
        match self.advertised.is_empty() {
            true => self.addresses.iter().map(|a| a.address).collect(),
            false => self.advertised.clone(),
        }
    }
}

/// More addresses than a host has.
pub const MAX_ADDRESSES: usize = 64;

/// An address at which a worker listens, and the network around it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceAddress {
    /// The address.
    pub address: SocketAddr,
    /// The name of the interface that has it.
    pub interface: String,
    /// How many leading bits of it the hosts of its subnet share.
    pub prefix_bits: u8,
}

impl InterfaceAddress {
    /// Whether `other` lies in this address's subnet.
    pub fn subnet_has(&self, other: IpAddr) -> bool {
        let prefix = u32::from(self.prefix_bits);
        match (self.address.ip().to_canonical(), other.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                (own.to_bits() ^ other.to_bits()).leading_zeros() >= prefix
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                (own.to_bits() ^ other.to_bits()).leading_zeros() >= prefix
            }
            _ => false,
        }
    }
}

/// What a worker that comes back is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The job.
    pub job: JobId,
    /// Its generation there.
    pub generation: Generation,
    /// Its rank there.
    pub rank: Rank,
    /// The last step that it has committed.
    pub step: u64,
}

/// How far a replica is. The greater of two is the further one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Committed steps.
    pub step: u64,
    /// Phases of the next step whose updates have been applied. A step of one phase never shows a number above 0.
    pub phase: u16,
}

impl Position {
    /// Between two steps.
    pub fn at(step: u64) -> Self {
        Self { step, phase: 0 }
    }
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.phase {
            0 => write!(f, "step {}", self.step),
            phase => write!(f, "phase {phase} of step {}", self.step + 1),
        }
    }
}

/// The training state that a worker keeps of a job between two generations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The job.
    pub job: JobId,
    /// The last generation that this worker was started in.
    pub generation: Generation,
    /// How far the state is.
    pub position: Position,
}

/// A worker that has not heard from its coordinator for a job's `orphan_timeout_s` ends its session after the step in
/// progress. This much later, in milliseconds, it does not commit that step either.
pub const LEASE_GRACE_MS: u64 = 10_000;

/// How much longer than `orphan_timeout_s`, in milliseconds, a coordinator that can reach none of a job's workers waits
/// before it hands the job on: more than [`LEASE_GRACE_MS`], for clocks that do not run alike.
pub const LEASE_MARGIN_MS: u64 = 30_000;

/// What a coordinator tells a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToWorker {
    /// Take part in a generation of a job.
    Start(Box<Assignment>),
    /// Get ready to join a job that runs: fetch its state from its members, and follow their updates.
    Follow(Box<Following>),
    /// Drop what is kept or followed of a job: it is over, or goes on without this worker.
    Release {
        /// The job.
        job: JobId,
    },
    /// Leave a generation of a job.
    Stop {
        /// The job.
        job: JobId,
        /// The generation to leave.
        generation: Generation,
        /// How.
        mode: StopMode,
    },
    /// So many more of this session's reports, in their order, have been taken care of. A worker sends again in its
    /// next session what has not been heard in this one.
    Heard {
        /// How many.
        reports: u64,
    },
    /// Leave for good; the coordinator will not have this worker back.
    Dismiss {
        /// One line for people.
        reason: String,
    },
}

/// How to leave a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopMode {
    /// After the step in progress, all ranks at the same one. Each keeps its state for the next generation.
    Boundary,
    /// After the step in progress, all ranks at the same one, with a checkpoint.
    Checkpoint,
    /// At once; the step in progress is lost.
    Abort,
}

/// All that a worker needs to take part in a generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// The job.
    pub job: JobId,
    /// Its membership.
    pub generation: Generation,
    /// The worker's place in it.
    pub rank: Rank,
    /// Who owns which logical shards.
    pub placement: Placement,
    /// All ranks in order, this one included.
    pub peers: Vec<Peer>,
    /// The job file's name, for messages.
    pub file: String,
    /// The job file.
    pub toml: String,
    /// The datasets' identities, so that all ranks read the same bytes.
    pub datasets: Vec<DatasetBrief>,
    /// Where to start.
    pub resume: Resumption,
}

/// All that a worker needs to get ready to join a running job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Following {
    /// The job.
    pub job: JobId,
    /// Its present membership.
    pub generation: Generation,
    /// The job file's name, for messages.
    pub file: String,
    /// The job file.
    pub toml: String,
    /// The datasets' identities.
    pub datasets: Vec<DatasetBrief>,
    /// The members, any of which can hand over the state.
    pub sources: Vec<Peer>,
}

/// A rank and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its rank.
    pub rank: Rank,
    /// The worker, whose certificate must say so.
    pub worker: WorkerId,
    /// Its host's name, for messages.
    pub host: String,
    /// What it has in common with the other ranks of its host; `None` if that cannot be told.
    pub host_key: Option<HostKey>,
    /// Where it computes: `cpu` or `cuda:0`. All ranks choose their way to reduce gradients from these.
    pub device: String,
    /// Where the rank that is told this can reach it, best first.
    pub addresses: Vec<SocketAddr>,
}

/// A dataset by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetBrief {
    /// Its name.
    pub name: String,
    /// Its manifest's digest.
    pub digest: String,
}

/// Where a generation starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resumption {
    /// From the initial weights.
    Fresh,
    /// From the checkpoint taken after this step.
    Checkpoint {
        /// The step.
        step: u64,
    },
    /// From the state that some ranks have kept in memory; the others fetch it from them.
    Peers {
        /// How far that state is.
        position: Position,
        /// The ranks that have it.
        sources: Vec<Rank>,
    },
}

/// What a worker tells its coordinator. Only rank 0 reports steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// Committed steps since the last report, in order.
    Steps {
        /// The job.
        job: JobId,
        /// The worker's generation.
        generation: Generation,
        /// One record a step.
        records: Vec<StepRecord>,
    },
    /// An evaluation, or other figures that belong to a step.
    Metrics {
        /// The job.
        job: JobId,
        /// The worker's generation.
        generation: Generation,
        /// The last committed step.
        step: u64,
        /// The epoch that this step ended or is in.
        epoch: u64,
        /// Figures by name, such as `test_top1`.
        values: BTreeMap<String, f64>,
    },
    /// A line for the job's log.
    Log {
        /// The job.
        job: JobId,
        /// The worker's generation.
        generation: Generation,
        /// The line.
        line: String,
    },
    /// Where this rank's collectives are. It is news, not a report: the coordinator does not say that it has heard it,
    /// and it is never sent again.
    Flight {
        /// The job.
        job: JobId,
        /// The worker's generation.
        generation: Generation,
        /// Its collectives.
        report: FlightReport,
    },
    /// The worker is done with a generation.
    Ended {
        /// The job.
        job: JobId,
        /// The generation.
        generation: Generation,
        /// How it ended.
        outcome: Outcome,
        /// How far the state is that the worker keeps for the next generation, if it keeps one.
        held: Option<Position>,
    },
    /// Where this rank's time goes. It is news, as `Flight` is.
    Pace {
        /// The job.
        job: JobId,
        /// The worker's generation.
        generation: Generation,
        /// Its newest steps.
        pace: Pace,
    },
    /// The worker has the state of a job that it was told to follow, or will fetch it when it joins: it is ready.
    Following {
        /// The job.
        job: JobId,
        /// The generation that it follows.
        generation: Generation,
        /// How far its copy is.
        position: Position,
    },
    /// The worker leaves on its own account (a signal).
    Leaving,
}

/// Where a rank's time went, in the mean over its newest steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pace {
    /// Over so many steps.
    pub steps: u32,
    /// Logical shards that it owns.
    pub shards: u32,
    /// Seconds a step of waiting for data.
    pub data: f64,
    /// Seconds a step of computing forward, over all of its shards.
    pub forward: f64,
    /// Seconds a step of computing backward, over all of its shards.
    pub backward: f64,
    /// Seconds a step of waiting for peers that no computing hides.
    pub comm: f64,
    /// Seconds a step of the optimizer.
    pub optimizer: f64,
}

impl Pace {
    /// Seconds that one logical shard takes: data, forward and backward.
    pub fn shard_seconds(&self) -> f64 {
        (self.data + self.forward + self.backward) / f64::from(self.shards.max(1))
    }
}

/// One committed step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The generation that committed it. One that began after it reports it again if the older one may not have come to
    /// do so.
    pub generation: Generation,
    /// The step, from 1: how many are committed.
    pub step: u64,
    /// The epoch it belongs to, from 1.
    pub epoch: u64,
    /// All steps of the job.
    pub total_steps: u64,
    /// Samples in its global batch.
    pub samples: u64,
    /// Wall time.
    pub seconds: f64,
    /// Figures by name: `loss` always, `top1` for a classifier, `lr`.
    pub values: BTreeMap<String, f64>,
    /// What each logical shard was given.
    pub shards: Vec<ShardSamples>,
}

/// How a worker ended a generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// The job's last step is committed and its checkpoint stored.
    Finished {
        /// BLAKE3 of the final weights and buffers in name order.
        weights_digest: String,
        /// The last committed step.
        step: u64,
        /// Its epoch.
        epoch: u64,
        /// Final figures by name.
        metrics: BTreeMap<String, f64>,
    },
    /// Left as told, at this step; the checkpoint, if one was asked for, is stored.
    Stopped {
        /// The last committed step.
        step: u64,
    },
    /// Could not go on because of a peer, the network or the coordinator: the job may go on in another generation.
    Lost {
        /// One line: rank, step, phase, bucket, cause.
        error: String,
        /// The rank that is to blame, if it can be told.
        culprit: Option<Rank>,
    },
    /// As [`Self::Lost`], because ranks were found to hold different states: none of them is to be gone on from.
    Mismatch {
        /// One line: who holds what.
        error: String,
        /// The rank that differs from most, if there are most.
        culprit: Option<Rank>,
    },
    /// Cannot go on whatever the membership: bad data, a non-finite loss, an internal error.
    Failed {
        /// One line: what, where, what to do.
        error: String,
    },
    /// The job's last step is committed, and the coordinator could not store its checkpoint, which was tried for a while.
    Unstored {
        /// One line, the coordinator's own: what, where, what to do.
        error: String,
    },
}
