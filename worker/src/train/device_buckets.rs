//! Gradients of a GPU on their way into the all-reduce: like [`buckets`](super::buckets), in device memory.
//!
//! A gradient is copied from device to device, so its hook returns at once. How a full bucket gets reduced is the
//! [`Carrier`]'s affair: from GPU to GPU, or through page-locked host memory.

use super::buckets::{BucketPlan, never_sent};
use super::delivery::Deliveries;
use super::error::TrainError;
use lockstep_collectives::{Tag, TagKind};
use lockstep_nn::NnError;
use parking_lot::Mutex;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Reduces buckets in device memory.
pub(crate) trait Carrier: Send + Sync {
    /// Starts to reduce one vector per owned shard, in the order of the shards. Does not wait for the GPU.
    fn launch(&self, tag: Tag, leaves: Vec<Tensor>) -> Result<Box<dyn Carried>, TrainError>;
}

/// A bucket on its way.
pub(crate) trait Carried: Send {
    /// Takes the next step that is due by now or, if `finish`, all up to where only other ranks are missing.
    fn advance(&mut self, finish: bool) -> Result<(), TrainError>;

    /// The reduced vector, on the device.
    fn wait(self: Box<Self>) -> Result<Tensor, TrainError>;
}

/// The gradients of one phase.
pub(crate) struct DeviceBuckets {
    plan: Arc<BucketPlan>,
    deliveries: Deliveries,
    /// Per bucket and owned shard; taken when the bucket is launched.
    leaves: Vec<Vec<Mutex<Option<Tensor>>>>,
    line: Mutex<Line>,
    carrier: Arc<dyn Carrier>,
    step: u64,
    phase: u16,
}

/// Buckets are launched in their order, whichever is full first: NCCL tells reductions apart by nothing else.
struct Line {
    full: Vec<bool>,
    carried: Vec<Box<dyn Carried>>,
}

impl DeviceBuckets {
    /// Buckets for `owned` shards that `carrier` reduces as `phase` of `step`.
    pub(crate) fn new(
        plan: Arc<BucketPlan>,
        owned: usize,
        memory: (Kind, Device),
        carrier: Arc<dyn Carrier>,
        step: u64,
        phase: u16,
    ) -> Result<Self, TrainError> {
        let leaf = |length: usize| Ok(Mutex::new(Some(Tensor::f_empty([length as i64], memory)?)));
        let bucket = |length| (0..owned).map(|_| leaf(length)).collect::<Result<Vec<_>, TrainError>>();
        let leaves = plan.lengths().map(bucket).collect::<Result<Vec<_>, _>>()?;
        let deliveries = Deliveries::new(&plan, owned);
        let line = Mutex::new(Line { full: vec![false; leaves.len()], carried: Vec::new() });
        Ok(Self { plan, deliveries, leaves, line, carrier, step, phase })
    }

    /// Takes the final gradient of `parameter` from the shard in `slot`.
    pub(crate) fn deliver(&self, slot: usize, parameter: usize, gradient: &Tensor) -> Result<(), NnError> {
        let place = &self.plan.places()[parameter];
        if let Some(leaf) = &*self.leaves[place.bucket][slot].lock() {
            let part = leaf.f_narrow(0, place.offset as i64, place.elements as i64)?;
            part.f_view(place.shape.as_slice())?.f_copy_(gradient)?;
        }
        let full = self.deliveries.came(slot, parameter, place.bucket);
        self.go_on(full.then_some(place.bucket)).map_err(through_libtorch)
    }

    /// The shard in `slot` has nothing more to deliver; what has not come counts as zeros.
    pub(crate) fn finish(&self, slot: usize) -> Result<(), NnError> {
        for (parameter, place) in self.plan.places().iter().enumerate() {
            if !self.deliveries.has_come(slot, parameter) {
                if let Some(leaf) = &*self.leaves[place.bucket][slot].lock() {
                    let _ = leaf.f_narrow(0, place.offset as i64, place.elements as i64)?.f_zero_()?;
                }
                let full = self.deliveries.counted(place.bucket);
                self.go_on(full.then_some(place.bucket)).map_err(through_libtorch)?;
            }
        }
        Ok(())
    }

    /// Launches what can be, and moves on what has been.
    fn go_on(&self, full: Option<usize>) -> Result<(), TrainError> {
        let mut line = self.line.lock();
        if let Some(bucket) = full {
            line.full[bucket] = true;
        }
        for carried in &mut line.carried {
            carried.advance(false)?;
        }
        while line.full.get(line.carried.len()).copied().unwrap_or(false) {
            let next = line.carried.len();
            let tag = Tag::new(self.step, self.phase, TagKind::Gradient).index(next as u32);
            let leaves = self.leaves[next].iter().filter_map(|leaf| leaf.lock().take()).collect();
            line.carried.push(self.carrier.launch(tag, leaves)?);
        }
        Ok(())
    }

    /// The reduced gradients by parameter name, once they are there.
    pub(crate) fn wait(&self) -> Result<Vec<(String, Tensor)>, TrainError> {
        let mut carried = std::mem::take(&mut self.line.lock().carried);
        if carried.len() < self.leaves.len() {
            return Err(never_sent(carried.len()));
        }
        for bucket in &mut carried {
            bucket.advance(true)?;
        }
        let flat = carried.into_iter().map(Carried::wait).collect::<Result<Vec<_>, _>>()?;
        self.plan.unpack(&flat)
    }

    /// The order in which gradients became final.
    pub(crate) fn observed_order(&self) -> Vec<usize> {
        self.deliveries.observed_order()
    }
}

/// A hook's error keeps its type on its way through libtorch.
fn through_libtorch(error: TrainError) -> NnError {
    match error {
        TrainError::Network(error) => error,
        TrainError::Collective(error) => NnError::Exchange(Box::new(error)),
        other => NnError::Exchange(Box::new(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_nn::init::Init;
    use lockstep_nn::vars::Vars;

    /// Adds on the CPU and writes down in which order it was asked to.
    #[derive(Default)]
    struct Scribe(Mutex<Vec<u32>>);

    struct Sum(Tensor);

    impl Carrier for Scribe {
        fn launch(&self, tag: Tag, leaves: Vec<Tensor>) -> Result<Box<dyn Carried>, TrainError> {
            self.0.lock().push(tag.index);
            let sum = leaves.into_iter().reduce(|left, right| left + right);
            Ok(Box::new(Sum(sum.ok_or_else(|| never_sent(0))?)))
        }
    }

    impl Carried for Sum {
        fn advance(&mut self, _finish: bool) -> Result<(), TrainError> {
            Ok(())
        }

        fn wait(self: Box<Self>) -> Result<Tensor, TrainError> {
            Ok(self.0)
        }
    }

    /// Two shards, three parameters, a bucket for each.
    fn buckets(carrier: Arc<Scribe>) -> DeviceBuckets {
        let memory = (Kind::Double, Device::Cpu);
        let mut vars = Vars::new("model", 1, memory.0, memory.1);
        for name in ["a", "b", "c"] {
            let _ = vars.root().parameter(name, &[2, 3], Init::Constant(0.0)).unwrap();
        }
        let plan = Arc::new(BucketPlan::new(&vars, &[2, 1, 0], 6 * 8, 8));
        let buckets = DeviceBuckets::new(plan, 2, memory, carrier, 5, 1).unwrap();
        for leaf in buckets.leaves.iter().flatten() {
            // Fresh memory is often zero by chance.
            let _ = leaf.lock().as_mut().unwrap().fill_(f64::NAN);
        }
        buckets
    }

    fn gradient(value: f64) -> Tensor {
        // Not contiguous, as gradients of transposed weights are not.
        Tensor::full([3, 2], value, (Kind::Double, Device::Cpu)).transpose(0, 1)
    }

    #[test]
    fn buckets_are_launched_in_their_order_whichever_is_full_first() {
        let scribe = Arc::new(Scribe::default());
        let buckets = buckets(scribe.clone());
        for (slot, parameter) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            buckets.deliver(slot, parameter, &gradient(1.0)).unwrap();
        }
        assert!(scribe.0.lock().is_empty(), "bucket 0 holds the last parameter, which has not come");
        buckets.deliver(0, 2, &gradient(1.0)).unwrap();
        buckets.deliver(1, 2, &gradient(1.0)).unwrap();
        assert_eq!(*scribe.0.lock(), [0, 1, 2]);
        assert_eq!(buckets.observed_order(), [0, 1, 2]);
    }

    #[test]
    fn shards_are_added_and_what_does_not_come_counts_as_zeros() {
        let buckets = buckets(Arc::default());
        buckets.deliver(0, 0, &gradient(1.0)).unwrap();
        buckets.deliver(1, 0, &gradient(2.0)).unwrap();
        buckets.deliver(1, 2, &gradient(4.0)).unwrap();
        assert!(buckets.wait().is_err(), "the shards have not finished");
        buckets.finish(0).unwrap();
        buckets.finish(1).unwrap();
        let sums: Vec<_> = buckets.wait().unwrap();
        let expected = [("a", 3.0), ("b", 0.0), ("c", 4.0)];
        for ((name, sum), (expected_name, value)) in sums.iter().zip(expected) {
            assert_eq!((name.as_str(), sum.size()), (expected_name, vec![2, 3]));
            assert_eq!(*sum, Tensor::full([2, 3], value, (Kind::Double, Device::Cpu)), "{name}");
        }
        assert_eq!(buckets.observed_order(), [0, 2, 1]);
    }
}
