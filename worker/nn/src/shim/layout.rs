//! Memory formats, which tch does not know.

use super::Failure;
use crate::error::NnError;
use std::ffi::c_void;
use tch::Tensor;

unsafe extern "C" {
    fn lockstep_channels_last(x: *const c_void, failure: *mut Failure) -> *mut c_void;
    fn lockstep_weight_for(x: *const c_void, weight: *const c_void, failure: *mut Failure) -> *mut c_void;
}

/// A copy of `x` [N, C, H, W] whose channels are neighbours in memory. What libtorch computes from it has that layout too.
pub fn channels_last(x: &Tensor) -> Result<Tensor, NnError> {
    let mut failure = Failure::none();
    // SAFETY: the tensor is live, and a result that is not null is a C++ tensor that we own.
    unsafe {
        let copy = lockstep_channels_last(x.as_ptr().cast(), &raw mut failure);
        if copy.is_null() { Err(failure.into_error()) } else { Ok(Tensor::from_ptr(copy.cast())) }
    }
}

/// The weight with which a convolution of `x` computes: on a GPU in `x`'s memory order and in autocast's type.
pub(crate) fn weight_for(x: &Tensor, weight: &Tensor) -> Result<Tensor, NnError> {
    let mut failure = Failure::none();
    // SAFETY: both are live tensors. A result that is not null is a C++ tensor that we own.
    let result = unsafe { lockstep_weight_for(x.as_ptr().cast(), weight.as_ptr().cast(), &raw mut failure) };
    if !result.is_null() {
        // SAFETY: as above.
        return Ok(unsafe { Tensor::from_ptr(result.cast()) });
    }
    match failure.is_none() {
        true => Ok(weight.shallow_clone()),
        false => Err(failure.into_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn values_stay_and_convolutions_keep_the_layout_also_of_grey_images() {
        for channels in [1, 3] {
            let x = Tensor::randn([2, channels, 5, 7], (Kind::Double, Device::Cpu));
            let last = channels_last(&x).unwrap();
            assert_eq!(last, x);
            assert_eq!(last.stride(), [35 * channels, 1, 7 * channels, channels]);
            let weight = Tensor::randn([4, channels, 3, 3], (Kind::Double, Device::Cpu));
            let convolved = |x: &Tensor| x.conv2d::<&Tensor>(&weight, None, 1, 1, 1, 1);
            let (y, expected) = (convolved(&last), convolved(&x));
            assert_eq!(y.stride(), [140, 1, 28, 4]);
            assert!((y - expected).abs().max().double_value(&[]) < 1e-12);
        }
    }

    #[test]
    fn what_is_no_batch_of_images_is_refused() {
        let x = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        assert!(channels_last(&x).is_err());
    }
}
