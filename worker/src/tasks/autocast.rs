//! Any task with its convolutions and matrix products in bfloat16.

use super::LaneTask;
use crate::train::error::TrainError;
use crate::train::phase::{PhasePlan, ShardBatch, ShardLoss};
use lockstep_nn::forward::Forward;
use lockstep_nn::shim::autocast;
use tch::{Device, Tensor};

/// A task whose forward passes run under autocast.
pub(super) struct Autocast {
    pub(super) task: Box<dyn LaneTask>,
    pub(super) device: Device,
}

impl LaneTask for Autocast {
    fn forward(
        &mut self,
        phase: &PhasePlan,
        batch: &ShardBatch,
        forward: &mut Forward,
    ) -> Result<ShardLoss, TrainError> {
        autocast(self.device, || self.task.forward(phase, batch, forward))?
    }

    fn logits(&mut self, images: &Tensor) -> Result<Tensor, TrainError> {
        autocast(self.device, || self.task.logits(images))?
    }

    fn picture(&mut self) -> Result<Option<Tensor>, TrainError> {
        autocast(self.device, || self.task.picture())?
    }
}
