//! Datasets: import into content-hashed shards, a manifest per dataset, and random access to the samples.
//!
//! A dataset is immutable. Its manifest names the shards by the BLAKE3 hash of their bytes and has a digest of
//! its own, so a worker that was given the manifest can take shards from anywhere and know that they are right.
//!
//! [`Store`] is the coordinator's side (import, list, verify), [`ShardCache`] and [`DatasetReader`] the worker's.

mod cache;
mod idx;
mod import;
mod manifest;
mod name;
mod reader;
mod shard;
mod store;
mod whitening;

pub use cache::{CacheError, FetchError, RecordBytes, ShardCache, ShardFetch};
pub use idx::IdxProblem;
pub use import::{
    ChannelSums, Corrupt, ImageFacts, ImageImport, ImportOutcome, ImportProgress, Imported, InspectImage,
    SourceFormat,
};
pub use manifest::{DType, Encoding, Manifest, ManifestProblem, SampleShape, SampleSize, ShardEntry};
pub use name::{DatasetName, InvalidName};
pub use reader::{DatasetReader, ReadError, Sample};
pub use shard::{Record, ShardFile, ShardProblem};
pub use store::{ShardReport, ShardState, Store, VerifyReport};
pub use whitening::{MAX_WHITENED, Whitening, WhiteningMap, WhiteningProgress, contrast_table};

use crate::durable::FileError;
use crate::shown::counted;
use std::path::PathBuf;

/// Why a dataset could not be imported, found or read.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// A file or folder could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A name that no dataset can have.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// No dataset of that name is in the store.
    #[error("no dataset `{name}` in `{}`{hint}", store.display())]
    Unknown {
        /// The name asked for.
        name: DatasetName,
        /// The store's folder.
        store: PathBuf,
        /// What to do, with its punctuation.
        hint: String,
    },
    /// Another content has that name already.
    #[error(
        "dataset `{name}` already exists with other content (id {existing}, not {new}); add this one under \
         another name"
    )]
    Conflict {
        /// The name.
        name: DatasetName,
        /// The id of the dataset in the store.
        existing: String,
        /// The id of the one that was to be added.
        new: String,
    },
    /// A manifest that is damaged or of another release.
    #[error("the dataset manifest `{}` cannot be used: {problem}", path.display())]
    Manifest {
        /// The manifest's file.
        path: PathBuf,
        /// What is wrong with it.
        problem: ManifestProblem,
    },
    /// A source file that is not what its name says.
    #[error("`{}` cannot be imported: {problem}", path.display())]
    Idx {
        /// The source file.
        path: PathBuf,
        /// What is wrong with it.
        problem: IdxProblem,
    },
    /// A source file or folder that is not what its format says.
    #[error("`{}` cannot be imported: {problem}", path.display())]
    Source {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// A dataset whose classes are asked for by name and have none.
    #[error(
        "dataset `{name}` has no names of classes; name one that was imported from a folder of classes, or with `classes.txt`"
    )]
    NoClassNames {
        /// The dataset.
        name: DatasetName,
    },
    /// Images that cannot be decoded.
    #[error(
        "{corrupt} of the {} for `{dataset}` {} corrupt: {names}; repair or remove them, or leave them out with \
         `--skip-corrupt`",
        counted(*total, "image"),
        if *corrupt == 1 { "is" } else { "are" }
    )]
    Corrupt {
        /// The dataset that was to be made.
        dataset: DatasetName,
        /// The first of them, each with what is wrong with it.
        names: String,
        /// How many there are.
        corrupt: u64,
        /// How many images there are in all.
        total: u64,
    },
    /// No source files at the path given.
    #[error(
        "no IDX files at `{}`; expected a folder with `train-images-idx3-ubyte` and \
         `train-labels-idx1-ubyte` (also `t10k-` or `test-`, each with or without `.gz`), or the path of one \
         such pair up to `-images`", path.display()
    )]
    NoSource {
        /// The path given.
        path: PathBuf,
    },
    /// A dataset to which no whitening can be fitted.
    #[error("dataset `{name}` cannot be whitened: {problem}")]
    Whitening {
        /// The dataset.
        name: DatasetName,
        /// Why.
        problem: String,
    },
    /// A shard's name that is not a hash.
    #[error("`{0}` is not the hash of a shard (64 lower-case hex digits)")]
    NotAHash(String),
}

#[cfg(test)]
mod tests;
