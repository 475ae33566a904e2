//! Gradients on their way into the all-reduce, while the backward pass goes on.
//!
//! A gradient becomes final in one lane at a time; once every owned shard has delivered every parameter of a bucket,
//! the bucket is sent. A parameter without a gradient counts as zeros. How parameters are packed into buckets
//! changes no bit of the result, only when things are sent, so the order is learnt from the first backward pass.

use super::Number;
use super::compress::{Arriving, Span, Wire};
use super::delivery::Deliveries;
use super::error::TrainError;
use lockstep_collectives::{CollectiveError, Group, Numbers, Tag, TagKind};
use lockstep_nn::NnError;
use lockstep_nn::shim::values_mut;
use lockstep_nn::vars::Vars;
use parking_lot::Mutex;
use std::sync::Arc;
use tch::{Device, Tensor};

/// Where each parameter of a network lies in its buckets.
pub(crate) struct BucketPlan {
    /// By parameter, in name order.
    places: Vec<Place>,
    /// Elements per bucket.
    lengths: Vec<usize>,
    /// Parameters per bucket.
    members: Vec<usize>,
    /// Where the sums go, phase after phase, per bucket; empty before the first.
    sums: Mutex<Vec<Tensor>>,
}

pub(crate) struct Place {
    pub(super) name: String,
    pub(crate) shape: Vec<i64>,
    pub(crate) bucket: usize,
    pub(crate) offset: usize,
    pub(crate) elements: usize,
}

impl BucketPlan {
    /// Packs the parameters of `vars` in the given `order` (indices in name order), a new bucket whenever
    /// `bucket_bytes` would be exceeded.
    pub(crate) fn new(vars: &Vars, order: &[usize], bucket_bytes: u64, element_bytes: usize) -> Self {
        let mut places: Vec<Place> = vars
            .parameters()
            .map(|(name, var)| Place {
                name: name.to_owned(),
                shape: var.tensor.size(),
                bucket: 0,
                offset: 0,
                elements: var.tensor.numel(),
            })
            .collect();
        let capacity = (bucket_bytes as usize / element_bytes).max(1);
        let (mut lengths, mut members) = (Vec::new(), Vec::new());
        for &index in order {
            let place = &mut places[index];
            let full = lengths.last().is_none_or(|&used| used + place.elements > capacity);
            if full {
                lengths.push(0);
                members.push(0);
            }
            place.bucket = lengths.len() - 1;
            place.offset = lengths[place.bucket];
            lengths[place.bucket] += place.elements;
            members[place.bucket] += 1;
        }
        Self { places, lengths, members, sums: Mutex::default() }
    }

    /// Where the parameters of `bucket` lie in it.
    fn spans(&self, bucket: u32) -> Vec<Span> {
        let own = self.places.iter().enumerate().filter(|(_, place)| place.bucket == bucket as usize);
        own.map(|(parameter, p)| Span { parameter, range: p.offset..p.offset + p.elements }).collect()
    }

    /// How many parameters there are.
    pub(crate) fn parameters(&self) -> usize {
        self.places.len()
    }

    /// Where each parameter lies, in name order.
    pub(crate) fn places(&self) -> &[Place] {
        &self.places
    }

    /// Elements of each bucket.
    pub(crate) fn lengths(&self) -> impl Iterator<Item = usize> {
        self.lengths.iter().copied()
    }

    /// Parameters of each bucket.
    pub(crate) fn members(&self) -> impl Iterator<Item = usize> {
        self.members.iter().copied()
    }

    /// Where the sums of a phase go, per bucket: in the same memory as those of the phase before, so that no page of it is
    /// new to the kernel each time.
    pub(crate) fn sums<T: Number>(&self) -> Result<Vec<Tensor>, TrainError> {
        let mut sums = self.sums.lock();
        if sums.is_empty() {
            let new = self.lengths().map(|length| Tensor::f_empty([length as i64], (T::KIND, Device::Cpu)));
            *sums = new.collect::<Result<_, _>>()?;
        }
        Ok(sums.iter().map(Tensor::shallow_clone).collect())
    }

    /// The parameters' parts of the buckets' vectors `flat`, by name.
    pub(crate) fn unpack(&self, flat: &[Tensor]) -> Result<Vec<(String, Tensor)>, TrainError> {
        let parameter = |place: &Place| {
            let part = flat[place.bucket].f_narrow(0, place.offset as i64, place.elements as i64)?;
            Ok((place.name.clone(), part.f_view(place.shape.as_slice())?))
        };
        self.places.iter().map(parameter).collect()
    }
}

/// That a bucket was never complete, which no input can bring about.
pub(crate) fn never_sent(bucket: usize) -> TrainError {
    TrainError::Fatal(format!("gradient bucket {bucket} was never sent"))
}

/// Sends a full bucket towards the other ranks.
pub(crate) type Launch<T> =
    dyn Fn(u32, Vec<Numbers<T>>) -> Result<Box<dyn Arriving<T>>, CollectiveError> + Send + Sync;

/// The gradients of one phase.
pub(crate) struct GradientBuckets<T> {
    plan: Arc<BucketPlan>,
    /// Per bucket.
    buckets: Vec<Bucket<T>>,
    deliveries: Deliveries,
    launch: Box<Launch<T>>,
}

struct Bucket<T> {
    /// Per owned shard; emptied when the bucket is sent.
    leaves: Vec<Mutex<Option<Numbers<T>>>>,
    pending: Mutex<Option<Box<dyn Arriving<T>>>>,
}

impl<T: Number> GradientBuckets<T> {
    /// Buckets for `owned` shards, in memory that `allocate` gives, whatever its content.
    pub(crate) fn new(
        plan: Arc<BucketPlan>,
        owned: usize,
        allocate: impl Fn(usize) -> Numbers<T>,
        launch: Box<Launch<T>>,
    ) -> Self {
        let bucket = |length| Bucket {
            leaves: (0..owned).map(|_| Mutex::new(Some(allocate(length)))).collect(),
            pending: Mutex::new(None),
        };
        let buckets = plan.lengths().map(bucket).collect();
        let deliveries = Deliveries::new(&plan, owned);
        Self { plan, buckets, deliveries, launch }
    }

    /// Buckets that are all-reduced over `group` as `phase` of `step`, in the form that `wire` gives them.
    pub(crate) fn for_group(
        plan: Arc<BucketPlan>,
        wire: Arc<dyn Wire<T>>,
        group: Group,
        step: u64,
        phase: u16,
    ) -> Self {
        let owned = group.placement().range(group.rank()).len();
        let allocator = group.clone();
        let packed = plan.clone();
        let launch = move |bucket, leaves| {
            let tag = Tag::new(step, phase, TagKind::Gradient).index(bucket);
            wire.clone().send(&group, tag, packed.spans(bucket), leaves)
        };
        Self::new(plan, owned, |len| allocator.numbers(len), Box::new(launch))
    }

    /// Takes the final gradient of `parameter` from the shard in `slot`.
    pub(crate) fn deliver(&self, slot: usize, parameter: usize, gradient: &Tensor) -> Result<(), NnError> {
        let place = &self.plan.places[parameter];
        if let Some(leaf) = &mut *self.buckets[place.bucket].leaves[slot].lock() {
            gradient.f_copy_data(&mut leaf[place.offset..place.offset + place.elements], place.elements)?;
        }
        if self.deliveries.came(slot, parameter, place.bucket) { self.send(place.bucket) } else { Ok(()) }
    }

    /// The shard in `slot` has nothing more to deliver; what has not come counts as zeros.
    pub(crate) fn finish(&self, slot: usize) -> Result<(), NnError> {
        for (parameter, place) in self.plan.places.iter().enumerate() {
            if !self.deliveries.has_come(slot, parameter) {
                if let Some(leaf) = &mut *self.buckets[place.bucket].leaves[slot].lock() {
                    leaf[place.offset..place.offset + place.elements].fill(T::default());
                }
                if self.deliveries.counted(place.bucket) {
                    self.send(place.bucket)?;
                }
            }
        }
        Ok(())
    }

    fn send(&self, bucket: usize) -> Result<(), NnError> {
        let leaves = self.buckets[bucket].leaves.iter().filter_map(|l| l.lock().take()).collect();
        let pending = (self.launch)(bucket as u32, leaves).map_err(|e| NnError::Exchange(Box::new(e)))?;
        *self.buckets[bucket].pending.lock() = Some(pending);
        Ok(())
    }

    /// The reduced gradients by parameter name, once they are there. On the CPU they share memory with those of the plan's
    /// next phase.
    pub(crate) fn wait(&self, device: Device) -> Result<Vec<(String, Tensor)>, TrainError> {
        let mut arriving = Vec::with_capacity(self.buckets.len());
        for (index, bucket) in self.buckets.iter().enumerate() {
            arriving.push(bucket.pending.lock().take().ok_or_else(|| never_sent(index))?);
        }
        arriving.iter_mut().try_for_each(|bucket| bucket.advance())?;
        let flat = arriving.into_iter().zip(self.plan.sums::<T>()?).map(|(bucket, mut sum)| {
            bucket.wait(values_mut::<T>(&mut sum))?;
            Ok(sum.f_to_device(device)?)
        });
        self.plan.unpack(&flat.collect::<Result<Vec<Tensor>, TrainError>>()?)
    }

    /// The order in which gradients became final: what came, then what did not, last names first.
    pub(crate) fn observed_order(&self) -> Vec<usize> {
        self.deliveries.observed_order()
    }
}

/// The order before any is known: last names first, since names tend to follow the forward pass.
pub(crate) fn initial_order(parameters: usize) -> Vec<usize> {
    (0..parameters).rev().collect()
}

/// An order in bytes, for the other ranks.
pub(crate) fn encode_order(order: &[usize]) -> Vec<u8> {
    order.iter().flat_map(|&i| (i as u32).to_le_bytes()).collect()
}

/// The order in `bytes`; `None` unless it names each of `parameters` once.
pub(crate) fn decode_order(bytes: &[u8], parameters: usize) -> Option<Vec<usize>> {
    let (words, []) = bytes.as_chunks::<4>() else { return None };
    let order: Vec<usize> = words.iter().map(|w| u32::from_le_bytes(*w) as usize).collect();
    let mut sorted = order.clone();
    sorted.sort_unstable();
    sorted.iter().copied().eq(0..parameters).then_some(order)
}
