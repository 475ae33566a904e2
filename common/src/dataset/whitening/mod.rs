//! ZCA whitening: the linear map that makes a training set's pixels uncorrelated and changes them as little as can be.
//!
//! It is fitted to a training set once, where the store is, and belongs to the dataset that [`Store::whiten`] makes: the
//! manifest names its shards by their hashes, so that the dataset's id stands for it too, and workers get it as they get
//! samples. Its bits are the same wherever it is fitted (`product.rs`), so that two coordinators give a dataset the same id.

mod contrast;
mod root;

pub use contrast::contrast_table;

use super::import::ShardWriter;
use super::manifest::{Encoding, Manifest, ShardEntry};
use super::{DatasetError, DatasetName, DatasetReader, ImportOutcome, ReadError, ShardCache, Store};
use crate::durable::TemporaryDir;
use crate::product::{Strips, add_upper_product, mirror};
use root::{BLOCK, STRIP, inverse_root};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The most numbers of an image that can be whitened: their map has the square of it, at this size 134 MB in 64 bits.
pub const MAX_WHITENED: u64 = 4096;

/// What is added to the covariance's diagonal: `filter_bias` of pylearn2's `ZCA` (`datasets/preprocessing.py`).
const FILTER_BIAS: f64 = 0.1;

/// A dataset's whitening as its manifest names it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Whitening {
    /// What was added to each variance, so that directions in which the images hardly differ are not blown up.
    pub filter_bias: f64,
    /// The shards that hold it: a record of the mean, then one for each row of the matrix from the diagonal on, of 64-bit
    /// numbers, little-endian.
    pub shards: Vec<ShardEntry>,
}

/// A dataset's whitening: an image x, its contrast normalized, channel by channel, becomes (x - m) P.
#[derive(Clone, Debug, PartialEq)]
pub struct WhiteningMap {
    /// m: the training set's mean, D numbers.
    pub mean: Vec<f64>,
    /// P: symmetric, D × D, row by row.
    pub matrix: Vec<f64>,
}

/// How far a fit is.
#[derive(Clone, Copy, Debug)]
pub struct WhiteningProgress {
    /// What is being computed.
    pub part: &'static str,
    /// How much of it is done.
    pub done: u64,
    /// Of how much.
    pub total: u64,
}

impl Store {
    /// Makes the dataset `new`: the samples of the dataset `name`, and the whitening that fits them. It holds the same
    /// shards, so it takes little room.
    pub fn whiten(
        &self,
        name: &str,
        new: &str,
        mut progress: impl FnMut(WhiteningProgress),
    ) -> Result<ImportOutcome, DatasetError> {
        let new: DatasetName = new.parse()?;
        let manifest = self.manifest(name)?;
        let refused = |problem: String| DatasetError::Whitening { name: manifest.name.clone(), problem };
        self.refuse_whitening(&manifest, &new).map_err(refused)?;
        let cache = Arc::new(ShardCache::in_place().with_local([self.shards_dir().to_owned()]));
        let reader = DatasetReader::new(Arc::new(manifest.clone()), cache);
        let map =
            reader.and_then(|reader| fit(&reader, &mut progress)).map_err(|e| refused(e.to_string()))?;
        let (staging, shards) = packed(&map, ShardWriter::new(TemporaryDir::new_in(self.shards_dir())?))?;
        let whitening = Some(Whitening { filter_bias: FILTER_BIAS, shards });
        let whitened = Manifest { name: new.clone(), whitening, ..manifest }.with_id();
        let whitened = whitened.map_err(|problem| self.manifest_error(&new, problem))?;
        let outcome = self.publish(vec![(whitened, staging)])?.pop();
        outcome
            .ok_or_else(|| DatasetError::Whitening { name: new, problem: "nothing was published".to_owned() })
    }

    /// What keeps the dataset from being whitened as `new`.
    fn refuse_whitening(&self, manifest: &Manifest, new: &DatasetName) -> Result<(), String> {
        if manifest.encoding != Encoding::RawU8 {
            return Err(
                "its images are JPEG or PNG files, and only raw pixels of one size can be whitened (formats `idx` and `cifar`)"
                    .to_owned(),
            );
        }
        let numbers = manifest.shape.elements().unwrap_or(u64::MAX);
        if numbers > MAX_WHITENED {
            return Err(format!(
                "its images have {numbers} numbers, and at most {MAX_WHITENED} can be whitened"
            ));
        }
        if manifest.samples == 0 {
            return Err("it has no samples".to_owned());
        }
        match self.manifest(new.as_str()) {
            Err(DatasetError::Unknown { .. }) => Ok(()),
            Err(e) => Err(e.to_string()),
            Ok(existing) if existing.whitening.is_some() && existing.shards == manifest.shards => Ok(()),
            Ok(_) => Err(format!("`{new}` already exists and is another dataset; choose another name")),
        }
    }
}

impl DatasetReader {
    /// The whitening that was fitted to the dataset, if one was. Blocks while its shards are read or fetched.
    pub fn whitening(&self) -> Result<Option<WhiteningMap>, ReadError> {
        let Some(Whitening { shards, .. }) = &self.manifest().whitening else { return Ok(None) };
        let malformed = || ReadError::Whitening { dataset: self.manifest().name.clone() };
        let side = self.manifest().shape.elements().ok_or_else(malformed)? as usize;
        let mut mean = Vec::new();
        let mut matrix = vec![0.0; side * side];
        for entry in shards {
            for index in 0..entry.samples {
                let record = self.record(entry, index as usize)?.ok_or_else(malformed)?;
                let (numbers, rest) = record.payload().as_chunks();
                let mut numbers = numbers.iter().map(|bytes| f64::from_le_bytes(*bytes));
                let at = (entry.first_sample + index) as usize;
                let expected =
                    if at == 0 { side } else { (side + 1).checked_sub(at).ok_or_else(malformed)? };
                if !rest.is_empty() || numbers.len() != expected {
                    return Err(malformed());
                }
                match at.checked_sub(1) {
                    None => mean = numbers.collect(),
                    Some(row) => {
                        matrix[row * side + row..(row + 1) * side].fill_with(|| numbers.next().unwrap_or(0.0))
                    }
                }
            }
        }
        mirror(&mut matrix, side);
        Ok(Some(WhiteningMap { mean, matrix }))
    }
}

/// The whitening of the samples of `reader`: with the mean m of the images x, their contrast normalized, and the covariance
/// C = mean of (x - m)ᵀ(x - m) + 0.1 I, the matrix is C^(-1/2).
fn fit(
    reader: &DatasetReader,
    progress: &mut dyn FnMut(WhiteningProgress),
) -> Result<WhiteningMap, ReadError> {
    let samples = reader.len();
    let side = reader.manifest().shape.elements().map_or(0, |n| n as usize);
    let mut mean = vec![0.0; side];
    each_block(reader, side, |rows, _| {
        for row in rows.chunks_exact(side) {
            mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
    })?;
    mean.iter_mut().for_each(|sum| *sum /= samples as f64);
    let mut covariance = vec![0.0; side * side];
    each_block(reader, side, |rows, done| {
        for row in rows.chunks_exact_mut(side) {
            row.iter_mut().zip(&mean).for_each(|(x, mean)| *x -= mean);
        }
        let strips = Strips::<_, STRIP>::pack(rows, side);
        add_upper_product(&strips, &strips, &mut covariance);
        progress(WhiteningProgress { part: "covariance", done, total: samples });
    })?;
    covariance.iter_mut().for_each(|sum| *sum /= samples as f64);
    covariance.iter_mut().step_by(side + 1).for_each(|variance| *variance += FILTER_BIAS);
    mirror(&mut covariance, side);
    let mut products = |done, total| progress(WhiteningProgress { part: "inverse root", done, total });
    let matrix = inverse_root(&covariance, side, FILTER_BIAS, &mut products);
    Ok(WhiteningMap { mean, matrix })
}

/// Shows all images, their contrast normalized, some at a time, and how many have been shown then.
fn each_block(
    reader: &DatasetReader,
    side: usize,
    mut see: impl FnMut(&mut [f64], u64),
) -> Result<(), ReadError> {
    let mut rows = Vec::with_capacity(BLOCK * side);
    for first in (0..reader.len()).step_by(BLOCK) {
        let end = reader.len().min(first + BLOCK as u64);
        rows.clear();
        for index in first..end {
            let sample = reader.sample(index)?;
            let table = contrast_table(sample.bytes());
            rows.extend(sample.bytes().iter().map(|raw| table[usize::from(*raw)]));
        }
        see(&mut rows, end);
    }
    Ok(())
}

/// Writes the records of `map`.
fn packed(
    map: &WhiteningMap,
    mut shards: ShardWriter,
) -> Result<(TemporaryDir, Vec<ShardEntry>), DatasetError> {
    let side = map.mean.len();
    let triangle = map.matrix.chunks_exact(side.max(1)).enumerate().map(|(row, numbers)| &numbers[row..]);
    for numbers in std::iter::once(&map.mean[..]).chain(triangle) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        shards.push(0, &bytes)?;
    }
    Ok(shards.finish()?)
}
