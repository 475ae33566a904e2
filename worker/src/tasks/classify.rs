//! Image classification: one network, one phase.

use super::{LaneTask, Modules};
use crate::train::error::TrainError;
use crate::train::phase::{PhasePlan, ShardBatch, ShardLoss};
use lockstep_common::job::JobSpec;
use lockstep_nn::forward::Forward;
use lockstep_nn::loss;
use tch::Tensor;

/// Sums over the test samples.
pub(super) const EVALUATION: &[&str] = &["test_loss", "test_top1", "test_top5"];

pub(super) fn phases() -> Vec<PhasePlan> {
    vec![PhasePlan { name: "classify".to_owned(), learns: 0, minibatch: 0, figures: &["loss", "top1"] }]
}

pub(super) fn lane(modules: Vec<Modules>, job: &JobSpec) -> Result<Box<dyn LaneTask>, TrainError> {
    let Some(network) = modules.into_iter().next() else {
        return Err(TrainError::Fatal("a `classify` job has no network".to_owned()));
    };
    Ok(Box::new(Classify { network, label_smoothing: job.loss.label_smoothing }))
}

struct Classify {
    network: Modules,
    label_smoothing: f64,
}

impl LaneTask for Classify {
    fn forward(
        &mut self,
        _phase: &PhasePlan,
        batch: &ShardBatch,
        forward: &mut Forward,
    ) -> Result<ShardLoss, TrainError> {
        let logits = self.network.learning.forward(&batch.images, forward)?;
        let loss = loss::cross_entropy(&logits, &batch.labels, self.label_smoothing, batch.global as f64)?;
        let correct = tch::no_grad(|| loss::correct_in_top(&logits, &batch.labels, 1))?;
        let figures = vec![tch::no_grad(|| loss.f_double_value(&[]))?, correct / batch.global as f64];
        Ok(ShardLoss { loss, figures })
    }

    fn evaluate(&mut self, batch: &ShardBatch) -> Result<Vec<f64>, TrainError> {
        let logits = self.network.frozen.forward(&batch.images, &mut Forward::evaluation())?;
        // Divided by 1, the loss is a sum over samples, as the other figures are.
        let loss = loss::cross_entropy(&logits, &batch.labels, 0.0, 1.0)?.f_double_value(&[])?;
        Ok(vec![
            loss,
            loss::correct_in_top(&logits, &batch.labels, 1)?,
            loss::correct_in_top(&logits, &batch.labels, 5)?,
        ])
    }

    fn picture(&mut self) -> Result<Option<Tensor>, TrainError> {
        Ok(None)
    }
}
