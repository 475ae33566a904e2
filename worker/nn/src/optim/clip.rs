//! Bounds on the reduced gradient.

use super::NamedGradient;
use super::at_once::is_plain;
use super::pass::{FEW, PIECE, Real};
use crate::error::NnError;
use crate::shim::values;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// Clamps every element into [−`max`, `max`], in place.
pub fn clip_value(gradients: &mut [NamedGradient], max: f64) -> Result<(), NnError> {
    for (_, gradient) in gradients {
        let _ = gradient.f_clamp_(-max, max)?;
    }
    Ok(())
}

/// Scales all gradients together, in place, so that their Euclidean norm is at most `max`; returns the norm
/// before. As `torch.nn.utils.clip_grad_norm_`, with the sum in f64 and in the order given.
pub fn clip_norm(gradients: &mut [NamedGradient], max: f64) -> Result<f64, NnError> {
    if gradients.is_empty() {
        return Ok(0.0);
    }
    let squares = match gradients.iter().map(|(_, gradient)| squares_in_memory(gradient)).collect() {
        Some(squares) => squares,
        None => squares_by_libtorch(gradients)?,
    };
    let norm = squares.into_iter().fold(0.0, |sum, square| sum + square).sqrt();
    // PyTorch's guard against a division by zero.
    let scale = max / (norm + 1e-6);
    if scale < 1.0 {
        for (_, gradient) in gradients {
            let _ = gradient.f_mul_scalar_(scale)?;
        }
    }
    Ok(norm)
}

/// The sum of the squares of `gradient`, if that lies on the CPU without gaps.
fn squares_in_memory(gradient: &Tensor) -> Option<f64> {
    match gradient.kind() {
        kind if !is_plain(gradient, gradient, kind) => None,
        Kind::Float => Some(sum_of_squares(values::<f32>(gradient))),
        Kind::Double => Some(sum_of_squares(values::<f64>(gradient))),
        _ => None,
    }
}

/// The sum of the squares of each of `gradients`.
fn squares_by_libtorch(gradients: &[NamedGradient]) -> Result<Vec<f64>, NnError> {
    let square = |(_, gradient): &NamedGradient| gradient.f_to_kind(Kind::Double)?.f_square()?.f_sum(None);
    let squares = gradients.iter().map(square).collect::<Result<Vec<_>, _>>()?;
    // On a GPU one wait for all.
    Ok(Vec::<f64>::try_from(Tensor::f_stack(&squares, 0)?.f_to_device(Device::Cpu)?)?)
}

/// Sums that run side by side. An addition takes four cycles and two may begin in each, of two numbers: eight vectors of two.
const LANES: usize = 16;

/// The sum of the squares of `values`, in f64, in an order that depends on their number alone.
fn sum_of_squares<T: Real>(values: &[T]) -> f64 {
    let of_piece = |piece: &[T]| {
        let mut sums = [0.0; LANES];
        let (rows, rest) = piece.as_chunks::<LANES>();
        for row in rows.iter().map(<[T; LANES]>::as_slice).chain([rest]) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value.to_f64() * value.to_f64();
            }
        }
        sums.into_iter().sum::<f64>()
    };
    let pieces: Vec<f64> = match values.len() < FEW {
        true => values.chunks(PIECE).map(of_piece).collect(),
        false => values.par_chunks(PIECE).map(of_piece).collect(),
    };
    pieces.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradients() -> Vec<NamedGradient> {
        vec![("a".into(), Tensor::from_slice(&[3.0, 0.0])), ("b".into(), Tensor::from_slice(&[-4.0]))]
    }

    #[test]
    fn clip_norm_bounds_the_norm_over_all_tensors() {
        let mut g = gradients();
        assert_eq!(clip_norm(&mut g, 1.0).unwrap(), 5.0);
        assert!((clip_norm(&mut g, 10.0).unwrap() - 1.0).abs() < 1e-6);
        assert!((g[0].1.double_value(&[0]) - 0.6).abs() < 1e-6, "a small gradient is left alone");
    }

    #[test]
    fn clip_value_bounds_each_element() {
        let mut g = gradients();
        clip_value(&mut g, 3.5).unwrap();
        assert_eq!((g[0].1.double_value(&[0]), g[1].1.double_value(&[0])), (3.0, -3.5));
    }

    #[test]
    fn both_ways_to_a_norm_agree() {
        tch::manual_seed(1);
        for count in [1, 7, 8, 4099, 300_001] {
            let gradient = Tensor::randn([count], (Kind::Double, Device::Cpu)) * 1e3;
            for kind in [Kind::Float, Kind::Double] {
                let gradient = vec![("a".to_owned(), gradient.to_kind(kind))];
                let (own, libtorch) =
                    (squares_in_memory(&gradient[0].1).unwrap(), squares_by_libtorch(&gradient).unwrap()[0]);
                // Neither sum, of terms above zero, rounds any of them more than `count` times, by half of epsilon each.
                let bound = count as f64 * f64::EPSILON * libtorch;
                assert!((own - libtorch).abs() <= bound, "{count}, {kind:?}: {own} and {libtorch}");
            }
        }
        let gradient = Tensor::randn([300_001], (Kind::Double, Device::Cpu));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let values = values::<f64>(&gradient);
            pool.install(|| sum_of_squares(values))
        };
        assert_eq!(on(1), on(3));
        let sparse = Tensor::ones([10], (Kind::Float, Device::Cpu)).slice(0, 0, 10, 2);
        assert_eq!(squares_in_memory(&sparse), None);
        let mut g = vec![("a".to_owned(), sparse)];
        assert_eq!(clip_norm(&mut g, 10.0).unwrap(), 5f64.sqrt());
    }
}
