//! Digests by which replicas, runs and files are compared.

use serde::Serialize;
use std::borrow::Cow;

/// One tensor as a digest or a checkpoint sees it: little-endian elements in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorBytes<'a> {
    /// The parameter's or buffer's full name, such as `conv1.weight`.
    pub name: Cow<'a, str>,
    /// The element type in safetensors' spelling, such as `F32`.
    pub dtype: Cow<'a, str>,
    /// The sizes of the dimensions; empty for a scalar.
    pub shape: Cow<'a, [usize]>,
    /// The elements.
    pub bytes: Cow<'a, [u8]>,
}

/// BLAKE3, in hex, of all tensors in name order.
///
/// Every part is preceded by its length, so that no two different sets of tensors feed the hash the same
/// bytes. The order in which the tensors are given does not matter.
pub fn weights_digest<'a>(tensors: impl IntoIterator<Item = TensorBytes<'a>>) -> String {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let mut hasher = TensorHasher::new();
    tensors.iter().for_each(|tensor| hasher.add(tensor));
    hasher.finish()
}

/// [`weights_digest`] of tensors that come one after the other, in name order.
#[derive(Debug)]
pub struct TensorHasher(blake3::Hasher);

impl TensorHasher {
    /// Without any tensor yet.
    pub fn new() -> Self {
        Self(blake3::Hasher::new_derive_key("lockstep 2026-11 weights digest"))
    }

    /// Adds the tensor whose name comes next.
    pub fn add(&mut self, tensor: &TensorBytes<'_>) {
        let Self(hasher) = self;
        length_prefixed(hasher, tensor.name.as_bytes());
        length_prefixed(hasher, tensor.dtype.as_bytes());
        hasher.update(&(tensor.shape.len() as u64).to_le_bytes());
        for &size in tensor.shape.iter() {
            hasher.update(&(size as u64).to_le_bytes());
        }
        length_prefixed(hasher, &tensor.bytes);
    }

    /// The digest of all of them, in hex.
    pub fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

impl Default for TensorHasher {
    fn default() -> Self {
        Self::new()
    }
}

/// BLAKE3, in hex, of `bytes`.
pub fn blake3_hex(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// The first 8 bytes of the BLAKE3 of `bytes`, as a little-endian number.
pub fn blake3_prefix(bytes: &[u8]) -> u64 {
    let mut prefix = [0; 8];
    blake3::Hasher::new().update(bytes).finalize_xof().fill(&mut prefix);
    u64::from_le_bytes(prefix)
}

/// Whether `text` is what [`blake3_hex`] returns: 64 lower-case hex digits. Such a text is safe as a file name.
pub fn is_blake3_hex(text: &str) -> bool {
    text.len() == 2 * blake3::OUT_LEN && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// BLAKE3, in hex, of the compact JSON of `value`, by which a manifest vouches for itself.
pub(crate) fn json_digest(value: &impl Serialize) -> Result<String, serde_json::Error> {
    Ok(blake3_hex(&serde_json::to_vec(value)?))
}

fn length_prefixed(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor<'a>(name: &'a str, dtype: &'a str, shape: &'a [usize], bytes: &'a [u8]) -> TensorBytes<'a> {
        TensorBytes { name: name.into(), dtype: dtype.into(), shape: shape.into(), bytes: bytes.into() }
    }

    #[test]
    fn order_of_arrival_does_not_matter() {
        let (a, b) = (tensor("a", "U8", &[2], &[1, 2]), tensor("b", "U8", &[1], &[3]));
        assert_eq!(weights_digest([a.clone(), b.clone()]), weights_digest([b, a]));
    }

    #[test]
    fn every_part_of_a_tensor_counts() {
        let digests = [
            weights_digest([tensor("a", "U8", &[2], &[1, 2])]),
            weights_digest([tensor("b", "U8", &[2], &[1, 2])]),
            weights_digest([tensor("a", "I8", &[2], &[1, 2])]),
            weights_digest([tensor("a", "U8", &[2, 1], &[1, 2])]),
            weights_digest([tensor("a", "U8", &[2], &[1, 3])]),
            weights_digest([tensor("aU", "8", &[2], &[1, 2])]),
            weights_digest([]),
        ];
        for (i, a) in digests.iter().enumerate() {
            assert!(is_blake3_hex(a));
            assert!(digests[i + 1..].iter().all(|b| a != b), "digest {i} is not unique: {digests:?}");
        }
    }

    /// Pinned: users compare the digests of runs made by different releases.
    #[test]
    fn digest_is_stable_between_releases() {
        assert_eq!(
            weights_digest([tensor("conv.weight", "F32", &[1, 2], &[0, 0, 128, 63, 0, 0, 0, 64])]),
            "7ef56ed9b5ad0ed699d9abf5fc14dc734381da2b25c7fa7da0ec63aad73a9b14"
        );
    }

    #[test]
    fn only_hashes_pass_as_hashes() {
        assert!(is_blake3_hex(&blake3_hex(b"")));
        for bad in ["", "../../etc/passwd", &"A".repeat(64), &"g".repeat(64), &"a".repeat(63)] {
            assert!(!is_blake3_hex(bad), "{bad}");
        }
    }
}
