//! A cheap digest of a replica's state, for comparing replicas with each other and with what they were.
//!
//! It is taken twice in every step, so it has to be several times as fast as BLAKE3 of everything. What it guards against is
//! bad memory and bad arithmetic, not an adversary: plain sums of words see every change of one word, and BLAKE3 goes over
//! the sums.

use super::error::TrainError;
use lockstep_nn::NnError;
use lockstep_nn::shim::with_bytes;
use tch::{Device, Kind, Tensor};

/// Sums that run side by side, as wide as the widest vector registers.
const LANES: usize = 16;

/// Bytes of a word.
const WORD: usize = size_of::<u32>();

/// The first bytes of the BLAKE3 of all tensors' sums.
pub(crate) type Fingerprint = [u8; 16];

/// Takes a fingerprint.
pub(crate) struct Fingerprinter(blake3::Hasher);

impl Fingerprinter {
    pub(crate) fn new() -> Self {
        Self(blake3::Hasher::new())
    }

    /// Adds a tensor, wherever it is: on the CPU its [`sums`], on another device one that is taken there.
    pub(crate) fn add(&mut self, tensor: &Tensor) -> Result<(), TrainError> {
        match tensor.device() {
            Device::Cpu => {
                let sums = with_bytes(tensor, sums)?;
                self.0.update(bytemuck::cast_slice(&sums));
            }
            _ => self.add_number(sum_there(tensor)?),
        }
        Ok(())
    }

    /// Adds a counter.
    pub(crate) fn add_number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    pub(crate) fn finish(self) -> Fingerprint {
        let mut fingerprint = Fingerprint::default();
        self.0.finalize_xof().fill(&mut fingerprint);
        fingerprint
    }
}

/// The sums of `bytes` as words, in lanes: of the words, and of those sums after each word, which see the order too
/// (Fletcher's checksum, modulo 2^64).
fn sums(bytes: &[u8]) -> [[u64; LANES]; 2] {
    let (mut words, mut sums) = ([0u64; LANES], [0u64; LANES]);
    let mut add = |row: &[u8]| {
        for ((word, sum), bytes) in words.iter_mut().zip(&mut sums).zip(row.as_chunks::<WORD>().0) {
            *word = word.wrapping_add(u64::from(u32::from_le_bytes(*bytes)));
            *sum = sum.wrapping_add(*word);
        }
    };
    let (rows, rest) = bytes.as_chunks::<{ LANES * WORD }>();
    rows.iter().for_each(|row| add(row));
    let mut last = [0; LANES * WORD];
    last[..rest.len()].copy_from_slice(rest);
    add(&last);
    [words, sums]
}

/// The sum of a tensor's words, modulo 2^64, where the tensor is.
fn sum_there(tensor: &Tensor) -> Result<u64, TrainError> {
    let words = if tensor.kind().elt_size_in_bytes().is_multiple_of(WORD) { Kind::Int } else { Kind::Uint8 };
    let flat = tensor.f_detach()?.f_reshape([-1])?.f_view_dtype(words)?;
    Ok(flat.f_sum(Kind::Int64)?.f_int64_value(&[]).map_err(NnError::from)? as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(bytes: &[u8]) -> Tensor {
        Tensor::f_from_data_size(bytes, &[bytes.len() as i64], Kind::Uint8).unwrap()
    }

    fn fingerprint(bytes: &[u8]) -> Fingerprint {
        let mut fingerprinter = Fingerprinter::new();
        fingerprinter.add(&tensor(bytes)).unwrap();
        fingerprinter.finish()
    }

    #[test]
    fn every_bit_counts_and_so_does_the_order_of_the_words() {
        for length in [1, 4, 63, 64, 65, 200, 333] {
            let bytes: Vec<u8> = (0..length).map(|i| (i * 37 % 251) as u8).collect();
            let whole = fingerprint(&bytes);
            for bit in 0..8 * length {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(fingerprint(&changed), whole, "bit {bit} of {length} bytes");
                let (there, then) = (sum_there(&tensor(&changed)), sum_there(&tensor(&bytes)));
                assert_ne!(there.unwrap(), then.unwrap(), "bit {bit} of {length} bytes, on a device");
            }
            for row in 1..length / 64 {
                let mut changed = bytes.clone();
                changed[..64 * row + 4].rotate_left(4);
                assert_ne!(fingerprint(&changed), whole, "words in another order");
            }
        }
    }

    #[test]
    fn tensors_of_every_shape_and_kind_have_a_sum_on_a_device() {
        for kind in [Kind::Float, Kind::Double, Kind::Int64, Kind::BFloat16, Kind::Uint8] {
            for shape in [vec![], vec![0], vec![3], vec![2, 3, 1, 5]] {
                let mut zeros = Tensor::zeros(&shape, (kind, Device::Cpu));
                assert_eq!(sum_there(&zeros).unwrap(), 0);
                if zeros.numel() > 0 {
                    let _ = zeros.fill_(1.0);
                    assert_ne!(sum_there(&zeros).unwrap(), 0, "{kind:?} {shape:?}");
                }
            }
        }
        let flat = Tensor::arange(24, (Kind::Float, Device::Cpu)).reshape([2, 3, 4]);
        assert_eq!(sum_there(&flat.transpose(0, 2)).unwrap(), sum_there(&flat).unwrap());
    }
}
