//! Checkpoints: whole, verified, or refused by name.
//!
//! A checkpoint is a folder `step-000000001200` with
//! - `weights.safetensors`: parameters and buffers under their full names,
//! - `optimizer.safetensors`: optimizer state under `<optimizer>/<state>/<parameter>`,
//! - `wire.safetensors`, of jobs whose wire format is lossy and keeps what it loses: that, under
//!   `<network>/feedback/<parameter>` for each logical shard, and `<network>/warm-start/<parameter>`,
//! - `manifest.json`: where the job was, and the size and BLAKE3 hash of every file.
//!
//! Every random stream is keyed by (seed, purpose, coordinates), so the seed and the step are the position of
//! all random numbers, and (epoch, step in the epoch) that of the sampler. Tensors are bytes here; turning them
//! into libtorch's is the worker's business.

mod manifest;
mod parts;
mod store;
mod tensors;
mod transfer;
mod writer;

pub use manifest::{CheckpointInfo, CheckpointManifest, FileEntry, ManifestProblem};
pub use parts::{join, senders};
pub use store::{CheckpointEntry, CheckpointFiles, CheckpointStore, LatestGood, OpenFile, Refused};
pub use tensors::{BATCH_COUNT, TensorsError, decode_tensors, encode_for_others, encode_tensors};
pub use writer::CheckpointWriter;

use crate::durable::FileError;
use std::path::PathBuf;

/// The file of parameters and buffers.
pub const WEIGHTS_FILE: &str = "weights.safetensors";
/// The file of the optimizers' states.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// What stands there before the name of a weight or buffer whose average it is.
pub const AVERAGE_PREFIX: &str = "model/average.";
/// The file of what lossy wire formats have kept back, where a job has one.
pub const WIRE_FILE: &str = "wire.safetensors";
/// The file that vouches for the others.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Why a checkpoint could not be written, read or used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file or folder could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no checkpoint of that step.
    #[error("no checkpoint of step {step} in `{}`{hint}", dir.display())]
    NoSuchStep {
        /// The step asked for.
        step: u64,
        /// The folder of the checkpoints.
        dir: PathBuf,
        /// Which steps there are, with its punctuation.
        hint: String,
    },
    /// The average of the weights was asked for, and the job keeps none.
    #[error("the checkpoint of step {0} has no average of the weights; its job file has no `[average]`")]
    NoAverage(u64),
    /// A file that the manifest names, or the manifest itself, is not there.
    #[error("`{}` is missing", .0.display())]
    Missing(PathBuf),
    /// A file is shorter or longer than the manifest says.
    #[error("`{}` is truncated or grown: it has {found} bytes instead of {expected}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// The size in the manifest.
        expected: u64,
        /// The size found.
        found: u64,
    },
    /// A file has the right size and other bytes.
    #[error("`{}` has flipped bytes: it does not match its hash in the manifest", .0.display())]
    Flipped(PathBuf),
    /// The manifest cannot be used.
    #[error("`{}` cannot be used: {problem}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        problem: ManifestProblem,
    },
    /// A file of tensors does not parse, or holds others than the manifest says.
    #[error("`{}` does not hold the tensors it should: {problem}", path.display())]
    Tensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: TensorsError,
    },
    /// A name that a file of a checkpoint cannot have.
    #[error("`{0}` cannot be the name of a file in a checkpoint; use letters, digits, `.`, `_` and `-`")]
    FileName(String),
    /// The file to export to is there already.
    #[error("`{}` already exists and is left alone; export to another path or remove it first", .0.display())]
    Exists(PathBuf),
}

#[cfg(test)]
mod tests;
