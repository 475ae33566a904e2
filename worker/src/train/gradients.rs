//! The gradients of one phase, wherever the device is.

use super::Number;
use super::buckets::{BucketPlan, GradientBuckets};
use super::compress::Wire;
use super::device_buckets::{Carrier, DeviceBuckets};
use super::error::TrainError;
use super::solo_gradients::SoloGradients;
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
    /// Of a job's only rank, which sends nothing.
    Solo(SoloGradients<T>),
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
        let is_solo = group.world_size() == 1 && wire.is_plain();
        let buckets = match carrier {
            _ if is_solo && (owned == 1 || device == Device::Cpu) => {
                Buckets::Solo(SoloGradients::new(plan, group.clone(), device)?)
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
            Buckets::Solo(gradients) => gradients.deliver(slot, parameter, gradient),
        }
    }

    /// The shard in `slot` has nothing more to deliver.
    pub(crate) fn finish(&self, slot: usize) -> Result<(), NnError> {
        match &self.buckets {
            Buckets::Host(buckets) => buckets.finish(slot),
            Buckets::Device(buckets) => buckets.finish(slot),
            Buckets::Solo(gradients) => gradients.finish(slot),
        }
    }

    /// The reduced gradients by parameter name on `device`, once they are there.
    pub(crate) fn wait(&self, device: Device) -> Result<Vec<(String, Tensor)>, TrainError> {
        match &self.buckets {
            Buckets::Host(buckets) => buckets.wait(device),
            Buckets::Device(buckets) => buckets.wait(),
            Buckets::Solo(gradients) => gradients.wait(),
        }
    }

    /// The order in which gradients became final.
    pub(crate) fn observed_order(&self) -> Vec<usize> {
        match &self.buckets {
            Buckets::Host(buckets) => buckets.observed_order(),
            Buckets::Device(buckets) => buckets.observed_order(),
            Buckets::Solo(gradients) => gradients.observed_order(),
        }
    }
}
