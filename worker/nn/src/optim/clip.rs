//! Bounds on the reduced gradient.

use super::NamedGradient;
use crate::error::NnError;
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
    let square = |(_, gradient): &NamedGradient| gradient.f_to_kind(Kind::Double)?.f_square()?.f_sum(None);
    let squares = gradients.iter().map(square).collect::<Result<Vec<_>, _>>()?;
    // On a GPU one wait for all. Added here, because the order is to be this one everywhere.
    let squares = Vec::<f64>::try_from(Tensor::f_stack(&squares, 0)?.f_to_device(Device::Cpu)?)?;
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
}
