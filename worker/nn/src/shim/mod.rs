//! What tch lacks, from C++ files over libtorch: gradient hooks, batch norm over the global batch, autocast, channels-last memory,
//! CUDA on demand and beside the default stream. And a tensor's memory without a copy.
//!
//! The only unsafe code of this crate. Rust closures enter C++ as a context pointer with three functions (call,
//! drop, drop an error); neither a panic nor an exception crosses the border.
#![allow(unsafe_code)]

mod autocast;
mod batch_norm;
mod cuda;
mod hooks;
mod layout;
mod many;
mod memory;
mod streams;

pub use autocast::autocast;
pub(crate) use batch_norm::{batch_norm, lone_batch_norm};
pub use cuda::load_cuda;
pub use hooks::{GradientHook, backward, on_gradient};
pub use layout::channels_last;
pub(crate) use layout::weight_for;
pub(crate) use many::{Moving, copy_all, fused_sgd};
pub use memory::{values, values_mut, with_bytes};
pub(crate) use streams::on_device;
pub use streams::{SideStream, copy_async, pinned};

use crate::error::NnError;
use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

/// `lockstep::Failure` of `failure.h`.
#[repr(C)]
struct Failure {
    message: *mut c_char,
    callback_error: *mut c_void,
}

unsafe extern "C" {
    fn free(pointer: *mut c_void);
}

impl Failure {
    const fn none() -> Self {
        Self { message: ptr::null_mut(), callback_error: ptr::null_mut() }
    }

    fn is_none(&self) -> bool {
        self.message.is_null() && self.callback_error.is_null()
    }

    /// The error that the shim left here.
    fn into_error(self) -> NnError {
        if !self.callback_error.is_null() {
            // SAFETY: the shim sets it only to a pointer that `run_callback` made, and gives it away once.
            return *unsafe { Box::from_raw(self.callback_error.cast::<NnError>()) };
        }
        if self.message.is_null() {
            return NnError::Torch("an error without a message".to_owned());
        }
        // SAFETY: the shim sets it to a string from `strdup`, which ends with a zero byte and is ours to free.
        unsafe {
            let text = CStr::from_ptr(self.message).to_string_lossy().into_owned();
            free(self.message.cast());
            NnError::torch(&text)
        }
    }
}

/// Runs a callback on behalf of C++: null, or its error (a panic becomes one) for the shim to carry.
fn run_callback(body: impl FnOnce() -> Result<(), NnError>) -> *mut c_void {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        Err(NnError::Panic(text.unwrap_or_else(|| "no message".to_owned())))
    });
    match result {
        Ok(()) => ptr::null_mut(),
        Err(e) => Box::into_raw(Box::new(e)).cast(),
    }
}

/// Frees an error that nobody took.
unsafe extern "C" fn drop_error(error: *mut c_void) {
    // SAFETY: called once, with a pointer that `run_callback` made.
    drop(unsafe { Box::from_raw(error.cast::<NnError>()) });
}
