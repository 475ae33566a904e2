//! Stochastic gradient descent with momentum, as `torch.optim.SGD` without dampening.

use super::{of, prefixed, zeros};
use crate::error::NnError;
use crate::vars::Vars;
use std::collections::BTreeMap;
use tch::Tensor;

#[derive(Debug)]
pub(super) struct Sgd {
    nesterov: bool,
    weight_decay: f64,
    /// Zero at the start: PyTorch's first buffer, the gradient itself, is momentum · 0 + gradient.
    momentum_buffers: BTreeMap<String, Tensor>,
}

impl Sgd {
    pub(super) fn new(nesterov: bool, weight_decay: f64, vars: &Vars) -> Result<Self, NnError> {
        Ok(Self { nesterov, weight_decay, momentum_buffers: zeros(vars)? })
    }

    /// b ← μ b + (g + λ p), then p ← p − lr · b, or with Nesterov's step p ← p − lr · (g + λ p + μ b).
    pub(super) fn update(
        &mut self,
        name: &str,
        parameter: &mut Tensor,
        gradient: &Tensor,
        lr: f64,
        momentum: f64,
        decays: bool,
    ) -> Result<(), NnError> {
        let decayed = if decays && self.weight_decay != 0.0 {
            gradient.f_add(&parameter.f_mul_scalar(self.weight_decay)?)?
        } else {
            gradient.shallow_clone()
        };
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
        let _ = parameter.f_sub_(&direction.f_mul_scalar(lr)?)?;
        Ok(())
    }

    pub(super) fn state(&self) -> BTreeMap<String, Tensor> {
        prefixed("momentum_buffer", &self.momentum_buffers).collect()
    }
}
