//! Gradients as they become final.

use super::{Failure, drop_error, run_callback};
use crate::error::NnError;
use std::ffi::c_void;
use tch::Tensor;

type Callback = Box<dyn FnMut(&Tensor) -> Result<(), NnError> + Send>;

#[repr(C)]
struct GradientCallback {
    context: *mut c_void,
    call: unsafe extern "C" fn(*mut c_void, *mut c_void) -> *mut c_void,
    drop: unsafe extern "C" fn(*mut c_void),
    drop_error: unsafe extern "C" fn(*mut c_void),
}

unsafe extern "C" {
    fn lockstep_on_gradient(leaf: *const c_void, callback: GradientCallback, failure: *mut Failure) -> bool;
    fn lockstep_remove_gradient_hook(leaf: *const c_void, failure: *mut Failure) -> bool;
    fn lockstep_backward(loss: *const c_void, failure: *mut Failure) -> bool;
}

unsafe extern "C" fn call(context: *mut c_void, gradient: *mut c_void) -> *mut c_void {
    run_callback(|| {
        // SAFETY: the context is the box of `on_gradient`, and the engine runs one backward pass at a time over
        // a leaf's graph. `gradient` points to a live C++ tensor for the whole call; we take our own reference.
        let (callback, gradient) =
            unsafe { (&mut *context.cast::<Callback>(), Tensor::clone_from_ptr(gradient.cast())) };
        callback(&gradient)
    })
}

unsafe extern "C" fn drop_context(context: *mut c_void) {
    // SAFETY: called once, with the box of `on_gradient`.
    drop(unsafe { Box::from_raw(context.cast::<Callback>()) });
}

/// A registered gradient callback; dropping it removes the callback.
#[must_use = "dropping the hook removes it"]
#[derive(Debug)]
pub struct GradientHook {
    leaf: Tensor,
}

impl Drop for GradientHook {
    fn drop(&mut self) {
        let mut failure = Failure::none();
        // SAFETY: `leaf` is a live tensor.
        if !unsafe { lockstep_remove_gradient_hook(self.leaf.as_ptr().cast(), &raw mut failure) } {
            drop(failure.into_error());
        }
    }
}

/// Calls `callback` in every backward pass, once, as soon as the gradient of `leaf` is final.
///
/// The gradient is handed over and not kept in `leaf.grad()`. An error of the callback, or its panic, ends the
/// backward pass and is what [`backward`] returns. A leaf that the loss does not depend on gets no call.
///
/// Fails if `leaf` is not a leaf that requires a gradient, or has a hook already.
pub fn on_gradient(
    leaf: &Tensor,
    callback: impl FnMut(&Tensor) -> Result<(), NnError> + Send + 'static,
) -> Result<GradientHook, NnError> {
    let callback: Callback = Box::new(callback);
    let context = Box::into_raw(Box::new(callback)).cast();
    let callback = GradientCallback { context, call, drop: drop_context, drop_error };
    let mut failure = Failure::none();
    // SAFETY: `leaf` is a live tensor; the shim takes the context and drops it in every case.
    if unsafe { lockstep_on_gradient(leaf.as_ptr().cast(), callback, &raw mut failure) } {
        Ok(GradientHook { leaf: leaf.shallow_clone() })
    } else {
        Err(failure.into_error())
    }
}

/// The backward pass from a scalar loss. Callbacks of [`on_gradient`] and of batch norm run inside it, on a CPU
/// in the calling thread, on a GPU in one that works for the calling thread only, so that they may wait for other
/// threads' passes; the first error among them is returned with its type.
pub fn backward(loss: &Tensor) -> Result<(), NnError> {
    let mut failure = Failure::none();
    // SAFETY: `loss` is a live tensor.
    if unsafe { lockstep_backward(loss.as_ptr().cast(), &raw mut failure) } {
        Ok(())
    } else {
        Err(failure.into_error())
    }
}
