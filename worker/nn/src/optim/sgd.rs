//! Stochastic gradient descent with momentum, as `torch.optim.SGD` without dampening.

use super::{Rates, of, prefixed, zeros};
use crate::error::NnError;
use crate::vars::Vars;
use std::collections::BTreeMap;
use tch::Tensor;

#[derive(Debug)]
pub(super) struct Sgd {
    nesterov: bool,
    /// Zero at the start: PyTorch's first buffer, the gradient itself, is momentum · 0 + gradient.
    momentum_buffers: BTreeMap<String, Tensor>,
}

impl Sgd {
    pub(super) fn new(nesterov: bool, vars: &Vars) -> Result<Self, NnError> {
        Ok(Self { nesterov, momentum_buffers: zeros(vars)? })
    }

    /// b ← μ b + (g + λ p), then p ← p − lr · b, or with Nesterov's step p ← p − lr · (g + λ p + μ b).
    pub(super) fn update(
        &mut self,
        name: &str,
        parameter: &mut Tensor,
        gradient: &Tensor,
        rates: Rates,
        momentum: f64,
    ) -> Result<(), NnError> {
        let decayed = rates.with_penalty(gradient, parameter)?;
        let direction = if momentum == 0.0 {
            decayed
        } else {
            let buffer = of(&mut self.momentum_buffers, name)?;
            let _ = buffer.f_mul_scalar_(momentum)?.f_add_(&decayed)?;
            if self.nesterov {
                decayed.f_add(&buffer.f_mul_scalar(momentum)?)?
            } else {
                buffer.shallow_clone()
            }
        };
        let _ = parameter.f_sub_(&direction.f_mul_scalar(rates.lr)?)?;
        Ok(())
    }

    pub(super) fn state(&self) -> BTreeMap<String, Tensor> {
        prefixed("momentum_buffer", &self.momentum_buffers).collect()
    }
}
