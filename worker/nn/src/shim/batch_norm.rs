//! Batch norm whose sums pass through a callback.

use super::{Failure, drop_error, run_callback};
use crate::error::NnError;
use std::ffi::c_void;
use std::ptr;
use tch::{Device, Tensor};

/// Replaces this shard's values by those of all shards; the flag tells backward from forward.
type Merge = Box<dyn Fn(bool, &mut [f64]) -> Result<(), NnError> + Send + Sync>;

#[repr(C)]
struct MergeCallback {
    context: *mut c_void,
    call: unsafe extern "C" fn(*mut c_void, bool, *mut f64, usize) -> *mut c_void,
    drop: unsafe extern "C" fn(*mut c_void),
    drop_error: unsafe extern "C" fn(*mut c_void),
}

unsafe extern "C" {
    fn lockstep_batch_norm(
        x: *const c_void,
        gamma: *const c_void,
        beta: *const c_void,
        eps: f64,
        relu: bool,
        callback: MergeCallback,
        failure: *mut Failure,
    ) -> *mut c_void;
    fn lockstep_lone_batch_norm(
        x: *const c_void,
        gamma: *const c_void,
        beta: *const c_void,
        eps: f64,
        relu: bool,
        mean: *mut *mut c_void,
        inverse_std: *mut *mut c_void,
        failure: *mut Failure,
    ) -> *mut c_void;
}

unsafe extern "C" fn call(
    context: *mut c_void,
    backward: bool,
    values: *mut f64,
    count: usize,
) -> *mut c_void {
    run_callback(|| {
        // SAFETY: the context is the box of `batch_norm`, shared and `Sync`; the shim owns `count` values there
        // and touches none during the call.
        let (merge, values) =
            unsafe { (&*context.cast::<Merge>(), std::slice::from_raw_parts_mut(values, count)) };
        merge(backward, values)
    })
}

unsafe extern "C" fn drop_context(context: *mut c_void) {
    // SAFETY: called once, with the box of `batch_norm`.
    drop(unsafe { Box::from_raw(context.cast::<Merge>()) });
}

/// Normalizes `x` [N, C, ...] with the biased variance of the merged batch, then applies a ReLU if asked to.
///
/// On a CPU `x` is widened to the type of `gamma` first. Forward merges `[n, mean[C], M2[C]]`, backward `[sum of dy [C], sum of dy * x_hat [C]]`.
pub(crate) fn batch_norm(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    eps: f64,
    relu: bool,
    merge: Merge,
) -> Result<Tensor, NnError> {
    let widened;
    let x = match x.device() {
        // Under autocast the layer before has halved the precision, and sums over a batch need the whole one.
        Device::Cpu => {
            widened = x.f_to_kind(gamma.f_kind()?)?;
            &widened
        }
        // A GPU's kernels widen what they read.
        _ => x,
    };
    let context = Box::into_raw(Box::new(merge)).cast();
    let callback = MergeCallback { context, call, drop: drop_context, drop_error };
    let mut failure = Failure::none();
    // SAFETY: the tensors are live; the shim takes the context and drops it with the graph, or at once if it
    // fails. A result that is not null is a C++ tensor that we own.
    unsafe {
        let (x, gamma, beta) = (x.as_ptr().cast(), gamma.as_ptr().cast(), beta.as_ptr().cast());
        let y = lockstep_batch_norm(x, gamma, beta, eps, relu, callback, &raw mut failure);
        if y.is_null() { Err(failure.into_error()) } else { Ok(Tensor::from_ptr(y.cast())) }
    }
}

/// [`batch_norm`] on a GPU for a shard that is alone: with its own statistics, which stay on the GPU. With the result come
/// the mean [C] and the inverse standard deviation, 1 / √(variance + `eps`) [C].
pub(crate) fn lone_batch_norm(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    eps: f64,
    relu: bool,
) -> Result<(Tensor, [Tensor; 2]), NnError> {
    let (mut mean, mut inverse_std, mut failure) = (ptr::null_mut(), ptr::null_mut(), Failure::none());
    // SAFETY: the tensors are live. If the result is not null, all three are C++ tensors that we own.
    unsafe {
        let (x, gamma, beta) = (x.as_ptr().cast(), gamma.as_ptr().cast(), beta.as_ptr().cast());
        let y = lockstep_lone_batch_norm(
            x,
            gamma,
            beta,
            eps,
            relu,
            &raw mut mean,
            &raw mut inverse_std,
            &raw mut failure,
        );
        if y.is_null() {
            return Err(failure.into_error());
        }
        let statistics = [mean, inverse_std].map(|tensor| Tensor::from_ptr(tensor.cast()));
        Ok((Tensor::from_ptr(y.cast()), statistics))
    }
}
