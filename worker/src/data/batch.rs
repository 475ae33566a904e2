//! Decoding samples into tensors.

use super::augment::{self, Pixels};
use crate::train::Number;
use crate::train::error::TrainError;
use crate::train::phase::ShardBatch;
use lockstep_common::dataset::DatasetReader;
use lockstep_common::job::{Augment, PixelScale};
use std::ops::Range;
use tch::{Device, Tensor};

/// Reads, augments and scales samples of one dataset.
pub(crate) struct Decoder<T> {
    reader: DatasetReader,
    /// Per channel: the number for each raw value.
    table: Vec<[T; 256]>,
    augments: Vec<Augment>,
    seed: u64,
    device: Device,
}

impl<T: Number> Decoder<T> {
    /// `statistics` are those of the training set (mean and standard deviation per channel, pixels 0 to 1), by
    /// which the test set is scaled too.
    pub(crate) fn new(
        reader: DatasetReader,
        scale: PixelScale,
        statistics: (&[f64], &[f64]),
        augments: Vec<Augment>,
        seed: u64,
        device: Device,
    ) -> Result<Self, TrainError> {
        let channels = reader.manifest().shape.channels as usize;
        let (mean, std) = statistics;
        if mean.len() != channels || std.len() != channels {
            return Err(TrainError::Fatal(format!(
                "dataset `{}` has {channels} channels, the training set {}",
                reader.manifest().name,
                mean.len()
            )));
        }
        let table = (0..channels)
            .map(|c| {
                std::array::from_fn(|raw| {
                    let unit = raw as f64 / 255.0;
                    T::from_f64(match scale {
                        PixelScale::Unit => unit,
                        // A constant channel carries nothing; it becomes zero.
                        PixelScale::Standardize if std[c] > 0.0 => (unit - mean[c]) / std[c],
                        PixelScale::Standardize => 0.0,
                    })
                })
            })
            .collect();
        Ok(Self { reader, table, augments, seed, device })
    }

    /// How many samples the dataset has.
    pub(crate) fn len(&self) -> u64 {
        self.reader.len()
    }

    /// The training samples of one shard, augmented.
    pub(crate) fn augmented(
        &self,
        epoch: u64,
        samples: Vec<u64>,
        global: u64,
    ) -> Result<ShardBatch, TrainError> {
        self.batch(samples, global, |sample, pixels| {
            augment::apply(&self.augments, self.seed, epoch, sample, pixels);
        })
    }

    /// Test samples as they are.
    pub(crate) fn plain(&self, samples: Range<u64>) -> Result<ShardBatch, TrainError> {
        let global = samples.end - samples.start;
        self.batch(samples.collect(), global, |_, _| {})
    }

    fn batch(
        &self,
        samples: Vec<u64>,
        global: u64,
        change: impl Fn(u64, &mut Pixels),
    ) -> Result<ShardBatch, TrainError> {
        let shape = self.reader.manifest().shape;
        let (channels, height, width) =
            (shape.channels as usize, shape.height as usize, shape.width as usize);
        let mut values = Vec::with_capacity(samples.len() * channels * height * width);
        let mut labels = Vec::with_capacity(samples.len());
        for &sample in &samples {
            let raw = self.reader.sample(sample).map_err(|e| TrainError::Fatal(e.to_string()))?;
            let mut pixels = Pixels { channels, height, width, values: raw.bytes().to_vec() };
            change(sample, &mut pixels);
            for (plane, table) in pixels.values.chunks_exact(height * width).zip(&self.table) {
                values.extend(plane.iter().map(|&p| table[usize::from(p)]));
            }
            labels.push(i64::from(raw.label));
        }
        let n = samples.len() as i64;
        let images =
            Tensor::f_from_slice(&values)?.f_view([n, channels as i64, height as i64, width as i64])?;
        let labels = Tensor::f_from_slice(&labels)?;
        Ok(ShardBatch {
            samples,
            images: images.f_to_device(self.device)?,
            labels: labels.f_to_device(self.device)?,
            global,
        })
    }
}
