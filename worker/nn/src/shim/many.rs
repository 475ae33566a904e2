//! Work on many tensors in few kernels.

use super::Failure;
use crate::error::NnError;
use std::ffi::c_void;
use tch::Tensor;

unsafe extern "C" {
    fn lockstep_fused_sgd(
        parameters: *const *const c_void,
        gradients: *const *const c_void,
        momentum_buffers: *const *const c_void,
        count: usize,
        lr: f64,
        weight_decay: f64,
        momentum: f64,
        nesterov: bool,
        failure: *mut Failure,
    ) -> bool;
    fn lockstep_copy_all(
        to: *const *const c_void,
        from: *const *const c_void,
        count: usize,
        failure: *mut Failure,
    ) -> bool;
}

/// A parameter on a GPU, its gradient and its momentum buffer, of one shape and type and without gaps.
pub(crate) struct Moving<'a> {
    pub(crate) parameter: &'a Tensor,
    pub(crate) gradient: &'a Tensor,
    pub(crate) momentum_buffer: &'a Tensor,
}

/// `torch.optim.SGD` without dampening for parameters of one type that share their rates, on a GPU.
pub(crate) fn fused_sgd(
    moving: &[Moving<'_>],
    lr: f64,
    weight_decay: f64,
    momentum: f64,
    nesterov: bool,
) -> Result<(), NnError> {
    let pointers = |of: fn(&Moving<'_>) -> *const c_void| moving.iter().map(of).collect::<Vec<_>>();
    let parameters = pointers(|m| m.parameter.as_ptr().cast());
    let gradients = pointers(|m| m.gradient.as_ptr().cast());
    let buffers = pointers(|m| m.momentum_buffer.as_ptr().cast());
    let mut failure = Failure::none();
    // SAFETY: each list has `moving.len()` live tensors.
    let done = unsafe {
        lockstep_fused_sgd(
            parameters.as_ptr(),
            gradients.as_ptr(),
            buffers.as_ptr(),
            moving.len(),
            lr,
            weight_decay,
            momentum,
            nesterov,
            &raw mut failure,
        )
    };
    if done { Ok(()) } else { Err(failure.into_error()) }
}

/// Copies each of `from` into the one of `to` at its place, which has its shape. Nobody may use those meanwhile.
pub(crate) fn copy_all(to: &[Tensor], from: &[Tensor]) -> Result<(), NnError> {
    let pointers = |tensors: &[Tensor]| tensors.iter().map(|t| t.as_ptr().cast()).collect::<Vec<_>>();
    let (to, from, mut failure) = (pointers(to), pointers(from), Failure::none());
    let count = to.len().min(from.len());
    // SAFETY: both lists have at least `count` live tensors.
    if unsafe { lockstep_copy_all(to.as_ptr(), from.as_ptr(), count, &raw mut failure) } {
        Ok(())
    } else {
        Err(failure.into_error())
    }
}
