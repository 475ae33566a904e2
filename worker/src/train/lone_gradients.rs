//! Gradients of a job's only shard on a GPU: kept as they come, since there is nothing to add to them.

use super::buckets::{BucketPlan, never_sent};
use super::delivery::Deliveries;
use super::error::TrainError;
use lockstep_collectives::Group;
use lockstep_nn::NnError;
use parking_lot::Mutex;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// The gradients of one phase.
pub(crate) struct LoneGradients {
    plan: Arc<BucketPlan>,
    deliveries: Deliveries,
    /// By parameter.
    gradients: Vec<Mutex<Option<Tensor>>>,
    memory: (Kind, Device),
}

impl LoneGradients {
    /// None has come yet.
    pub(crate) fn new(plan: Arc<BucketPlan>, memory: (Kind, Device)) -> Self {
        let gradients = (0..plan.parameters()).map(|_| Mutex::default()).collect();
        Self { deliveries: Deliveries::new(&plan, 1), plan, gradients, memory }
    }

    /// Takes the final gradient of `parameter`.
    pub(crate) fn deliver(&self, parameter: usize, gradient: &Tensor) -> Result<(), NnError> {
        *self.gradients[parameter].lock() = Some(gradient.f_contiguous()?);
        self.deliveries.came(0, parameter, self.plan.places()[parameter].bucket);
        Ok(())
    }

    /// There is nothing more to deliver; what has not come counts as zeros.
    pub(crate) fn finish(&self) -> Result<(), NnError> {
        for (parameter, place) in self.plan.places().iter().enumerate() {
            if !self.deliveries.has_come(0, parameter) {
                *self.gradients[parameter].lock() =
                    Some(Tensor::f_zeros(place.shape.as_slice(), self.memory)?);
            }
        }
        Ok(())
    }

    /// The gradients by parameter name.
    pub(crate) fn wait(&self, group: &Group) -> Result<Vec<(String, Tensor)>, TrainError> {
        if let Some(failure) = group.failure() {
            return Err(failure.into());
        }
        let named = self.plan.places().iter().zip(&self.gradients).map(|(place, gradient)| {
            let gradient = gradient.lock().take().ok_or_else(|| never_sent(place.bucket))?;
            Ok((place.name.clone(), gradient))
        });
        named.collect()
    }

    /// The order in which gradients became final.
    pub(crate) fn observed_order(&self) -> Vec<usize> {
        self.deliveries.observed_order()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::job::Reduction;
    use lockstep_common::placement::Placement;
    use lockstep_nn::init::Init;
    use lockstep_nn::vars::Vars;

    #[test]
    fn what_comes_is_kept_in_row_major_order_and_what_does_not_counts_as_zeros() {
        let memory = (Kind::Double, Device::Cpu);
        let mut vars = Vars::new("model", 1, memory.0, memory.1);
        for name in ["a", "b"] {
            let _ = vars.root().parameter(name, &[2, 3], Init::Constant(0.0)).unwrap();
        }
        let group = Group::solo(Placement::even(1, 1), Reduction::Exact).unwrap();
        let gradients = LoneGradients::new(Arc::new(BucketPlan::new(&vars, &[1, 0], 48, 8)), memory);
        let gradient = Tensor::arange(6, memory).view([3, 2]).transpose(0, 1);
        gradients.deliver(1, &gradient).unwrap();
        gradients.finish().unwrap();
        let named = gradients.wait(&group).unwrap();
        assert_eq!(named.iter().map(|(name, _)| &name[..]).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((&named[0].1, &named[1].1), (&Tensor::zeros([2, 3], memory), &gradient));
        assert!(named[1].1.is_contiguous());
        assert_eq!(gradients.observed_order(), [1, 0]);
        assert!(gradients.wait(&group).is_err(), "they have been taken");
    }
}
