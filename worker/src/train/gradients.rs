//! The gradients of one phase, wherever the device is.

use super::Number;
use super::buckets::{BucketPlan, GradientBuckets};
use super::compress::Wire;
use super::device_buckets::{Carrier, DeviceBuckets};
use super::error::TrainError;
use super::lone_gradients::LoneGradients;
use lockstep_collectives::Group;
use lockstep_nn::NnError;
use std::sync::Arc;
use tch::{Device, Tensor};

/// Where the hooks of all lanes deliver.
pub(crate) struct Gradients<T> {
    group: Group,
    buckets: Buckets<T>,
}

enum Buckets<T> {
    /// In memory of the CPU.
    Host(GradientBuckets<T>),
    /// In memory of a GPU.
    Device(DeviceBuckets),
    /// Of the only shard of a job, on a GPU: nobody adds to them.
    Alone(LoneGradients),
}

impl<T: Number> Gradients<T> {
    /// Buckets for `phase` of `step` of `group`. A GPU's gradients have a `carrier`, unless `wire` compresses them, which
    /// is done on the host.
    pub(crate) fn new(
        plan: Arc<BucketPlan>,
        wire: Arc<dyn Wire<T>>,
        group: &Group,
        carrier: Option<&Arc<dyn Carrier>>,
        device: Device,
        step: u64,
        phase: u16,
    ) -> Result<Self, TrainError> {
        let owned = group.placement().range(group.rank()).len();
        let buckets = match carrier {
            Some(_) if group.placement().shards() == 1 => {
                Buckets::Alone(LoneGradients::new(plan, (T::KIND, device)))
            }
            None => Buckets::Host(GradientBuckets::for_group(plan, wire, group.clone(), step, phase)),
            Some(carrier) => {
                let memory = (T::KIND, device);
                Buckets::Device(DeviceBuckets::new(plan, owned, memory, carrier.clone(), step, phase)?)
            }
        };
        Ok(Self { group: group.clone(), buckets })
    }

    /// Takes the final gradient of `parameter` from the shard in `slot`.
    pub(crate) fn deliver(&self, slot: usize, parameter: usize, gradient: &Tensor) -> Result<(), NnError> {
        // The first bucket is full when the last of this rank's shards has delivered, which others may wait for long.
        self.group.note_progress();
        match &self.buckets {
            Buckets::Host(buckets) => buckets.deliver(slot, parameter, gradient),
            Buckets::Device(buckets) => buckets.deliver(slot, parameter, gradient),
            Buckets::Alone(gradients) => gradients.deliver(parameter, gradient),
        }
    }

    /// The shard in `slot` has nothing more to deliver.
    pub(crate) fn finish(&self, slot: usize) -> Result<(), NnError> {
        match &self.buckets {
            Buckets::Host(buckets) => buckets.finish(slot),
            Buckets::Device(buckets) => buckets.finish(slot),
            Buckets::Alone(gradients) => gradients.finish(),
        }
    }

    /// The reduced gradients by parameter name on `device`, once they are there.
    pub(crate) fn wait(&self, device: Device) -> Result<Vec<(String, Tensor)>, TrainError> {
        match &self.buckets {
            Buckets::Host(buckets) => buckets.wait(device),
            Buckets::Device(buckets) => buckets.wait(),
            Buckets::Alone(gradients) => gradients.wait(&self.group),
        }
    }

    /// The order in which gradients became final.
    pub(crate) fn observed_order(&self) -> Vec<usize> {
        match &self.buckets {
            Buckets::Host(buckets) => buckets.observed_order(),
            Buckets::Device(buckets) => buckets.observed_order(),
            Buckets::Alone(gradients) => gradients.observed_order(),
        }
    }
}
