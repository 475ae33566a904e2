//! Which gradients of a phase have come.

use super::buckets::BucketPlan;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Counts the gradients of all owned shards into their buckets.
pub(crate) struct Deliveries {
    /// Per owned shard and parameter: whether it has come.
    delivered: Vec<Vec<AtomicBool>>,
    /// The order in which the first owned shard delivers.
    order: Mutex<Vec<usize>>,
    /// Per bucket.
    missing: Vec<AtomicUsize>,
}

impl Deliveries {
    /// Nothing has come yet from any of `owned` shards.
    pub(crate) fn new(plan: &BucketPlan, owned: usize) -> Self {
        let none = || (0..plan.parameters()).map(|_| AtomicBool::new(false)).collect();
        Self {
            delivered: (0..owned).map(|_| none()).collect(),
            order: Mutex::default(),
            missing: plan.members().map(|members| AtomicUsize::new(members * owned)).collect(),
        }
    }

    /// The gradient of `parameter` from the shard in `slot` lies in `bucket`; whether that completes it.
    pub(crate) fn came(&self, slot: usize, parameter: usize, bucket: usize) -> bool {
        if slot == 0 {
            self.order.lock().push(parameter);
        }
        self.delivered[slot][parameter].store(true, Ordering::Relaxed);
        self.counted(bucket)
    }

    /// Whether the shard in `slot` has delivered `parameter`.
    pub(crate) fn has_come(&self, slot: usize, parameter: usize) -> bool {
        self.delivered[slot][parameter].load(Ordering::Relaxed)
    }

    /// One gradient less is missing in `bucket`; whether it was the last one.
    pub(crate) fn counted(&self, bucket: usize) -> bool {
        // Release/acquire: whoever sends the bucket must see what the other lanes wrote into it.
        self.missing[bucket].fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// The order in which gradients became final: what came, then what did not, last names first.
    pub(crate) fn observed_order(&self) -> Vec<usize> {
        let mut order = self.order.lock().clone();
        let parameters = self.delivered.first().map_or(0, Vec::len);
        let rest = (0..parameters).rev().filter(|i| !order.contains(i)).collect::<Vec<_>>();
        order.extend(rest);
        order
    }
}
