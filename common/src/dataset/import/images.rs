//! Encoded images of any size: each is decoded once while it is imported, and stored as it is.

use super::shards::ShardWriter;
use super::statistics::{ChannelSums, Statistics};
use super::{Finished, ImageImport, ImportProgress, Progress, Staged, stage};
use crate::dataset::manifest::{Encoding, SampleShape, SampleSize};
use crate::dataset::{DatasetError, DatasetName, Store};
use crate::durable::{FileError, TemporaryDir};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// Images that are decoded at a time. Enough to keep many cores busy; few enough to be held in memory.
const BATCH: usize = 256;
/// The bytes after which a batch is decoded, however few images it has.
const BATCH_BYTES: u64 = 64 << 20;
/// The largest encoded image. A worker holds the shard that it lies in.
pub(super) const MAX_IMAGE_BYTES: u64 = 32 << 20;
/// How many corrupt images an error names.
const NAMED: usize = 20;

/// Decodes images to see whether they are whole. This crate knows no codecs.
pub trait InspectImage: Sync {
    /// What a whole image is like, or why it is not one, as the end of a sentence.
    fn inspect(&self, encoded: &[u8]) -> Result<ImageFacts, String>;
}

/// What import must know of an image, of its three channels: red, green and blue.
#[derive(Clone, Debug)]
pub struct ImageFacts {
    /// Its size, upright.
    pub size: SampleSize,
    /// Its pixels' sums.
    pub sums: [ChannelSums; 3],
}

/// An image that could not be decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corrupt {
    /// Its file, or the tar file and its member.
    pub name: String,
    /// Why.
    pub why: String,
}

/// Where an image's bytes come from.
pub(super) enum Origin {
    /// A file, read when it is decoded.
    File(PathBuf),
    /// Bytes, and what they are called in errors.
    Bytes(String, Vec<u8>),
}

/// Collects images in the order of the source, decodes them in parallel and writes them into shards.
pub(super) struct ImageWriter<'a> {
    name: DatasetName,
    images: ImageImport<'a>,
    shards: ShardWriter,
    statistics: Statistics,
    batch: Vec<(u32, Origin)>,
    batch_bytes: u64,
    total: Option<u64>,
    done: u64,
    /// Smallest and largest height and width of those written.
    sizes: Option<(SampleSize, SampleSize)>,
    corrupt: Vec<Corrupt>,
}

impl<'a> ImageWriter<'a> {
    pub(super) fn new(
        store: &Store,
        name: DatasetName,
        images: ImageImport<'a>,
        total: Option<u64>,
    ) -> Result<Self, DatasetError> {
        Ok(Self {
            name,
            images,
            shards: ShardWriter::new(TemporaryDir::new_in(store.shards_dir())?),
            statistics: Statistics::new(3),
            batch: Vec::new(),
            batch_bytes: 0,
            total,
            done: 0,
            sizes: None,
            corrupt: Vec::new(),
        })
    }

    /// Takes the next image of the source.
    pub(super) fn push(
        &mut self,
        label: u32,
        origin: Origin,
        progress: Progress<'_>,
    ) -> Result<(), DatasetError> {
        self.batch_bytes += origin.bytes()?;
        self.batch.push((label, origin));
        if self.batch.len() < BATCH && self.batch_bytes < BATCH_BYTES {
            return Ok(());
        }
        self.write_batch(progress)
    }

    /// Completes the dataset, unless an image was corrupt and those are not to be left out.
    pub(super) fn finish(
        mut self,
        store: &Store,
        classes: u32,
        class_names: Option<Vec<String>>,
        source: &Path,
        progress: Progress<'_>,
    ) -> Result<Staged, DatasetError> {
        self.write_batch(progress)?;
        let total = self.done + self.corrupt.len() as u64;
        if !self.corrupt.is_empty() && !self.images.skip_corrupt {
            return Err(DatasetError::Corrupt {
                dataset: self.name,
                names: list(&self.corrupt),
                corrupt: self.corrupt.len() as u64,
                total,
            });
        }
        let Some((smallest, largest)) = self.sizes else {
            let what = if total > 0 { "all of its images are corrupt" } else { "it has no images" };
            return Err(super::source_error(source, what));
        };
        let finished = Finished {
            name: self.name,
            shape: SampleShape { channels: 3, height: largest.height, width: largest.width },
            smallest: (smallest != largest).then_some(smallest),
            encoding: Encoding::Image,
            classes,
            class_names,
            statistics: self.statistics,
            left_out: self.corrupt,
        };
        stage(store, self.shards, finished)
    }

    fn write_batch(&mut self, progress: Progress<'_>) -> Result<(), DatasetError> {
        self.batch_bytes = 0;
        let inspect = self.images.inspect;
        let inspected: Vec<_> = std::mem::take(&mut self.batch)
            .into_par_iter()
            .map(|(label, origin)| {
                let (name, bytes) = origin.read()?;
                let facts = inspect.inspect(&bytes);
                Ok((label, name, bytes, facts))
            })
            .collect::<Result<_, DatasetError>>()?;
        for (label, name, bytes, facts) in inspected {
            match facts {
                Ok(facts) => {
                    self.statistics.add(&facts.sums);
                    let (smallest, largest) = self.sizes.unwrap_or((facts.size, facts.size));
                    self.sizes = Some((smallest.min(facts.size), largest.max(facts.size)));
                    self.shards.push(label, &bytes)?;
                    self.done += 1;
                }
                Err(why) => self.corrupt.push(Corrupt { name, why }),
            }
        }
        progress(ImportProgress { dataset: &self.name, done: self.done, total: self.total });
        Ok(())
    }
}

impl Origin {
    /// How many bytes it has.
    fn bytes(&self) -> Result<u64, DatasetError> {
        let path = match self {
            Self::Bytes(_, bytes) => return Ok(bytes.len() as u64),
            Self::File(path) => path,
        };
        let length = std::fs::metadata(path).map_err(FileError::on("read", path))?.len();
        if length > MAX_IMAGE_BYTES {
            let problem = format!("it {}", too_large(length, MAX_IMAGE_BYTES));
            return Err(super::source_error(path, problem));
        }
        Ok(length)
    }

    fn read(self) -> Result<(String, Vec<u8>), DatasetError> {
        match self {
            Self::Bytes(name, bytes) => Ok((name, bytes)),
            Self::File(path) => {
                let bytes = crate::durable::read(&path)?;
                Ok((path.display().to_string(), bytes))
            }
        }
    }
}

/// What is wrong with a file of so many bytes, as the end of a sentence.
pub(super) fn too_large(bytes: u64, limit: u64) -> String {
    format!("has {bytes} bytes and may have {limit}; make it smaller or remove it")
}

/// The first of them by name, and how many more there are.
fn list(corrupt: &[Corrupt]) -> String {
    let named: Vec<_> = corrupt.iter().take(NAMED).map(|c| format!("`{}` ({})", c.name, c.why)).collect();
    let more = corrupt.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    named.join(", ") + &more
}
