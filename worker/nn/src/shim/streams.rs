//! GPU streams beside the default one, and copies that nobody waits for.

use super::{Failure, values_mut};
use crate::error::NnError;
use std::ffi::c_void;
use std::ptr;
use tch::kind::Element;
use tch::{Device, Tensor};

unsafe extern "C" {
    fn lockstep_side_stream(
        device: i32,
        id: *mut i64,
        handle: *mut *mut c_void,
        failure: *mut Failure,
    ) -> bool;
    fn lockstep_exchange_stream(device: i32, id: i64, previous: *mut i64, failure: *mut Failure) -> bool;
    fn lockstep_copy_async(to: *mut c_void, from: *const c_void, failure: *mut Failure) -> bool;
    fn lockstep_upload(
        from: *const c_void,
        device: i32,
        id: i64,
        result: *mut *mut c_void,
        failure: *mut Failure,
    ) -> bool;
    fn lockstep_pinned(
        like: *const c_void,
        elements: i64,
        pinned: *mut *mut c_void,
        failure: *mut Failure,
    ) -> bool;
}

/// A stream of one GPU whose work does not wait for the default stream's, from libtorch's pool.
#[derive(Clone, Copy, Debug)]
pub struct SideStream {
    device: i32,
    id: i64,
    handle: usize,
}

impl SideStream {
    /// A stream of GPU `device`. Fails where [`load_cuda`](super::load_cuda) has not succeeded.
    pub fn new(device: usize) -> Result<Self, NnError> {
        let device =
            i32::try_from(device).map_err(|_| NnError::Torch(format!("there is no GPU {device}")))?;
        let (mut id, mut handle, mut failure) = (0, ptr::null_mut(), Failure::none());
        // SAFETY: all three are written before the call returns, and outlive it.
        if unsafe { lockstep_side_stream(device, &raw mut id, &raw mut handle, &raw mut failure) } {
            Ok(Self { device, id, handle: handle as usize })
        } else {
            Err(failure.into_error())
        }
    }

    /// Its `cudaStream_t`, which lives as long as the process.
    pub fn handle(&self) -> *mut c_void {
        self.handle as *mut c_void
    }

    /// Runs `body` with this thread's GPU work on this stream instead of the one it uses otherwise.
    pub fn run<R>(&self, body: impl FnOnce() -> Result<R, NnError>) -> Result<R, NnError> {
        let _back = Restore { stream: *self, previous: self.exchange(self.id)? };
        body()
    }

    /// Copies `from`, which lies in memory of [`pinned`], to the GPU, beside what that computes, and waits for this copy
    /// only. The result may be used on this thread's own stream.
    pub fn upload(&self, from: &Tensor) -> Result<Tensor, NnError> {
        let (mut result, mut failure) = (ptr::null_mut(), Failure::none());
        let from = from.as_ptr().cast();
        // SAFETY: `from` is a live tensor; the other two are written before the call returns.
        if unsafe { lockstep_upload(from, self.device, self.id, &raw mut result, &raw mut failure) } {
            // SAFETY: the shim made this tensor for us to own.
            Ok(unsafe { Tensor::from_ptr(result.cast()) })
        } else {
            Err(failure.into_error())
        }
    }

    fn exchange(&self, id: i64) -> Result<i64, NnError> {
        let (mut previous, mut failure) = (0, Failure::none());
        // SAFETY: both are written before the call returns; `id` comes from libtorch, for this device.
        if unsafe { lockstep_exchange_stream(self.device, id, &raw mut previous, &raw mut failure) } {
            Ok(previous)
        } else {
            Err(failure.into_error())
        }
    }
}

/// Takes the thread back to its stream, also when it panics.
struct Restore {
    stream: SideStream,
    previous: i64,
}

impl Drop for Restore {
    fn drop(&mut self) {
        // It worked on the way here.
        let _ = self.stream.exchange(self.previous);
    }
}

/// Copies `from` into `to`, of the same shape, in order with the current stream. Between a GPU and memory of
/// [`pinned`] the caller does not wait: what arrives on the CPU may be read after an event of the stream only.
pub fn copy_async(to: &mut Tensor, from: &Tensor) -> Result<(), NnError> {
    let mut failure = Failure::none();
    // SAFETY: both are live tensors; libtorch keeps the memory of copies in flight.
    if unsafe { lockstep_copy_async(to.as_mut_ptr().cast(), from.as_ptr().cast(), &raw mut failure) } {
        Ok(())
    } else {
        Err(failure.into_error())
    }
}

/// A vector of `elements` of the type of `like` in page-locked memory of the CPU, its values arbitrary. Fails where
/// [`load_cuda`](super::load_cuda) has not succeeded.
pub fn pinned(like: &Tensor, elements: usize) -> Result<Tensor, NnError> {
    let (mut tensor, mut failure) = (ptr::null_mut(), Failure::none());
    let count = elements as i64;
    // SAFETY: `like` is a live tensor, and the other two are written before the call returns.
    if unsafe { lockstep_pinned(like.as_ptr().cast(), count, &raw mut tensor, &raw mut failure) } {
        // SAFETY: the shim made this tensor for us to own.
        Ok(unsafe { Tensor::from_ptr(tensor.cast()) })
    } else {
        Err(failure.into_error())
    }
}

/// `values` on `device`, in order with its current stream and without a wait for that.
pub(crate) fn on_device<T: Element + Copy>(values: &[T], device: Device) -> Result<Tensor, NnError> {
    if device == Device::Cpu {
        return Ok(Tensor::f_from_slice(values)?);
    }
    let mut host = pinned(&Tensor::f_empty([0], (T::KIND, Device::Cpu))?, values.len())?;
    values_mut(&mut host).copy_from_slice(values);
    let mut there = Tensor::f_empty([values.len() as i64], (T::KIND, device))?;
    copy_async(&mut there, &host)?;
    Ok(there)
}
