//! Random access to the samples of a dataset.

use super::DatasetName;
use super::cache::{CacheError, RecordBytes, ShardCache};
use super::manifest::{Encoding, Manifest, ManifestProblem, SampleShape, ShardEntry};
use std::sync::Arc;

/// Why a sample could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The manifest cannot be used.
    #[error("the manifest of dataset `{dataset}` cannot be used: {problem}")]
    Manifest {
        /// The dataset.
        dataset: DatasetName,
        /// What is wrong with it.
        problem: ManifestProblem,
    },
    /// There is no such sample.
    #[error("dataset `{dataset}` has {samples} samples and no sample {index}")]
    NoSuchSample {
        /// The dataset.
        dataset: DatasetName,
        /// How many samples it has.
        samples: u64,
        /// The one asked for.
        index: u64,
    },
    /// The shard could not be had.
    #[error(transparent)]
    Shard(#[from] CacheError),
    /// The record is intact and not what the manifest says.
    #[error("sample {index} of dataset `{dataset}` is not what the manifest says: {what}; import it again")]
    Malformed {
        /// The dataset.
        dataset: DatasetName,
        /// The sample.
        index: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The whitening's records are intact and not what the manifest says.
    #[error("the whitening of dataset `{dataset}` is not what the manifest says; whiten the dataset again")]
    Whitening {
        /// The dataset.
        dataset: DatasetName,
    },
}

/// Reads samples by index; cheap to share between loader threads.
#[derive(Debug)]
pub struct DatasetReader {
    manifest: Arc<Manifest>,
    cache: Arc<ShardCache>,
    sample_bytes: usize,
}

/// One sample. If its shard was in memory, it stays there as long as the sample lives.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The class.
    pub label: u32,
    /// The shape of the samples: of [`Sample::bytes`] itself where those are not encoded.
    pub shape: SampleShape,
    record: RecordBytes,
}

impl Sample {
    /// The elements, channel by channel, row by row; or the encoded image, as the manifest's encoding says.
    pub fn bytes(&self) -> &[u8] {
        self.record.payload()
    }
}

impl DatasetReader {
    /// A reader of the dataset that `manifest` describes, which is checked here.
    pub fn new(manifest: Arc<Manifest>, cache: Arc<ShardCache>) -> Result<Self, ReadError> {
        let refused = |problem| ReadError::Manifest { dataset: manifest.name.clone(), problem };
        manifest.validate().map_err(refused)?;
        let sample_bytes = manifest
            .shape
            .elements()
            .and_then(|n| usize::try_from(n).ok())
            .ok_or(ManifestProblem::Inconsistent("its samples are too large"))
            .map_err(refused)?;
        Ok(Self { manifest, cache, sample_bytes })
    }

    /// The dataset's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How many samples there are.
    pub fn len(&self) -> u64 {
        self.manifest.samples
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.manifest.samples == 0
    }

    /// Sample `index`. Blocks while its shard is read or fetched.
    pub fn sample(&self, index: u64) -> Result<Sample, ReadError> {
        let manifest = &*self.manifest;
        let entry = manifest.shard_of(index).ok_or_else(|| ReadError::NoSuchSample {
            dataset: manifest.name.clone(),
            samples: manifest.samples,
            index,
        })?;
        let malformed = |what| ReadError::Malformed { dataset: manifest.name.clone(), index, what };
        let record = self
            .record(entry, (index - entry.first_sample) as usize)?
            .ok_or_else(|| malformed("its shard has another number of records"))?;
        let &[label] = record.labels() else {
            return Err(malformed("it does not have exactly one label"));
        };
        if label >= manifest.classes {
            return Err(malformed("its label is not one of the classes"));
        }
        match manifest.encoding {
            Encoding::RawU8 if record.payload().len() != self.sample_bytes => {
                Err(malformed("its size does not match the shape"))
            }
            Encoding::RawU8 | Encoding::Image => Ok(Sample { label, shape: manifest.shape, record }),
        }
    }

    /// Record `index` of one of the dataset's shards, or `None` if that has another number of records than it should.
    pub(super) fn record(&self, entry: &ShardEntry, index: usize) -> Result<Option<RecordBytes>, CacheError> {
        self.cache.record(self.manifest.name.as_str(), entry, index)
    }
}
