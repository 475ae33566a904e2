//! Why a membership gives way to the next one.

use lockstep_common::ids::{Rank, WorkerId};
use lockstep_common::wire::Position;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A member as logs name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// Its rank.
    pub rank: Rank,
    /// The worker.
    pub worker: WorkerId,
    /// The worker's host.
    pub host: String,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} on {})", self.rank, self.worker, self.host)
    }
}

/// Why a membership gives way to the next one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// A rank's collectives failed.
    PeersLost {
        /// Who says so.
        who: Who,
        /// Its error, which names the rank, step, phase and bucket.
        error: String,
        /// Another rank, which is to blame for it, if that can be told.
        #[serde(default)]
        culprit: Option<Who>,
    },
    /// A rank left without having been told to.
    StoppedByItself {
        /// The rank.
        who: Who,
    },
    /// A rank is not part of the membership any longer.
    Gone {
        /// The rank.
        who: Who,
        /// How that was found out.
        how: Gone,
    },
    /// A worker is being shut down.
    Leaves {
        /// The rank.
        who: Who,
    },
    /// Workers have come that make the job faster.
    Joins {
        /// The newcomers.
        workers: Vec<WorkerId>,
    },
    /// Logical shards are shared out by the ranks' pace.
    Rebalance {
        /// The rank that loses most.
        who: Who,
        /// How many it has.
        from: u32,
        /// How many it is to have.
        to: u32,
    },
    /// All ranks have left and none has said why.
    AllLeft,
}

/// How it was found out that a rank is not there any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gone {
    /// Its process has ended.
    ProcessEnded,
    /// It came back without its work.
    Forgot,
    /// It came back with other work.
    Elsewhere,
    /// It could not be reached when the membership ended.
    Unreachable,
    /// A peer accused it, and it said nothing.
    Accused,
    /// It was told to stop and did not.
    Deaf,
    /// Nobody of its membership was heard of for as long as they may step without a coordinator.
    LeaseOver,
}

impl Gone {
    /// Whether a rank of which this is known cannot be stepping any more.
    pub fn is_certain(self) -> bool {
        match self {
            Self::ProcessEnded | Self::Forgot | Self::Elsewhere | Self::LeaseOver => true,
            Self::Unreachable | Self::Accused | Self::Deaf => false,
        }
    }
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ProcessEnded => "has ended",
            Self::Forgot => "came back without its work",
            Self::Elsewhere => "came back with other work",
            Self::Unreachable => "cannot be reached",
            Self::Accused => "was accused by its peers and said nothing",
            Self::Deaf => "did not stop when told to",
            Self::LeaseOver => "was not heard of for longer than it may step without a coordinator",
        })
    }
}

impl Cause {
    /// Whether this is a failure: such are counted, and a job that only fails is given up.
    pub fn is_failure(&self) -> bool {
        match self {
            Self::PeersLost { .. } | Self::StoppedByItself { .. } | Self::Gone { .. } | Self::AllLeft => true,
            Self::Leaves { .. } | Self::Joins { .. } | Self::Rebalance { .. } => false,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PeersLost { who, error, culprit: None } => write!(f, "{who}: {error}"),
            Self::PeersLost { who, error, culprit: Some(culprit) } => {
                write!(f, "{culprit}, as {who} says: {error}")
            }
            Self::StoppedByItself { who } => write!(f, "{who} stopped on its own account"),
            Self::Gone { who, how } => write!(f, "{who} {how}"),
            Self::Leaves { who } => write!(f, "{who} leaves"),
            Self::Joins { workers } => {
                let names: Vec<_> = workers.iter().map(ToString::to_string).collect();
                write!(f, "{} {}", names.join(", "), if names.len() == 1 { "joins" } else { "join" })
            }
            Self::Rebalance { who, from, to } => {
                write!(f, "by the ranks' pace, {who} gets {to} logical shards instead of {from}")
            }
            Self::AllLeft => f.write_str("all workers left before the last step"),
        }
    }
}

/// Why a membership starts from where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartReason {
    /// The job has never run.
    FirstStart,
    /// Members have kept its state in memory.
    Kept(Position),
    /// Nobody has kept its state; there is this checkpoint.
    CheckpointOnly(u64),
    /// The newest checkpoint is further than what members have kept.
    CheckpointFurther {
        /// The checkpoint's step.
        checkpoint: u64,
        /// What was kept.
        kept: Position,
    },
    /// Nobody has kept its state, and there is no good checkpoint.
    NothingLeft,
}

impl fmt::Display for StartReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FirstStart => f.write_str("the initial weights"),
            Self::Kept(position) => write!(f, "{position}, which its members have kept"),
            Self::CheckpointOnly(step) => write!(f, "the checkpoint of step {step}"),
            Self::CheckpointFurther { checkpoint, kept } => {
                write!(f, "the checkpoint of step {checkpoint}; its members have only kept {kept}")
            }
            Self::NothingLeft => f.write_str("the initial weights, as there is no good checkpoint"),
        }
    }
}
