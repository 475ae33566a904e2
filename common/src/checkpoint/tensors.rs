//! Tensors to and from safetensors files.

use crate::digest::TensorBytes;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::Deserialize;
use serde::de::value::{Error as ValueError, StrDeserializer};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

/// What is wrong with a set of tensors.
#[derive(Debug, thiserror::Error)]
pub enum TensorsError {
    /// The bytes are not a safetensors file.
    #[error("it is not a safetensors file ({0})")]
    Format(SafeTensorError),
    /// The bytes are PyTorch's own format.
    #[error("it was written by `torch.save`; write it with `safetensors.torch.save_file`")]
    Pickle,
    /// Two tensors of one name.
    #[error("there are two tensors named `{0}`")]
    Duplicate(String),
    /// An element type that safetensors does not have.
    #[error("tensor `{name}` has unknown element type `{dtype}`")]
    DType {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: String,
    },
    /// The elements do not fill the shape.
    #[error("tensor `{name}` of shape {shape:?} cannot have {bytes} bytes")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// How many bytes it came with.
        bytes: usize,
    },
    /// The tensors are intact and not those that the manifest vouches for.
    #[error("the digest of its weights is {found} and the manifest says {expected}")]
    Digest {
        /// The digest in the manifest.
        expected: String,
        /// The digest of the tensors found.
        found: String,
    },
}

/// A safetensors file of `tensors`. The same tensors give the same bytes in whatever order they come.
pub fn encode_tensors<'a>(
    tensors: impl IntoIterator<Item = TensorBytes<'a>>,
) -> Result<Vec<u8>, TensorsError> {
    encode_with_metadata(tensors, None)
}

/// The last part of the name under which PyTorch's batch norms count the batches that they have seen.
pub const BATCH_COUNT: &str = "num_batches_tracked";

/// A safetensors file of `tensors` for other programs: [`encode_tensors`], with metadata that readers of the Hugging
/// Face family insist on, and with `steps` as the count that PyTorch keeps beside every running mean and misses when it
/// loads strictly.
pub fn encode_for_others<'a>(
    tensors: impl IntoIterator<Item = TensorBytes<'a>>,
    steps: u64,
) -> Result<Vec<u8>, TensorsError> {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    let count = |layer: &str| TensorBytes {
        name: Cow::Owned(format!("{layer}{BATCH_COUNT}")),
        dtype: Cow::Borrowed("I64"),
        shape: Cow::Borrowed(&[]),
        bytes: Cow::Owned(steps.to_le_bytes().to_vec()),
    };
    let counts: Vec<_> =
        tensors.iter().filter_map(|t| t.name.strip_suffix("running_mean").map(count)).collect();
    tensors.extend(counts);
    encode_with_metadata(tensors, Some(HashMap::from([("format".to_owned(), "pt".to_owned())])))
}

fn encode_with_metadata<'a>(
    tensors: impl IntoIterator<Item = TensorBytes<'a>>,
    metadata: Option<HashMap<String, String>>,
) -> Result<Vec<u8>, TensorsError> {
    let mut by_name = BTreeMap::new();
    for tensor in tensors {
        if let Some(twice) = by_name.insert(tensor.name.to_string(), tensor) {
            return Err(TensorsError::Duplicate(twice.name.into_owned()));
        }
    }
    let views = by_name.values().map(view).collect::<Result<Vec<_>, _>>()?;
    safetensors::serialize(by_name.keys().zip(views), metadata).map_err(TensorsError::Format)
}

/// The tensors of a safetensors file, by name.
pub fn decode_tensors(file: &[u8]) -> Result<Vec<TensorBytes<'_>>, TensorsError> {
    if file.starts_with(b"PK\x03\x04") || file.starts_with(b"\x80\x02") {
        return Err(TensorsError::Pickle);
    }
    let tensors = SafeTensors::deserialize(file).map_err(TensorsError::Format)?;
    let mut out: Vec<_> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| TensorBytes {
            name: Cow::Owned(name),
            dtype: Cow::Owned(view.dtype().to_string()),
            shape: Cow::Owned(view.shape().to_vec()),
            bytes: Cow::Borrowed(view.data()),
        })
        .collect();
    out.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(out)
}

fn view<'a>(tensor: &'a TensorBytes<'_>) -> Result<TensorView<'a>, TensorsError> {
    let deserializer: StrDeserializer<'_, ValueError> = StrDeserializer::new(&tensor.dtype);
    let dtype = Dtype::deserialize(deserializer).map_err(|_| TensorsError::DType {
        name: tensor.name.to_string(),
        dtype: tensor.dtype.to_string(),
    })?;
    TensorView::new(dtype, tensor.shape.to_vec(), &tensor.bytes).map_err(|_| TensorsError::Shape {
        name: tensor.name.to_string(),
        shape: tensor.shape.to_vec(),
        bytes: tensor.bytes.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: &str, shape: &[usize], bytes: &[u8]) -> TensorBytes<'static> {
        TensorBytes {
            name: name.to_owned().into(),
            dtype: dtype.to_owned().into(),
            shape: shape.to_vec().into(),
            bytes: bytes.to_vec().into(),
        }
    }

    #[test]
    fn tensors_come_back_in_name_order_whatever_order_they_came_in() {
        let (a, b, c) = (
            tensor("a", "F64", &[2], &[7; 16]),
            tensor("b", "F32", &[], &[1, 2, 3, 4]),
            tensor("c", "I64", &[0, 3], &[]),
        );
        let file = encode_tensors([c.clone(), a.clone(), b.clone()]).unwrap();
        assert_eq!(file, encode_tensors([a.clone(), b.clone(), c.clone()]).unwrap());
        assert_eq!(decode_tensors(&file).unwrap(), [a, b, c]);
    }

    #[test]
    fn other_programs_get_a_count_of_batches_beside_every_running_mean() {
        let mean = tensor("bn.running_mean", "F32", &[1], &[0; 4]);
        let weight = tensor("conv.weight", "F32", &[1], &[1; 4]);
        let file = encode_for_others([weight.clone(), mean.clone()], 258).unwrap();
        let count = tensor("bn.num_batches_tracked", "I64", &[], &[2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(decode_tensors(&file).unwrap(), [count, mean, weight]);
    }

    #[test]
    fn senseless_tensors_are_refused_by_name() {
        let check = |tensors: Vec<TensorBytes<'_>>, part: &str| {
            let error = encode_tensors(tensors).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        check(vec![tensor("w", "F32", &[2], &[0; 7])], "`w` of shape [2]");
        check(vec![tensor("w", "F31", &[1], &[0; 4])], "`F31`");
        check(
            vec![tensor("w", "F32", &[1], &[0; 4]), tensor("w", "F32", &[1], &[1; 4])],
            "two tensors named `w`",
        );
    }

    #[test]
    fn every_truncation_of_a_file_is_refused() {
        let file = encode_tensors([tensor("w", "F32", &[2], &[0; 8])]).unwrap();
        for length in 0..file.len() {
            assert!(decode_tensors(&file[..length]).is_err(), "{length} bytes");
        }
    }
}
