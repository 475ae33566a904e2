//! Decoding samples into tensors.

use super::pool::Pool;
use crate::train::Number;
use crate::train::error::TrainError;
use crate::train::phase::ShardBatch;
use lockstep_common::dataset::{DatasetReader, Encoding, Manifest, SampleShape};
use lockstep_common::job::{DataSpec, PixelScale};
use lockstep_common::rng::Stream;
use lockstep_images::{Picture, Pipeline, Source, Workbench};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Tensor};

/// What samples are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Training: augmented.
    Train,
    /// Evaluation: the same every time.
    Evaluate,
}

/// Reads, augments and scales samples of one dataset, in parallel.
pub(crate) struct Decoder<T> {
    reader: DatasetReader,
    pipeline: Pipeline,
    /// Of every sample when it is prepared.
    shape: SampleShape,
    /// Per channel: the number for each raw value.
    table: Vec<[T; 256]>,
    seed: u64,
    device: Device,
    pool: Arc<Pool>,
}

impl<T: Number> Decoder<T> {
    /// `train` is the training set, by whose statistics the test set is scaled too.
    pub(crate) fn new(
        reader: DatasetReader,
        data: &DataSpec,
        purpose: Use,
        train: &Manifest,
        seed: u64,
        device: Device,
        pool: Arc<Pool>,
    ) -> Result<Self, TrainError> {
        let (steps, shape) = match purpose {
            Use::Train => (&data.augment, data.training_shape(reader.manifest())),
            Use::Evaluate => (&data.evaluate, data.test_shape(reader.manifest())),
        };
        let shape = shape.map_err(|(_, what)| TrainError::Fatal(what))?;
        let (mean, std) = data.statistics(train);
        let channels = shape.channels as usize;
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
                    T::from_f64(match data.scale {
                        PixelScale::Unit => unit,
                        // A constant channel carries nothing; it becomes zero.
                        PixelScale::Standardize if std[c] > 0.0 => (unit - mean[c]) / std[c],
                        PixelScale::Standardize => 0.0,
                    })
                })
            })
            .collect();
        let pipeline = Pipeline::new(data.channels, steps.clone());
        Ok(Self { reader, pipeline, shape, table, seed, device, pool })
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
        self.batch(samples, epoch, global)
    }

    /// Test samples.
    pub(crate) fn plain(&self, samples: Range<u64>) -> Result<ShardBatch, TrainError> {
        let global = samples.end - samples.start;
        self.batch(samples.collect(), 0, global)
    }

    fn batch(&self, samples: Vec<u64>, epoch: u64, global: u64) -> Result<ShardBatch, TrainError> {
        let [channels, height, width] = [self.shape.channels, self.shape.height, self.shape.width];
        let length = channels as usize * height as usize * width as usize;
        let mut values = vec![T::default(); samples.len() * length];
        let mut labels = vec![0i64; samples.len()];
        let work = values.par_chunks_exact_mut(length).zip(&mut labels).zip(&samples);
        self.pool.install(|| {
            work.try_for_each(|((values, label), &sample)| -> Result<(), TrainError> {
                *label = super::pool::with_bench(|bench| self.prepare(bench, epoch, sample, values))?;
                Ok(())
            })
        })?;
        let n = samples.len() as i64;
        let images =
            Tensor::f_from_slice(&values)?.f_view([n, channels.into(), height.into(), width.into()])?;
        let labels = Tensor::f_from_slice(&labels)?;
        Ok(ShardBatch {
            samples,
            images: images.f_to_device(self.device)?,
            labels: labels.f_to_device(self.device)?,
            global,
        })
    }

    /// Writes one sample's numbers and returns its label. They depend on seed, epoch and sample alone.
    fn prepare(
        &self,
        bench: &mut Workbench,
        epoch: u64,
        sample: u64,
        values: &mut [T],
    ) -> Result<i64, TrainError> {
        let raw = self.reader.sample(sample).map_err(|e| TrainError::Fatal(e.to_string()))?;
        let source = match self.reader.manifest().encoding {
            Encoding::RawU8 => Source::Planes(raw.shape, raw.bytes()),
            Encoding::Image => Source::Encoded(raw.bytes()),
        };
        let mut stream = Stream::new(self.seed, "augment", &[epoch, sample]);
        let malformed = |what: String| {
            let name = &self.reader.manifest().name;
            TrainError::Fatal(format!("sample {sample} of dataset `{name}` cannot be prepared: {what}"))
        };
        let picture = self.pipeline.run(bench, source, &mut stream).map_err(|e| malformed(e.to_string()))?;
        let found = [picture.channels(), picture.height(), picture.width()];
        let expected = [self.shape.channels, self.shape.height, self.shape.width].map(|n| n as usize);
        if found != expected {
            return Err(malformed(format!("it is {found:?} where {expected:?} is expected")));
        }
        self.scale(&picture, values);
        Ok(i64::from(raw.label))
    }

    fn scale(&self, picture: &Picture, values: &mut [T]) {
        let plane = picture.height() * picture.width();
        let channels = picture.channels();
        for ((c, table), values) in self.table.iter().enumerate().zip(values.chunks_exact_mut(plane)) {
            let raw = picture.values().iter().skip(c).step_by(channels);
            for (value, raw) in values.iter_mut().zip(raw) {
                *value = table[usize::from(*raw)];
            }
        }
    }
}
