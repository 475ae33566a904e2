//! Why CUDA or NCCL refused.

use crate::error::CollectiveError;
use crate::tag::Tag;
use thiserror::Error;

/// A failure below the level of collectives. One line: what, and what to do where that is known.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NcclError {
    /// This process cannot use NCCL at all.
    #[error("{0}")]
    Unavailable(String),
    /// CUDA's driver refused.
    #[error("CUDA failed {doing}: {reason}")]
    Cuda {
        /// What was tried, such as "recording an event".
        doing: &'static str,
        /// The driver's words.
        reason: String,
    },
    /// NCCL refused, or found out later that something is wrong.
    #[error("NCCL failed {doing}: {reason}")]
    Nccl {
        /// What was tried.
        doing: &'static str,
        /// NCCL's words.
        reason: String,
    },
}

impl NcclError {
    /// The same as the failure of a collective.
    pub(super) fn in_collective(self, tag: Tag) -> CollectiveError {
        CollectiveError::Device { tag, detail: self.to_string() }
    }
}
