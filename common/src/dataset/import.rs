//! Import: from source files to shards and a manifest.

use super::idx::{IdxProblem, IdxReader};
use super::manifest::{DType, Encoding, Manifest, SampleShape, ShardEntry};
use super::shard::ShardBuilder;
use super::{DatasetError, DatasetName, Store};
use crate::digest::blake3_hex;
use crate::durable::{FileError, TemporaryDir};
use std::path::{Path, PathBuf};

/// A shard is closed when it reaches this size: small enough to be fetched in a moment, large enough that a
/// dataset of 100 GB has only some ten thousands of them.
const SHARD_BYTES: usize = 4 << 20;

/// The splits that a folder may hold: the files' prefix and the segment added to the dataset's name.
const SPLITS: [(&str, &str); 3] = [("train", "train"), ("t10k", "test"), ("test", "test")];

/// How far an import is.
#[derive(Clone, Copy, Debug)]
pub struct ImportProgress<'a> {
    /// The dataset being imported.
    pub dataset: &'a DatasetName,
    /// Samples written so far.
    pub done: u64,
    /// Samples in the source.
    pub total: u64,
}

/// What an import did.
#[derive(Clone, Debug, PartialEq)]
pub enum ImportOutcome {
    /// The dataset is new.
    Added(Manifest),
    /// The dataset was there already with the same content; missing or damaged shards have been replaced.
    Unchanged(Manifest),
}

impl ImportOutcome {
    /// The dataset's manifest.
    pub fn manifest(&self) -> &Manifest {
        match self {
            Self::Added(manifest) | Self::Unchanged(manifest) => manifest,
        }
    }
}

impl Store {
    /// Imports IDX files from `source` under `name`.
    ///
    /// A folder gives one dataset per split that it holds: `NAME/train` from `train-*`, `NAME/test` from
    /// `t10k-*` or `test-*`. The path of one pair of files up to `-images` gives the dataset `NAME`. Each becomes
    /// visible only when it is complete. `progress` is called from time to time.
    pub fn import_idx(
        &self,
        name: &str,
        source: &Path,
        mut progress: impl FnMut(ImportProgress<'_>),
    ) -> Result<Vec<ImportOutcome>, DatasetError> {
        let name: DatasetName = name.parse()?;
        find_pairs(&name, source)?.iter().map(|pair| self.import_pair(pair, &mut progress)).collect()
    }

    fn import_pair(
        &self,
        pair: &Pair,
        progress: &mut dyn FnMut(ImportProgress<'_>),
    ) -> Result<ImportOutcome, DatasetError> {
        let mut images = IdxReader::open(&pair.images, 3)?;
        let mut labels = IdxReader::open(&pair.labels, 1)?;
        if labels.records() != images.records() {
            return Err(labels.error(IdxProblem::CountMismatch {
                labels: labels.records(),
                images: images.records(),
                images_path: pair.images.clone(),
            }));
        }
        let samples = u64::from(images.records());
        let &[height, width] = images.sizes() else {
            return Err(images.error(IdxProblem::Size(images.sizes().to_vec())));
        };

        let mut shards = ShardWriter::new(TemporaryDir::new_in(self.shards_dir())?);
        let mut statistics = Statistics::default();
        let mut classes = 0;
        let (mut pixels, mut label) = (vec![0; images.record_bytes()], [0]);
        for done in 1..=samples {
            images.next(&mut pixels)?;
            labels.next(&mut label)?;
            statistics.add(&pixels);
            classes = classes.max(u32::from(label[0]) + 1);
            if shards.push(u32::from(label[0]), &pixels)? || done == samples {
                progress(ImportProgress { dataset: &pair.name, done, total: samples });
            }
        }
        images.finish()?;
        labels.finish()?;
        let (staging, entries) = shards.finish()?;
        let manifest = Manifest {
            format: 0,
            id: String::new(),
            name: pair.name.clone(),
            samples,
            shape: SampleShape { channels: 1, height, width },
            dtype: DType::U8,
            classes,
            class_names: None,
            encoding: Encoding::RawU8,
            mean: vec![statistics.mean()],
            std: vec![statistics.std()],
            shards: entries,
        };
        let manifest = manifest.with_id().map_err(|problem| self.manifest_error(&pair.name, problem))?;
        self.publish(manifest, staging)
    }
}

/// Images and their labels.
#[derive(Debug)]
struct Pair {
    name: DatasetName,
    images: PathBuf,
    labels: PathBuf,
}

fn find_pairs(name: &DatasetName, source: &Path) -> Result<Vec<Pair>, DatasetError> {
    let mut pairs: Vec<Pair> = Vec::new();
    if source.is_dir() {
        for (prefix, segment) in SPLITS {
            let name = name.join(segment)?;
            if pairs.iter().all(|p| p.name != name)
                && let Some(pair) = find_pair(name, &source.join(prefix))?
            {
                pairs.push(pair);
            }
        }
    } else {
        pairs.extend(find_pair(name.clone(), source)?);
    }
    if pairs.is_empty() {
        return Err(DatasetError::NoSource { path: source.to_path_buf() });
    }
    Ok(pairs)
}

/// The pair that begins with `prefix`, or `None` if there are no such images. Images without labels are an error.
fn find_pair(name: DatasetName, prefix: &Path) -> Result<Option<Pair>, DatasetError> {
    let candidates = |stem: &str| {
        [format!("{stem}-ubyte"), format!("{stem}-ubyte.gz")].map(|suffix| {
            let mut path = prefix.as_os_str().to_owned();
            path.push(suffix);
            PathBuf::from(path)
        })
    };
    let Some(images) = candidates("-images-idx3").into_iter().find(|p| p.exists()) else {
        return Ok(None);
    };
    let [plain, compressed] = candidates("-labels-idx1");
    let labels = if plain.exists() { plain } else { compressed };
    if !labels.exists() {
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(FileError::new("read", labels, missing).into());
    }
    Ok(Some(Pair { name, images, labels }))
}

/// Writes shards of [`SHARD_BYTES`] into a temporary folder.
struct ShardWriter {
    staging: TemporaryDir,
    builder: ShardBuilder,
    entries: Vec<ShardEntry>,
    written: u64,
}

impl ShardWriter {
    fn new(staging: TemporaryDir) -> Self {
        Self { staging, builder: ShardBuilder::default(), entries: Vec::new(), written: 0 }
    }

    /// Appends a record; true if that completed a shard.
    fn push(&mut self, label: u32, payload: &[u8]) -> Result<bool, FileError> {
        self.builder.push(&[label], payload);
        if self.builder.bytes() < SHARD_BYTES {
            return Ok(false);
        }
        self.flush()?;
        Ok(true)
    }

    fn flush(&mut self) -> Result<(), FileError> {
        let samples = self.builder.len() as u64;
        let bytes = self.builder.finish();
        let hash = blake3_hex(&bytes);
        // Two shards of one dataset may be the same to the byte; the file is then written once.
        if self.entries.iter().all(|e| e.hash != hash) {
            self.staging.write(&hash, &bytes)?;
        }
        let (bytes, first_sample) = (bytes.len() as u64, self.written);
        self.entries.push(ShardEntry { hash, bytes, first_sample, samples });
        self.written += samples;
        Ok(())
    }

    fn finish(mut self) -> Result<(TemporaryDir, Vec<ShardEntry>), FileError> {
        if self.builder.len() > 0 {
            self.flush()?;
        }
        Ok((self.staging, self.entries))
    }
}

/// Mean and standard deviation over bytes, from sums in integers, so that they are exact until the division.
#[derive(Default)]
struct Statistics {
    count: u64,
    sum: u128,
    sum_of_squares: u128,
}

impl Statistics {
    fn add(&mut self, bytes: &[u8]) {
        let (mut sum, mut squares) = (0u64, 0u64);
        for &b in bytes {
            sum += u64::from(b);
            squares += u64::from(b) * u64::from(b);
        }
        self.count += bytes.len() as u64;
        self.sum += u128::from(sum);
        self.sum_of_squares += u128::from(squares);
    }

    fn mean(&self) -> f64 {
        self.sum as f64 / self.count as f64 / 255.0
    }

    /// Of the population: sqrt(E[x²] − E[x]²).
    fn std(&self) -> f64 {
        let n = u128::from(self.count);
        let n_squared_variance = n * self.sum_of_squares - self.sum * self.sum;
        libm::sqrt(n_squared_variance as f64) / self.count as f64 / 255.0
    }
}
