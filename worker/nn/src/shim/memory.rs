//! A tensor's memory, without a copy.

use crate::error::NnError;
use tch::{Device, Tensor};

/// Shows `read` the elements of `tensor`, little-endian and in row-major order: its own memory where it lies on the CPU
/// without gaps, a copy elsewhere.
///
/// As with every operation of libtorch, nobody may write to the tensor, or to another one that shares its memory, at the
/// same time.
pub fn with_bytes<R>(tensor: &Tensor, read: impl FnOnce(&[u8]) -> R) -> Result<R, NnError> {
    let copied;
    let host = match tensor.device() == Device::Cpu && tensor.is_contiguous() {
        true => tensor,
        false => {
            copied = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
            &copied
        }
    };
    let len = host.numel() * host.f_kind()?.elt_size_in_bytes();
    if len == 0 {
        return Ok(read(&[]));
    }
    // SAFETY: a contiguous tensor on the CPU has its `numel` elements from `data_ptr` on, and lives as long as the
    // borrow. That nobody writes meanwhile is the caller's duty.
    Ok(read(unsafe { std::slice::from_raw_parts(host.data_ptr().cast::<u8>(), len) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::RawTensor;

    #[test]
    fn the_bytes_are_those_of_a_copy_whatever_the_layout() {
        let whole = Tensor::from_slice2(&[[1.5f32, -2.0, 0.0], [4.0, 5.0, 6.0]]);
        for tensor in [whole.shallow_clone(), whole.transpose(0, 1), whole.get(1), whole.narrow(0, 0, 0)] {
            let copy = RawTensor::copy_from(&tensor).unwrap();
            assert_eq!(with_bytes(&tensor, <[u8]>::to_vec).unwrap(), copy.bytes);
        }
    }
}
