//! Decoding samples into tensors.

use super::pool::Pool;
use super::preparation::{Basis, Preparation, Use};
use crate::train::Number;
use crate::train::error::TrainError;
use crate::train::phase::ShardBatch;
use lockstep_common::dataset::{DatasetReader, Encoding, Manifest};
use lockstep_common::job::DataSpec;
use lockstep_common::rng::Stream;
use lockstep_images::{Source, Workbench};
use lockstep_nn::NnError;
use lockstep_nn::shim::{SideStream, pinned, values_mut};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;
use tch::kind::Element;
use tch::{Device, Tensor};

/// Reads, augments and scales samples of one dataset, in parallel.
pub(crate) struct Decoder<T> {
    reader: DatasetReader,
    preparation: Preparation<T>,
    seed: u64,
    memory: Memory,
    pool: Arc<Pool>,
}

/// Where batches are made, and where they go from there.
#[derive(Clone, Copy)]
enum Memory {
    /// They stay where they are.
    Host,
    /// From page-locked memory to a GPU, beside what that computes.
    Gpu(SideStream),
}

impl Memory {
    fn of(device: Device) -> Result<Self, NnError> {
        match device {
            Device::Cuda(index) => Ok(Self::Gpu(SideStream::new(index)?)),
            _ => Ok(Self::Host),
        }
    }

    /// A vector of arbitrary values.
    fn vector<E: Element>(self, elements: usize) -> Result<Tensor, NnError> {
        match self {
            Self::Host => Ok(Tensor::f_empty([elements as i64], (E::KIND, Device::Cpu))?),
            Self::Gpu(_) => pinned(&Tensor::f_empty([0], (E::KIND, Device::Cpu))?, elements),
        }
    }

    fn send(self, tensor: Tensor) -> Result<Tensor, NnError> {
        match self {
            Self::Host => Ok(tensor),
            Self::Gpu(side) => side.upload(&tensor),
        }
    }
}

/// Test samples, each with all of its views.
pub(crate) struct ViewBatch {
    /// [samples × views, channels, height, width], sample by sample.
    pub(crate) images: Tensor,
    /// By sample.
    pub(crate) labels: Vec<i64>,
}

impl<T: Number> Decoder<T> {
    /// Of the samples of `reader`.
    pub(crate) fn new(
        reader: DatasetReader,
        data: &DataSpec,
        purpose: Use,
        basis: &Basis<T>,
        seed: u64,
        device: Device,
        pool: Arc<Pool>,
    ) -> Result<Self, TrainError> {
        let preparation = Preparation::new(data, purpose, reader.manifest(), basis)?;
        Ok(Self { reader, preparation, seed, memory: Memory::of(device)?, pool })
    }

    /// How many samples the dataset has.
    pub(crate) fn len(&self) -> u64 {
        self.reader.len()
    }

    /// The dataset.
    pub(crate) fn manifest(&self) -> &Manifest {
        self.reader.manifest()
    }

    /// How many views a sample has.
    pub(crate) fn views(&self) -> usize {
        self.preparation.views()
    }

    /// The training samples of one shard, augmented.
    pub(crate) fn augmented(
        &self,
        epoch: u64,
        samples: Vec<u64>,
        global: u64,
    ) -> Result<ShardBatch, TrainError> {
        let (images, labels) = self.batch(&samples, epoch)?;
        let mut numbers = self.memory.vector::<i64>(labels.len())?;
        values_mut(&mut numbers).copy_from_slice(&labels);
        let labels = self.memory.send(numbers)?;
        Ok(ShardBatch { samples, images, labels, global })
    }

    /// Test samples.
    pub(crate) fn viewed(&self, samples: Range<u64>) -> Result<ViewBatch, TrainError> {
        let (images, labels) = self.batch(&samples.collect::<Vec<_>>(), 0)?;
        Ok(ViewBatch { images, labels })
    }

    fn batch(&self, samples: &[u64], epoch: u64) -> Result<(Tensor, Vec<i64>), TrainError> {
        let shape = self.preparation.shape();
        let length = self.preparation.len() * self.views();
        let mut images = self.memory.vector::<T>(samples.len() * length)?;
        let values = values_mut::<T>(&mut images);
        let mut labels = vec![0i64; samples.len()];
        self.pool.install(|| {
            let together = self.preparation.together(samples.len(), rayon::current_num_threads());
            let (values, labels) =
                (values.par_chunks_mut(length * together), labels.par_chunks_mut(together));
            let work = values.zip(labels).zip(samples.par_chunks(together));
            work.try_for_each(|((values, labels), samples)| self.prepare(epoch, samples, values, labels))
        })?;
        let n = (samples.len() * self.views()) as i64;
        let images = images.f_view([n, shape.channels.into(), shape.height.into(), shape.width.into()])?;
        Ok((self.memory.send(images)?, labels))
    }

    /// Writes some samples' numbers and labels. They depend on seed, epoch and sample alone.
    fn prepare(
        &self,
        epoch: u64,
        samples: &[u64],
        values: &mut [T],
        labels: &mut [i64],
    ) -> Result<(), TrainError> {
        let streams = samples.iter().map(|sample| Stream::new(self.seed, "augment", &[epoch, *sample]));
        let mut streams: Vec<_> = streams.collect();
        let length = values.len() / samples.len().max(1);
        let each = samples.iter().zip(values.chunks_exact_mut(length)).zip(&mut streams).zip(labels);
        for (((&sample, values), stream), label) in each {
            *label = super::pool::with_bench(|bench| self.prepare_one(bench, sample, stream, values))?;
        }
        self.preparation.finish(&mut streams, values);
        Ok(())
    }

    fn prepare_one(
        &self,
        bench: &mut Workbench,
        sample: u64,
        stream: &mut Stream,
        values: &mut [T],
    ) -> Result<i64, TrainError> {
        let raw = self.reader.sample(sample).map_err(|e| TrainError::Fatal(e.to_string()))?;
        let source = match self.reader.manifest().encoding {
            Encoding::RawU8 => Source::Planes(raw.shape, raw.bytes()),
            Encoding::Image => Source::Encoded(raw.bytes()),
        };
        self.preparation.run(bench, source, stream, values).map_err(|what| {
            let name = &self.reader.manifest().name;
            TrainError::Fatal(format!("sample {sample} of dataset `{name}` cannot be prepared: {what}"))
        })?;
        Ok(i64::from(raw.label))
    }
}
