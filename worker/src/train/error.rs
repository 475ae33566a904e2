//! Why training stopped before its end.

use super::mismatch::Mismatch;
use lockstep_collectives::CollectiveError;
use lockstep_common::ids::Rank;
use lockstep_common::net::NetError;
use lockstep_common::wire::{NOT_STORED, Outcome};
use lockstep_nn::NnError;
use thiserror::Error;

/// Why a generation ended without finishing the job.
#[derive(Debug, Error)]
pub(crate) enum TrainError {
    /// A peer or the network failed; another generation can go on.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The network refused its input or libtorch an operation.
    #[error(transparent)]
    Network(NnError),
    /// The coordinator refused or could not be reached.
    #[error(transparent)]
    Coordinator(#[from] NetError),
    /// The training state is not where it should be; another generation can go on with what the others have.
    #[error("{what}")]
    Unavailable {
        /// What is missing.
        what: String,
        /// The rank that is to blame, if it can be told.
        culprit: Option<Rank>,
    },
    /// Ranks hold different states, as one that wanted to take it over has found.
    #[error("{what}")]
    Differ {
        /// Who holds what.
        what: String,
        /// The rank that differs from most, if there are most.
        culprit: Option<Rank>,
    },
    /// The replicas differ. The [session](crate::session) decides what follows.
    #[error("the replicas have come to differ")]
    Mismatch(Mismatch),
    /// Anything else that no other membership would mend.
    #[error("{0}")]
    Fatal(String),
    /// Left at once, as told.
    #[error("left at once, as told")]
    Aborted,
}

impl From<NnError> for TrainError {
    fn from(error: NnError) -> Self {
        match error {
            // The exchange behind batch norm and gradients carries collective errors through libtorch.
            NnError::Exchange(inner) => match inner.downcast::<CollectiveError>() {
                Ok(collective) => Self::Collective(*collective),
                Err(other) => Self::Fatal(other.to_string()),
            },
            other => Self::Network(other),
        }
    }
}

impl From<tch::TchError> for TrainError {
    fn from(error: tch::TchError) -> Self {
        Self::Network(error.into())
    }
}

impl TrainError {
    /// What the coordinator says of a checkpoint that it could not write to its disk, if this is that.
    pub(crate) fn not_stored(&self) -> Option<&str> {
        match self {
            Self::Coordinator(NetError::Refused { reason, message }) if reason == NOT_STORED => Some(message),
            _ => None,
        }
    }

    /// How to report this to the coordinator; `step` is the last committed one.
    pub(crate) fn outcome(&self, step: u64) -> Outcome {
        match self {
            Self::Aborted => Outcome::Stopped { step },
            Self::Collective(error) => {
                let culprit: Option<Rank> = error.culprit();
                Outcome::Lost { error: error.to_string(), culprit }
            }
            Self::Unavailable { what, culprit } => Outcome::Lost { error: what.clone(), culprit: *culprit },
            Self::Differ { what, culprit } => Outcome::Mismatch { error: what.clone(), culprit: *culprit },
            // A refusal is the coordinator's last word; anything else is the connection's fault.
            Self::Coordinator(error) if !matches!(error, NetError::Refused { .. }) => {
                Outcome::Lost { error: error.to_string(), culprit: None }
            }
            other => match other.not_stored() {
                Some(error) => Outcome::Unstored { error: error.to_owned() },
                None => Outcome::Failed { error: other.to_string() },
            },
        }
    }
}
