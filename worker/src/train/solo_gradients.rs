//! Gradients of a job's only rank, which has nothing to send: kept as they come and added where they are used.
//!
//! A lone shard's are libtorch's own tensors. Clipping scales them in place, so none may share memory with another's; no layer's
//! do.

use super::Number;
use super::buckets::BucketPlan;
use super::delivery::Deliveries;
use super::error::TrainError;
use lockstep_collectives::Group;
use lockstep_nn::NnError;
use lockstep_nn::shim::{values, values_mut};
use parking_lot::Mutex;
use std::marker::PhantomData;
use std::sync::Arc;
use tch::{Device, Tensor};

/// The gradients of one phase.
pub(crate) struct SoloGradients<T> {
    group: Group,
    plan: Arc<BucketPlan>,
    deliveries: Deliveries,
    parameters: Vec<Mutex<Parameter>>,
    device: Device,
    number: PhantomData<T>,
}

struct Parameter {
    /// By shard.
    gradients: Vec<Option<Tensor>>,
    /// Where the sum of several shards' gradients goes.
    room: Option<Tensor>,
    /// Once all have come.
    sum: Option<Tensor>,
}

impl<T: Number> SoloGradients<T> {
    /// None has come yet. Several shards are added in memory of the CPU: their `device` must be that.
    pub(crate) fn new(plan: Arc<BucketPlan>, group: Group, device: Device) -> Result<Self, TrainError> {
        let shards = group.placement().shards() as usize;
        let sums = match shards {
            1 => Vec::new(),
            _ => plan.unpack(&plan.sums::<T>()?)?,
        };
        let mut sums = sums.into_iter().map(|(_, sum)| sum);
        let parameter = |_| {
            let gradients = (0..shards).map(|_| None).collect();
            Mutex::new(Parameter { gradients, room: sums.next(), sum: None })
        };
        let parameters = (0..plan.parameters()).map(parameter).collect();
        Ok(Self {
            deliveries: Deliveries::new(&plan, shards),
            group,
            plan,
            parameters,
            device,
            number: PhantomData,
        })
    }

    /// Takes the final gradient of `parameter` from the shard in `slot`.
    pub(crate) fn deliver(&self, slot: usize, parameter: usize, gradient: &Tensor) -> Result<(), NnError> {
        self.take(slot, parameter, gradient.f_contiguous()?)?;
        self.deliveries.came(slot, parameter, self.plan.places()[parameter].bucket);
        Ok(())
    }

    /// The shard in `slot` has nothing more to deliver; what has not come counts as zeros.
    pub(crate) fn finish(&self, slot: usize) -> Result<(), NnError> {
        for (parameter, place) in self.plan.places().iter().enumerate() {
            if !self.deliveries.has_come(slot, parameter) {
                let zeros = Tensor::f_zeros(place.shape.as_slice(), (T::KIND, self.device))?;
                self.take(slot, parameter, zeros)?;
            }
        }
        Ok(())
    }

    fn take(&self, slot: usize, parameter: usize, gradient: Tensor) -> Result<(), NnError> {
        let Parameter { gradients, room, sum } = &mut *self.parameters[parameter].lock();
        gradients[slot] = Some(gradient);
        if gradients.iter().any(Option::is_none) {
            return Ok(());
        }
        let all: Vec<Tensor> = gradients.iter_mut().filter_map(Option::take).collect();
        *sum = match room.take() {
            None => all.into_iter().next(),
            Some(mut room) => {
                let leaves: Vec<&[T]> = all.iter().map(values::<T>).collect();
                let added = self.group.sum(values_mut::<T>(&mut room), &leaves);
                added.map_err(|e| NnError::Exchange(Box::new(e)))?;
                Some(room)
            }
        };
        Ok(())
    }

    /// The reduced gradients by parameter name. Those of several shards share memory with those of the plan's next phase.
    pub(crate) fn wait(&self) -> Result<Vec<(String, Tensor)>, TrainError> {
        if let Some(failure) = self.group.failure() {
            return Err(failure.into());
        }
        let named = self.plan.places().iter().zip(&self.parameters).map(|(place, own)| {
            let gradient = own.lock().sum.take().ok_or_else(|| never_came(&place.name))?;
            Ok((place.name.clone(), gradient))
        });
        named.collect()
    }

    /// The order in which gradients became final.
    pub(crate) fn observed_order(&self) -> Vec<usize> {
        self.deliveries.observed_order()
    }
}

/// That a shard has neither delivered a gradient nor finished, which no input can bring about.
fn never_came(parameter: &str) -> TrainError {
    TrainError::Fatal(format!("the gradient of `{parameter}` never came"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::job::Reduction;
    use lockstep_common::placement::Placement;
    use lockstep_nn::init::Init;
    use lockstep_nn::vars::Vars;
    use tch::Kind;

    const MEMORY: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn gradients(shards: u32) -> SoloGradients<f64> {
        let mut vars = Vars::new("model", 1, MEMORY.0, MEMORY.1);
        for name in ["a", "b"] {
            let _ = vars.root().parameter(name, &[2, 3], Init::Constant(0.0)).unwrap();
        }
        let group = Group::solo(Placement::even(shards, 1), Reduction::Exact).unwrap();
        SoloGradients::new(Arc::new(BucketPlan::new(&vars, &[1, 0], 48, 8)), group, MEMORY.1).unwrap()
    }

    #[test]
    fn what_comes_is_kept_in_row_major_order_and_what_does_not_counts_as_zeros() {
        let gradients = gradients(1);
        let gradient = Tensor::arange(6, MEMORY).view([3, 2]).transpose(0, 1);
        gradients.deliver(0, 1, &gradient).unwrap();
        gradients.finish(0).unwrap();
        let named = gradients.wait().unwrap();
        assert_eq!(named.iter().map(|(name, _)| &name[..]).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((&named[0].1, &named[1].1), (&Tensor::zeros([2, 3], MEMORY), &gradient));
        assert!(named[1].1.is_contiguous());
        assert_eq!(gradients.observed_order(), [1, 0]);
        assert!(gradients.wait().is_err(), "they have been taken");
    }

    #[test]
    fn shards_are_added_in_the_order_of_the_tree_whoever_comes_first() {
        // One after the other, in the order of the shards or in that in which they come, these come to 4 and not to 3.
        let leaves = [1.0, 2.0, 1e16, -1e16].map(|value| Tensor::full([2, 3], value, MEMORY));
        for order in [[0, 1, 2, 3], [3, 1, 0, 2]] {
            let gradients = gradients(4);
            for slot in order {
                gradients.deliver(slot, 0, &leaves[slot]).unwrap();
                gradients.finish(slot).unwrap();
            }
            let named = gradients.wait().unwrap();
            assert_eq!(named[0].1, Tensor::full([2, 3], 3.0, MEMORY));
            assert_eq!(named[1].1, Tensor::zeros([2, 3], MEMORY));
        }
        assert_eq!(leaves[2], Tensor::full([2, 3], 1e16, MEMORY), "what others may read has not changed");
    }

    #[test]
    fn a_shard_that_says_nothing_is_an_error() {
        let gradients = gradients(2);
        gradients.finish(0).unwrap();
        assert!(gradients.wait().is_err());
    }
}
