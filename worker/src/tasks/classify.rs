//! Image classification: one network, one phase.

use super::{LaneTask, Modules};
use crate::train::error::TrainError;
use crate::train::phase::{PhasePlan, ShardBatch, ShardLoss};
use lockstep_common::job::JobSpec;
use lockstep_nn::forward::Forward;
use lockstep_nn::loss;
use tch::Tensor;

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
        let output = self.network.learning.forward(&batch.images, forward)?;
        let logits = output.main;
        let global = batch.global as f64;
        let loss_of = |logits| loss::cross_entropy(logits, &batch.labels, self.label_smoothing, global);
        let mut loss = loss_of(&logits)?;
        for head in &output.auxiliary {
            // Weighted here, before the shards' gradients are added.
            loss = loss.f_add(&loss_of(&head.output)?.f_mul_scalar(head.weight)?)?;
        }
        let correct = tch::no_grad(|| loss::correct_in_top(&logits, &batch.labels, 1))?;
        let figures = vec![loss.shallow_clone(), correct.f_div_scalar(global)?];
        Ok(ShardLoss { loss, figures })
    }

    fn logits(&mut self, images: &Tensor) -> Result<Tensor, TrainError> {
        Ok(self.network.frozen.forward(images, &mut Forward::evaluation())?.main)
    }

    fn picture(&mut self) -> Result<Option<Tensor>, TrainError> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::ids::LogicalShard;
    use lockstep_nn::NnError;
    use lockstep_nn::forward::LocalOnly;
    use lockstep_nn::models::{Auxiliary, Model, Output};
    use std::sync::Arc;
    use tch::{Device, Kind};

    /// A network whose logits are its input, and those of its heads multiples of that.
    struct Echo;

    impl Model for Echo {
        fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
            let head = |name, factor: f64, weight| Auxiliary { name, output: x * factor, weight };
            let heads = [head("first", 2.0, 0.3), head("second", -1.0, 0.4)];
            let auxiliary = heads.into_iter().filter(|_| fwd.train).collect();
            Ok(Output { main: x.shallow_clone(), auxiliary })
        }
    }

    #[test]
    fn heads_add_their_weighted_share_of_the_loss_in_training_only() {
        let network = Modules {
            learning: Box::new(Echo),
            frozen: Box::new(Echo),
            kind: Kind::Double,
            device: Device::Cpu,
        };
        let mut task = Classify { network, label_smoothing: 0.1 };
        let images = Tensor::from_slice2(&[[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]]);
        let labels = Tensor::from_slice(&[0i64, 2]);
        let expect = |factor: f64, smoothing, global| {
            let logits = &images * factor;
            loss::cross_entropy(&logits, &labels, smoothing, global).unwrap().double_value(&[])
        };
        // Two of the eight samples of the global batch.
        let expected = expect(1.0, 0.1, 8.0) + 0.3 * expect(2.0, 0.1, 8.0) + 0.4 * expect(-1.0, 0.1, 8.0);
        let batch = ShardBatch {
            samples: vec![0, 1],
            images: images.shallow_clone(),
            labels: labels.shallow_clone(),
            global: 8,
        };
        let mut fwd = Forward::training(1, 0, LogicalShard(0), vec![0, 1], Arc::new(LocalOnly));
        let mut done = task.forward(&phases()[0], &batch, &mut fwd).unwrap();
        assert!((done.loss.double_value(&[]) - expected).abs() < 1e-15);
        assert!((done.take_figures().unwrap()[0] - expected).abs() < 1e-15);
        assert_eq!(task.logits(&images).unwrap(), images);
    }
}
