//! Tensors as plain bytes, for digests, checkpoints and the wire.

use crate::error::NnError;
use crate::shim::with_bytes;
use tch::{Kind, Tensor};

/// A tensor outside of libtorch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawTensor {
    /// The element type as safetensors names it, such as `F32`.
    pub dtype: &'static str,
    /// The sizes of the dimensions.
    pub shape: Vec<usize>,
    /// The elements, little-endian, in row-major order.
    pub bytes: Vec<u8>,
}

const DTYPES: [(&str, Kind); 7] = [
    ("F64", Kind::Double),
    ("F32", Kind::Float),
    ("F16", Kind::Half),
    ("BF16", Kind::BFloat16),
    ("I64", Kind::Int64),
    ("I32", Kind::Int),
    ("U8", Kind::Uint8),
];

impl RawTensor {
    /// Copies a tensor out of libtorch, whatever its device and layout.
    pub fn copy_from(tensor: &Tensor) -> Result<Self, NnError> {
        let (dtype, shape) = describe(tensor)?;
        Ok(Self { dtype, shape, bytes: with_bytes(tensor, <[u8]>::to_vec)? })
    }

    /// [`copy_from`](Self::copy_from) into the memory of an earlier copy.
    pub fn copy_again(&mut self, tensor: &Tensor) -> Result<(), NnError> {
        (self.dtype, self.shape) = describe(tensor)?;
        with_bytes(tensor, |bytes| {
            self.bytes.clear();
            self.bytes.extend_from_slice(bytes);
        })
    }

    /// The element type of `tensor` as [`dtype`](Self::dtype) names it.
    pub fn dtype_of(tensor: &Tensor) -> Result<&'static str, NnError> {
        let kind = tensor.f_kind()?;
        let known = DTYPES.into_iter().find(|(_, k)| *k == kind).map(|(dtype, _)| dtype);
        known.ok_or_else(|| NnError::Torch(format!("tensors of type {kind:?} are never stored")))
    }

    /// The tensor that these bytes describe, on the CPU. Fails on an unknown type and on a length that does not
    /// fit the shape.
    pub fn to_tensor(&self) -> Result<Tensor, NnError> {
        Self::tensor_of(self.dtype, &self.shape, &self.bytes)
    }

    /// The tensor that a stored view describes, on the CPU.
    pub fn tensor_of(dtype: &str, shape: &[usize], bytes: &[u8]) -> Result<Tensor, NnError> {
        let fault = |expected: String, got: String| NnError::Shape {
            what: "stored tensor".to_owned(),
            expected,
            got,
        };
        let (_, kind) = DTYPES.into_iter().find(|(name, _)| *name == dtype).ok_or_else(|| {
            fault(format!("one of the types {:?}", DTYPES.map(|(name, _)| name)), format!("`{dtype}`"))
        })?;
        let elements = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let expected = elements.and_then(|n| n.checked_mul(kind.elt_size_in_bytes()));
        if expected != Some(bytes.len()) {
            return Err(fault(format!("the bytes of shape {shape:?}"), format!("{} bytes", bytes.len())));
        }
        let shape: Vec<i64> = shape.iter().map(|d| *d as i64).collect();
        Ok(Tensor::f_from_data_size(bytes, &shape, kind)?)
    }
}

/// Element type, as safetensors names it, and shape of a tensor.
pub fn describe(tensor: &Tensor) -> Result<(&'static str, Vec<usize>), NnError> {
    Ok((RawTensor::dtype_of(tensor)?, tensor.size().into_iter().map(|d| d as usize).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_the_round_trip_and_a_wrong_length_is_refused() {
        let t = Tensor::from_slice2(&[[1.5f32, -2.0, 0.0], [4.0, 5.0, 6.0]]).transpose(0, 1);
        let mut raw = RawTensor::copy_from(&t).unwrap();
        assert_eq!((raw.dtype, raw.shape.as_slice()), ("F32", [3, 2].as_slice()));
        assert_eq!(raw.bytes[4..8], 4.0f32.to_le_bytes());
        assert_eq!(raw.to_tensor().unwrap(), t);
        let (memory, other) = (raw.bytes.as_ptr(), Tensor::from_slice(&[1i64, 2]));
        raw.copy_again(&other).unwrap();
        assert_eq!((raw.to_tensor().unwrap(), raw.bytes.as_ptr()), (other, memory));
        raw.copy_again(&t).unwrap();
        assert_eq!(raw.to_tensor().unwrap(), t);
        raw.bytes.pop();
        assert!(raw.to_tensor().is_err());
        assert!(RawTensor::tensor_of("F31", &[1], &[0]).is_err());
    }
}
