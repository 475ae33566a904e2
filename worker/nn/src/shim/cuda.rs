//! CUDA support that is found at run time.

use super::Failure;
use crate::error::NnError;

unsafe extern "C" {
    fn lockstep_load_cuda(failure: *mut Failure) -> bool;
}

/// Opens `libtorch_cuda.so` from the folder of the libtorch in use; afterwards tch sees the GPUs, if any.
///
/// Fails with the loader's reason on a host without CUDA, which then computes on its CPU.
pub fn load_cuda() -> Result<(), NnError> {
    let mut failure = Failure::none();
    // SAFETY: `failure` outlives the call, and opening libtorch_cuda only registers its kernels.
    if unsafe { lockstep_load_cuda(&raw mut failure) } { Ok(()) } else { Err(failure.into_error()) }
}
