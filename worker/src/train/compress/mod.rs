//! The forms in which gradients travel: `[collective] wire` of the job file.
//!
//! A compressed bucket is an all-reduce over another element type ([`lockstep_collectives::formats`]) or of other
//! matrices ([`powersgd`]), in the same exact tree. What compressing loses of a logical shard's gradient is kept for
//! that shard and added to its next one ([`feedback`]). So neither the result nor what is kept depends on which rank
//! owns the shard; the checkpoint has it ([`state`]), and a run that is resumed goes on with the same bits.
//!
//! Every parameter is compressed by itself: how parameters are packed into buckets changes no bit.

pub(crate) mod bf16;
pub(crate) mod feedback;
pub(crate) mod int8;
pub(crate) mod low_rank;
pub(crate) mod powersgd;
pub(crate) mod state;

#[cfg(test)]
mod tests;

use super::error::TrainError;
use feedback::Feedback;
use lockstep_collectives::{CollectiveError, Element, Group, Numbers, Pending, ReduceOp, Tag};
use lockstep_common::job::{CollectiveSpec, WireFormat};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// A network's parameters as their gradients' wire sees them.
pub(crate) struct Shapes {
    /// The network's name in the job file.
    pub(crate) network: &'static str,
    /// Names and shapes, in name order.
    pub(crate) parameters: Vec<(String, Vec<i64>)>,
}

impl Shapes {
    fn elements(&self) -> Vec<usize> {
        self.parameters.iter().map(|(_, shape)| shape.iter().product::<i64>() as usize).collect()
    }
}

/// Where a parameter lies in a bucket.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    /// Its number in name order.
    pub(crate) parameter: usize,
    /// Its place in the bucket's leaves, in elements.
    pub(crate) range: Range<usize>,
}

/// How one network's gradients travel, and what stays behind of them.
pub(crate) trait Wire<T>: Send + Sync {
    /// Sends a bucket under `tag`, and under its uses from 1 on. `leaves` are the gradients of the owned shards, in
    /// which `spans` lie; every place belongs to a span.
    fn send(
        self: Arc<Self>,
        group: &Group,
        tag: Tag,
        spans: Vec<Span>,
        leaves: Vec<Numbers<T>>,
    ) -> Result<Box<dyn Arriving<T>>, CollectiveError>;

    /// Whether the sum over all shards is that of the numbers themselves.
    fn is_plain(&self) -> bool {
        false
    }

    /// What the owned shards have kept back, where the format loses anything.
    fn feedback(&self) -> Option<&Feedback> {
        None
    }

    /// For each parameter, in name order, what the next step starts from, the same on all ranks: empty for most.
    fn warm_start(&self) -> Vec<Vec<f32>> {
        Vec::new()
    }

    /// Takes over what [`Self::warm_start`] gave. The lengths have been checked.
    fn set_warm_start(&self, _values: Vec<Vec<f32>>) {}
}

/// A bucket on its way.
pub(crate) trait Arriving<T>: Send {
    /// Waits for the first of two exchanges and starts the second. Called for all buckets before any is waited for.
    fn advance(&mut self) -> Result<(), TrainError> {
        Ok(())
    }

    /// Writes the sum over all shards to `sum`, laid out as the leaves were.
    fn wait(self: Box<Self>, sum: &mut [T]) -> Result<(), TrainError>;
}

/// The numbers themselves.
pub(crate) struct Plain;

impl<T: Element> Wire<T> for Plain {
    fn send(
        self: Arc<Self>,
        group: &Group,
        tag: Tag,
        _spans: Vec<Span>,
        leaves: Vec<Numbers<T>>,
    ) -> Result<Box<dyn Arriving<T>>, CollectiveError> {
        Ok(Box::new(group.all_reduce(tag, leaves, ReduceOp::Sum)?))
    }

    fn is_plain(&self) -> bool {
        true
    }
}

impl<T: Element> Arriving<T> for Pending<Numbers<T>> {
    fn wait(self: Box<Self>, sum: &mut [T]) -> Result<(), TrainError> {
        /// Elements that one thread copies at a time.
        const PIECE: usize = 1 << 18;
        let found = Pending::wait(&self)?;
        if sum.len() != found.len() {
            return Err(TrainError::Fatal(format!(
                "a bucket of {} numbers came back as {}",
                sum.len(),
                found.len()
            )));
        }
        match sum.len() <= PIECE {
            true => sum.copy_from_slice(&found),
            false => {
                let pieces = sum.par_chunks_mut(PIECE).zip(found.par_chunks(PIECE));
                pieces.for_each(|(to, from)| to.copy_from_slice(from));
            }
        }
        Ok(())
    }
}

/// Whether gradients that travel so leave something behind on every rank, which belongs to the training state.
pub(crate) fn keeps_state(spec: &CollectiveSpec) -> bool {
    match spec.wire {
        WireFormat::F32 | WireFormat::Bf16 => false,
        WireFormat::Int8 | WireFormat::PowerSgd => true,
    }
}

/// The wire of a network with 32-bit gradients, for `owned` shards of `shards`.
pub(crate) fn wire(
    spec: &CollectiveSpec,
    shapes: &Shapes,
    seed: u64,
    owned: usize,
    shards: u32,
) -> Arc<dyn Wire<f32>> {
    match spec.wire {
        WireFormat::F32 => Arc::new(Plain),
        WireFormat::Bf16 => Arc::new(bf16::Bf16),
        WireFormat::Int8 => Arc::new(int8::Int8::new(shapes, owned)),
        WireFormat::PowerSgd => {
            let rank = spec.approximation_rank() as usize;
            Arc::new(powersgd::PowerSgd::new(shapes, rank, seed, owned, shards))
        }
    }
}
