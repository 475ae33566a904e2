//! Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), as `torch.optim` has them.

use super::{Learning, Rates, of, prefixed, zeros};
use crate::error::NnError;
use crate::vars::Vars;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

#[derive(Debug)]
pub(super) struct Adam {
    betas: [f64; 2],
    eps: f64,
    /// AdamW: the decay acts on the weights, apart from the gradient.
    decoupled: bool,
    exp_avg: BTreeMap<String, Tensor>,
    exp_avg_sq: BTreeMap<String, Tensor>,
    /// Updates of each parameter so far, an i64 scalar.
    step: BTreeMap<String, Tensor>,
}

impl Adam {
    pub(super) fn new(betas: [f64; 2], eps: f64, decoupled: bool, vars: &Vars) -> Result<Self, NnError> {
        let counter = || Tensor::f_zeros([0i64; 0], (Kind::Int64, Device::Cpu));
        Ok(Self {
            betas,
            eps,
            decoupled,
            exp_avg: zeros(vars)?,
            exp_avg_sq: zeros(vars)?,
            step: vars
                .parameters()
                .map(|(n, _)| Ok((n.to_owned(), counter()?)))
                .collect::<Result<_, NnError>>()?,
        })
    }

    /// m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²; p ← p − lr · m̂ / (√v̂ + ε), hats for bias-corrected.
    pub(super) fn update(&mut self, learning: &mut Learning<'_>) -> Result<(), NnError> {
        let Learning { name, parameter, gradient, rates } = learning;
        let [beta1, beta2] = self.betas;
        let Rates { lr, weight_decay } = *rates;
        let g = if self.decoupled {
            if weight_decay != 0.0 {
                let _ = parameter.f_mul_scalar_(1.0 - lr * weight_decay)?;
            }
            gradient.shallow_clone()
        } else {
            rates.with_penalty(gradient, parameter)?
        };
        let step = of(&mut self.step, name)?;
        let _ = step.f_add_scalar_(1)?;
        let t = step.f_int64_value(&[])? as f64;

        let m = of(&mut self.exp_avg, name)?;
        let _ = m.f_lerp_(&g, 1.0 - beta1)?;
        let v = of(&mut self.exp_avg_sq, name)?;
        let _ = v.f_mul_scalar_(beta2)?.f_add_(&g.f_square()?.f_mul_scalar(1.0 - beta2)?)?;

        let correction2 = (1.0 - beta2.powf(t)).sqrt();
        let denominator = v.f_sqrt()?.f_div_scalar(correction2)?.f_add_scalar(self.eps)?;
        let step_size = lr / (1.0 - beta1.powf(t));
        let _ = parameter.f_sub_(&m.f_div(&denominator)?.f_mul_scalar(step_size)?)?;
        Ok(())
    }

    pub(super) fn state(&self) -> BTreeMap<String, Tensor> {
        prefixed("exp_avg", &self.exp_avg)
            .chain(prefixed("exp_avg_sq", &self.exp_avg_sq))
            .chain(prefixed("step", &self.step))
            .collect()
    }
}
