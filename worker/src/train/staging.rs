//! A GPU's gradients through page-locked host memory, where the ranks do not share NCCL.
//!
//! A full bucket is copied to the host in order with the computation, and nobody waits for it: whatever hook comes
//! next looks whether it has arrived, and hands it to the group.

use super::Number;
use super::device_buckets::{Carried, Carrier};
use super::error::TrainError;
use lockstep_collectives::nccl::{Device as Gpu, Event, NcclError, Stream};
use lockstep_collectives::{Group, Numbers, Pending, ReduceOp, Tag};
use lockstep_nn::shim::{copy_async, pinned};
use parking_lot::Mutex;
use std::marker::PhantomData;
use std::sync::Arc;
use tch::{Device, Tensor};

/// Carries buckets through the host to the group's own transport.
pub(crate) struct Staging<T> {
    group: Group,
    compute: Stream,
    device: Device,
    pool: Arc<PinnedPool>,
    elements: PhantomData<fn() -> T>,
}

/// Page-locked vectors to use again: locking pages takes longer than copying them.
#[derive(Default)]
struct PinnedPool(Mutex<Vec<Tensor>>);

impl PinnedPool {
    fn take(&self, like: &Tensor) -> Result<Tensor, TrainError> {
        let mut free = self.0.lock();
        match free.iter().position(|tensor| tensor.numel() == like.numel()) {
            Some(at) => Ok(free.swap_remove(at)),
            None => Ok(pinned(like, like.numel())?),
        }
    }
}

impl<T: Number> Staging<T> {
    /// For GPU `index`, which `device` names for libtorch.
    pub(crate) fn new(group: Group, index: usize, device: Device) -> Result<Self, NcclError> {
        let compute = Stream::default_of(&Gpu::open(index)?);
        Ok(Self { group, compute, device, pool: Arc::default(), elements: PhantomData })
    }
}

impl<T: Number> Carrier for Staging<T> {
    fn launch(&self, tag: Tag, leaves: Vec<Tensor>) -> Result<Box<dyn Carried>, TrainError> {
        let copy = |leaf: &Tensor| {
            let mut copy = self.pool.take(leaf)?;
            copy_async(&mut copy, leaf)?;
            Ok(copy)
        };
        let copies = leaves.iter().map(copy).collect::<Result<Vec<_>, TrainError>>()?;
        let arrived = Event::after(&self.compute).map_err(|e| TrainError::Fatal(e.to_string()))?;
        let (group, pool) = (self.group.clone(), self.pool.clone());
        let state = State::<T>::Copying { copies, arrived };
        Ok(Box::new(Staged { group, pool, tag, device: self.device, state }))
    }
}

struct Staged<T> {
    group: Group,
    pool: Arc<PinnedPool>,
    tag: Tag,
    device: Device,
    state: State<T>,
}

enum State<T> {
    /// On the way from the GPU to the host.
    Copying { copies: Vec<Tensor>, arrived: Event },
    /// On the way through the group.
    Reducing(Pending<Numbers<T>>),
}

impl<T: Number> Carried for Staged<T> {
    fn advance(&mut self, finish: bool) -> Result<(), TrainError> {
        let State::Copying { copies, arrived } = &mut self.state else { return Ok(()) };
        let well = || finish && self.group.failure().is_none();
        if !arrived.wait_while(well).map_err(|e| TrainError::Fatal(e.to_string()))? {
            return self.group.failure().map_or(Ok(()), |failure| Err(failure.into()));
        }
        let to_numbers = |copy: &Tensor| -> Result<Numbers<T>, TrainError> {
            let mut numbers = self.group.numbers(copy.numel());
            copy.f_copy_data(&mut numbers, copy.numel())?;
            Ok(numbers)
        };
        let leaves = copies.iter().map(to_numbers).collect::<Result<Vec<_>, _>>()?;
        self.pool.0.lock().append(copies);
        self.state = State::Reducing(self.group.all_reduce(self.tag, leaves, ReduceOp::Sum)?);
        Ok(())
    }

    fn wait(mut self: Box<Self>) -> Result<Tensor, TrainError> {
        self.advance(true)?;
        match &self.state {
            State::Reducing(pending) => {
                Ok(Tensor::f_from_slice(pending.wait()?.as_slice())?.f_to_device(self.device)?)
            }
            State::Copying { .. } => Err(TrainError::Fatal(format!("{} did not leave the GPU", self.tag))),
        }
    }
}
