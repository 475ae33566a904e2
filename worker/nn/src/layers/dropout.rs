//! Dropout whose mask depends on (seed, step, sample, operation), not on who computes the sample.

use crate::error::NnError;
use crate::forward::Forward;
use crate::shim;
use lockstep_common::rng::Stream;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// Levels of the keep probability: 16 random bits decide about one element.
const LEVELS: f64 = 65536.0;

/// Keeps each element of `x` [N, ...] with probability `keep` and scales it by 1 / `keep`; the identity outside
/// of training. `name` tells the operations of a network apart.
///
/// `keep` is rounded to a multiple of 2⁻¹⁶, in the mask and in the scale alike.
pub fn dropout(x: &Tensor, keep: f64, name: &str, fwd: &mut Forward) -> Result<Tensor, NnError> {
    if !fwd.train || keep >= 1.0 {
        return Ok(x.shallow_clone());
    }
    let shape = x.size();
    let rows = shape.first().copied().unwrap_or(0) as usize;
    if rows != fwd.samples.len() {
        return Err(NnError::Shape {
            what: format!("dropout `{name}`"),
            expected: format!("{} rows, one per sample of the shard", fwd.samples.len()),
            got: format!("an input of shape {shape:?}"),
        });
    }
    let use_index = fwd.draw_index(name);
    let draws = Draws {
        seed: fwd.seed,
        purpose: format!("dropout {}/{name}", fwd.network),
        at: [fwd.step, u64::from(fwd.phase), u64::from(use_index)],
        level: (keep * LEVELS).round().max(1.0),
    };
    let per_row = shape[1..].iter().product::<i64>() as usize;
    // On a CPU the other cores have shards of their own.
    let on_gpu = x.device() != Device::Cpu;
    let mask = match x.f_kind()? {
        Kind::Double => {
            shim::on_device(&draws.mask(&fwd.samples, per_row, on_gpu, |scale| scale), x.device())?
        }
        kind => {
            let mask = draws.mask(&fwd.samples, per_row, on_gpu, |scale| scale as f32);
            shim::on_device(&mask, x.device())?.f_to_kind(kind)?
        }
    };
    Ok(x.f_mul(&mask.f_reshape(&shape)?)?)
}

/// The random bits of one operation.
struct Draws {
    seed: u64,
    purpose: String,
    at: [u64; 3],
    /// Of [`LEVELS`], how many keep an element.
    level: f64,
}

impl Draws {
    /// 0 or 1 / keep for each element of each sample's row.
    fn mask<T: Copy + Send + Sync>(
        &self,
        samples: &[u64],
        per_row: usize,
        in_parallel: bool,
        number: impl Fn(f64) -> T,
    ) -> Vec<T> {
        let (kept, dropped) = (number(LEVELS / self.level), number(0.0));
        let [step, phase, use_index] = self.at;
        let row = |(&sample, row): (&u64, &mut [T])| {
            let mut bits = vec![0u8; 2 * per_row];
            let coordinates = [step, phase, sample, use_index];
            Stream::new(self.seed, &self.purpose, &coordinates).fill_bytes(&mut bits);
            for (value, pair) in row.iter_mut().zip(bits.as_chunks::<2>().0) {
                *value =
                    if u32::from(u16::from_le_bytes(*pair)) < self.level as u32 { kept } else { dropped };
            }
        };
        let mut mask = vec![dropped; samples.len() * per_row];
        match in_parallel {
            true => samples.par_iter().zip(mask.par_chunks_mut(per_row.max(1))).for_each(row),
            false => samples.iter().zip(mask.chunks_mut(per_row.max(1))).for_each(row),
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_threads_draw_what_one_does() {
        let draws = Draws { seed: 1, purpose: "dropout".to_owned(), at: [2, 0, 1], level: 40_000.0 };
        let samples: Vec<u64> = (5..40).collect();
        for per_row in [0, 1, 33] {
            let mask = |in_parallel| draws.mask(&samples, per_row, in_parallel, |scale| scale);
            assert_eq!(mask(true), mask(false));
            assert_eq!(mask(true).len(), samples.len() * per_row);
        }
    }
}
