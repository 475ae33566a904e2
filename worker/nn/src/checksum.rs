//! Checksums of tensors at the speed of memory, which tell a value from a changed one.
//!
//! They are for bad memory and bad arithmetic, not for an adversary. The words are added up in lanes, and the sums after each
//! row of words once more, which sees the order too (Fletcher's checksum, modulo 2^32): every change of one word shows.

use crate::error::NnError;
use crate::shim::with_bytes;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// Words of a row, and sums of each kind: those of word `i` of every row.
const LANES: usize = 16;
/// Lanes that are added together: so few that their sums stay in registers, which those of all lanes do not, many times
/// slower.
const GROUP: usize = 4;
/// Rows that stay in the nearest cache, 4 KiB of its 32 or more, while their lanes are added, group by group.
const NEAR: usize = 64;
/// Bytes of a word.
const WORD: usize = size_of::<u32>();
/// Bytes of a row of words.
pub(crate) const ROW: usize = LANES * WORD;
/// Bytes that one thread takes at a time: whole rows.
const PIECE: usize = 1 << 18;
const _: () = assert!(PIECE.is_multiple_of(ROW) && LANES.is_multiple_of(GROUP));

/// The checksum of some bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checksum {
    words: [u32; LANES],
    sums: [u32; LANES],
    rows: u32,
}

impl Checksum {
    /// That of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut checksum = Self::default();
        let (rows, rest) = bytes.as_chunks::<ROW>();
        rows.chunks(NEAR).for_each(|rows| checksum.add(rows));
        if !rest.is_empty() {
            let mut last = [0; ROW];
            last[..rest.len()].copy_from_slice(rest);
            checksum.add(&[last]);
        }
        checksum
    }

    /// Adds `rows`, which stay in the nearest cache.
    fn add(&mut self, rows: &[[u8; ROW]]) {
        let (words, sums) = (self.words.as_chunks_mut().0, self.sums.as_chunks_mut().0);
        for (index, (words, sums)) in words.iter_mut().zip(sums).enumerate() {
            add_lanes(rows, index, words, sums);
        }
        self.rows = self.rows.wrapping_add(rows.len() as u32);
    }

    /// [`Self::of`], by all of rayon's threads where that is worth waking them.
    fn of_many(bytes: &[u8]) -> Self {
        match bytes.len() <= PIECE {
            true => Self::of(bytes),
            false => {
                let pieces: Vec<Self> = bytes.par_chunks(PIECE).map(Self::of).collect();
                pieces.iter().fold(Self::default(), |sum, piece| sum.then(piece))
            }
        }
    }

    /// That of a tensor: of its elements in row-major order on the CPU. On another device it is taken there, of the sum of
    /// its words.
    ///
    /// # Errors
    ///
    /// Whatever libtorch says of a tensor that it cannot read.
    pub fn of_tensor(tensor: &Tensor) -> Result<Self, NnError> {
        match tensor.device() {
            Device::Cpu => with_bytes(tensor, Self::of_many),
            _ => Ok(Self::of(&sum_there(tensor)?.to_le_bytes())),
        }
    }

    /// That of the bytes of this one, which are whole rows, and then those of `next`.
    pub(crate) fn then(mut self, next: &Self) -> Self {
        for lane in 0..LANES {
            let before = self.words[lane].wrapping_mul(next.rows);
            self.sums[lane] = self.sums[lane].wrapping_add(next.sums[lane]).wrapping_add(before);
            self.words[lane] = self.words[lane].wrapping_add(next.words[lane]);
        }
        self.rows = self.rows.wrapping_add(next.rows);
        self
    }

    /// Its words, little-endian.
    pub fn to_bytes(&self) -> impl Iterator<Item = u8> {
        self.words.into_iter().chain(self.sums).flat_map(u32::to_le_bytes)
    }
}

/// The sum of a tensor's words, modulo 2^64, where the tensor is.
fn sum_there(tensor: &Tensor) -> Result<i64, NnError> {
    let words =
        if tensor.f_kind()?.elt_size_in_bytes().is_multiple_of(WORD) { Kind::Int } else { Kind::Uint8 };
    let flat = tensor.f_detach()?.f_reshape([-1])?.f_view_dtype(words)?;
    Ok(flat.f_sum(Kind::Int64)?.f_int64_value(&[])?)
}

/// Adds the words of group `index` of each row.
fn add_lanes(rows: &[[u8; ROW]], index: usize, words: &mut [u32; GROUP], sums: &mut [u32; GROUP]) {
    let (mut word, mut sum) = (*words, *sums);
    for row in rows {
        let own = &row.as_chunks::<WORD>().0[index * GROUP..][..GROUP];
        for lane in 0..GROUP {
            word[lane] = word[lane].wrapping_add(u32::from_le_bytes(own[lane]));
            sum[lane] = sum[lane].wrapping_add(word[lane]);
        }
    }
    (*words, *sums) = (word, sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(bytes: &[u8]) -> Tensor {
        Tensor::f_from_data_size(bytes, &[bytes.len() as i64], Kind::Uint8).unwrap()
    }

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i * 37 % 251) as u8).collect()
    }

    #[test]
    fn every_bit_counts_and_so_does_the_order_of_the_words() {
        for length in [1, 4, 63, 64, 65, 200, 333] {
            let bytes = bytes(length);
            let (whole, there) = (Checksum::of(&bytes), sum_there(&tensor(&bytes)).unwrap());
            assert_eq!(Checksum::of_tensor(&tensor(&bytes)).unwrap(), whole);
            for bit in 0..8 * length {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                let checksum = Checksum::of(&changed);
                assert_ne!(checksum, whole, "bit {bit} of {length} bytes");
                assert!(!checksum.to_bytes().eq(whole.to_bytes()), "bit {bit} of {length} bytes");
                assert_ne!(
                    sum_there(&tensor(&changed)).unwrap(),
                    there,
                    "bit {bit} of {length} bytes, on a device"
                );
            }
            for words in 1..length / 4 {
                let mut changed = bytes.clone();
                changed[..4 * words + 4].rotate_left(4);
                assert_ne!(Checksum::of(&changed), whole, "{words} words in another order");
            }
        }
    }

    #[test]
    fn parts_make_up_the_whole() {
        let bytes = bytes(1000);
        for (first, second) in [(64, 64), (64, 640), (320, 384), (0, 960)] {
            let parts = [&bytes[..first], &bytes[first..second], &bytes[second..]].map(Checksum::of);
            let whole = parts.iter().fold(Checksum::default(), |sum, part| sum.then(part));
            assert_eq!(whole, Checksum::of(&bytes), "cut at {first} and {second}");
        }
    }

    #[test]
    fn many_threads_come_to_what_one_does() {
        for length in [PIECE - 4, PIECE, PIECE + 4, 3 * PIECE + 68] {
            let bytes = bytes(length);
            assert_eq!(Checksum::of_many(&bytes), Checksum::of(&bytes), "{length} bytes");
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
