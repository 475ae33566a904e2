//! The name of a collective, by which the ranks find each other's parts of it.

use crate::frame::MAX_BLOB_BYTES;
use std::fmt;

/// What a collective is for. Part of its [`Tag`], and what an error calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TagKind {
    /// A bucket of gradients; the tag's index is the bucket.
    Gradient,
    /// Sums of a synchronized batch norm; the tag's index is the layer.
    BatchNorm {
        /// Whether it belongs to the backward pass.
        backward: bool,
    },
    /// Losses, counts and other scalars of a step.
    Statistics,
    /// The agreement that a step is applied by all.
    Commit,
    /// Results of a distributed evaluation.
    Evaluation,
    /// The comparison of the replicas' digests.
    Digest,
    /// Training state on its way from one replica to another.
    State,
    /// Ranks waiting for each other.
    Barrier,
    /// One rank's bytes for all.
    Broadcast,
    /// How the group comes about.
    Setup,
    /// What the ranks tell each other to set NCCL up.
    Communicator,
}

/// Names one collective. No two of one generation may have equal tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    /// The step of the job.
    pub step: u64,
    /// The phase within the step.
    pub phase: u16,
    /// What it is for.
    pub kind: TagKind,
    /// Which bucket, layer or item.
    pub index: u32,
    /// Tells repeated uses apart, such as a layer that one phase runs twice.
    pub use_index: u16,
}

impl Tag {
    /// The first use of item 0 of `kind` in `phase` of `step`.
    pub fn new(step: u64, phase: u16, kind: TagKind) -> Self {
        Self { step, phase, kind, index: 0, use_index: 0 }
    }

    /// The same for item `index`.
    pub fn index(self, index: u32) -> Self {
        Self { index, ..self }
    }

    /// The same for repetition `use_index`.
    pub fn use_index(self, use_index: u16) -> Self {
        Self { use_index, ..self }
    }
}

impl TagKind {
    /// The most bytes that a rank may contribute to a gather or a broadcast of this kind. What a peer announces beyond
    /// it is refused before anything is kept.
    pub(crate) fn most_blob_bytes(self) -> u64 {
        match self {
            TagKind::Digest => 4 << 10,
            // 52 bytes for each rank of the sender's host, or the reason why not.
            TagKind::Setup | TagKind::Communicator => 1 << 20,
            // What the shards of any model keep.
            TagKind::State => MAX_BLOB_BYTES,
            // Four bytes for each of a model's parameters at most.
            _ => 64 << 20,
        }
    }

    pub(crate) fn code(self) -> u8 {
        match self {
            TagKind::Gradient => 0,
            TagKind::BatchNorm { backward: false } => 1,
            TagKind::BatchNorm { backward: true } => 2,
            TagKind::Statistics => 3,
            TagKind::Commit => 4,
            TagKind::Evaluation => 5,
            TagKind::Digest => 6,
            TagKind::State => 7,
            TagKind::Barrier => 8,
            TagKind::Broadcast => 9,
            TagKind::Setup => 10,
            TagKind::Communicator => 11,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => TagKind::Gradient,
            1 => TagKind::BatchNorm { backward: false },
            2 => TagKind::BatchNorm { backward: true },
            3 => TagKind::Statistics,
            4 => TagKind::Commit,
            5 => TagKind::Evaluation,
            6 => TagKind::Digest,
            7 => TagKind::State,
            8 => TagKind::Barrier,
            9 => TagKind::Broadcast,
            10 => TagKind::Setup,
            11 => TagKind::Communicator,
            _ => return None,
        })
    }
}

impl fmt::Display for TagKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TagKind::Gradient => "gradient bucket",
            TagKind::BatchNorm { backward: false } => "batch norm (forward)",
            TagKind::BatchNorm { backward: true } => "batch norm (backward)",
            TagKind::Statistics => "statistics",
            TagKind::Commit => "commit",
            TagKind::Evaluation => "evaluation",
            TagKind::Digest => "digest",
            TagKind::State => "state",
            TagKind::Barrier => "barrier",
            TagKind::Broadcast => "broadcast",
            TagKind::Setup => "set-up",
            TagKind::Communicator => "NCCL set-up",
        })
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} of step {}, phase {}", self.kind, self.index, self.step, self.phase)?;
        if self.use_index > 0 {
            write!(f, ", use {}", self.use_index)?;
        }
        Ok(())
    }
}
