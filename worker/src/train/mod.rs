//! The training loop and its parts.
//!
//! A worker owns some logical shards of every global batch. Each has a [`lane`]: a thread with its own module
//! objects and autograd graph over the shared weights. The [`trainer`] leads them through the phases of each step,
//! while [`gradients`] sends them as they become final, in the form that [`compress`] gives them, and [`rendezvous`]
//! merges batch-norm sums.

pub(crate) mod buckets;
pub(crate) mod checkpoint;
pub(crate) mod clock;
pub(crate) mod compress;
pub(crate) mod delivery;
pub(crate) mod device;
pub(crate) mod device_buckets;
pub(crate) mod error;
pub(crate) mod evaluate;
pub(crate) mod fingerprint;
pub(crate) mod gpu;
pub(crate) mod gradients;
pub(crate) mod lane;
pub(crate) mod mismatch;
pub(crate) mod permits;
pub(crate) mod phase;
pub(crate) mod picture;
pub(crate) mod rendezvous;
pub(crate) mod replica;
pub(crate) mod samples;
pub(crate) mod solo_gradients;
pub(crate) mod staging;
pub(crate) mod statistics;
pub(crate) mod trainer;
pub(crate) mod wishes;

#[cfg(test)]
pub(crate) mod tests;

use compress::{Shapes, Wire};
use lockstep_common::job::JobSpec;
use std::sync::Arc;

/// The number type of a job's weights, gradients and arithmetic.
pub(crate) trait Number:
    lockstep_collectives::Element + tch::kind::Element + lockstep_common::product::Real
{
    /// The nearest value.
    fn from_f64(value: f64) -> Self;

    /// How gradients of this type travel under `job`, which was checked, for `owned` of its logical shards.
    fn wire(job: &JobSpec, shapes: &Shapes, owned: usize) -> Arc<dyn Wire<Self>>;
}

impl Number for f32 {
    fn from_f64(value: f64) -> Self {
        value as Self
    }

    fn wire(job: &JobSpec, shapes: &Shapes, owned: usize) -> Arc<dyn Wire<Self>> {
        compress::wire(&job.collective, shapes, job.seed, owned, job.logical_shards)
    }
}

impl Number for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }

    fn wire(_job: &JobSpec, _shapes: &Shapes, _owned: usize) -> Arc<dyn Wire<Self>> {
        Arc::new(compress::Plain)
    }
}
