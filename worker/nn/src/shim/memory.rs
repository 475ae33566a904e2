//! A tensor's memory, without a copy.

use crate::error::NnError;
use tch::kind::Element;
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

/// The elements of `tensor`, if it lies on the CPU without gaps and has this type; none otherwise.
///
/// The same holds as for [`with_bytes`].
pub fn values<T: Element>(tensor: &Tensor) -> &[T] {
    match is_plain::<T>(tensor) {
        // SAFETY: as in `with_bytes`; the type was compared.
        true => unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), tensor.numel()) },
        false => &[],
    }
}

/// The elements of `tensor`, to be changed, if it lies on the CPU without gaps and has this type; none otherwise. Nobody may read from the tensor, or from another one that shares its memory, at the same time.
pub fn values_mut<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    match is_plain::<T>(tensor) {
        // SAFETY: as in `with_bytes`; the type was compared. That nobody else reads or writes meanwhile is the caller's duty.
        true => unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), tensor.numel()) },
        false => &mut [],
    }
}

fn is_plain<T: Element>(tensor: &Tensor) -> bool {
    let is_there = tensor.device() == Device::Cpu && tensor.is_contiguous() && tensor.numel() > 0;
    is_there && tensor.f_kind().is_ok_and(|kind| kind == T::KIND)
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

    #[test]
    fn values_are_those_of_plain_memory_of_their_type_only() {
        let mut whole = Tensor::from_slice2(&[[1.5f32, -2.0], [4.0, 5.0]]);
        assert_eq!(values::<f32>(&whole), [1.5, -2.0, 4.0, 5.0]);
        assert!(values::<f64>(&whole).is_empty());
        assert!(values::<f32>(&whole.transpose(0, 1)).is_empty());
        assert!(values::<f32>(&whole.narrow(0, 0, 0)).is_empty());
        values_mut::<f32>(&mut whole)[3] = 7.0;
        assert_eq!((values_mut::<f64>(&mut whole).len(), values::<f32>(&whole.get(1))), (0, &[4.0, 7.0][..]));
    }
}
