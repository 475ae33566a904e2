//! Autocast: convolutions and matrix products in bfloat16, weights in f32.

use super::Failure;
use crate::error::NnError;
use tch::Device;

unsafe extern "C" {
    fn lockstep_autocast(cuda: bool, on: bool, before: *mut bool, failure: *mut Failure) -> bool;
}

/// Runs `body` with autocast to bfloat16 on this thread, for operations on `device`. What libtorch's list says needs more
/// precision stays in f32. A backward pass follows its forward pass and needs no autocast of its own.
pub fn autocast<R>(device: Device, body: impl FnOnce() -> R) -> Result<R, NnError> {
    let cuda = device.is_cuda();
    let before = switch(cuda, true)?;
    let guard = Guard { cuda, before };
    let result = body();
    drop(guard);
    Ok(result)
}

/// Restores what was, also when `body` panics.
struct Guard {
    cuda: bool,
    before: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // To switch off what could be switched on does not fail.
        let _ = switch(self.cuda, self.before);
    }
}

/// Returns what it was.
fn switch(cuda: bool, on: bool) -> Result<bool, NnError> {
    let (mut before, mut failure) = (false, Failure::none());
    // SAFETY: both pointers are to live values of this frame.
    if unsafe { lockstep_autocast(cuda, on, &raw mut before, &raw mut failure) } {
        Ok(before)
    } else {
        Err(failure.into_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, Tensor};

    #[test]
    fn products_are_in_bfloat16_inside_and_in_f32_outside() {
        let (a, b) = (
            Tensor::ones([2, 2], (Kind::Float, Device::Cpu)),
            Tensor::ones([2, 2], (Kind::Float, Device::Cpu)),
        );
        let inside = autocast(Device::Cpu, || a.matmul(&b).kind()).unwrap();
        assert_eq!((inside, a.matmul(&b).kind()), (Kind::BFloat16, Kind::Float));
        let nested = autocast(Device::Cpu, || {
            autocast(Device::Cpu, || ()).unwrap();
            a.matmul(&b).kind()
        });
        assert_eq!(nested.unwrap(), Kind::BFloat16, "the inner one's end leaves the outer one on");
    }
}
