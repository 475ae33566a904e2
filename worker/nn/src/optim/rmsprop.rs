//! RMSProp (Tieleman and Hinton, lecture 6e, 2012) as `torch.optim.RMSprop` and as TensorFlow's `ApplyRMSProp` has it.

use super::{Learning, of, prefixed};
use crate::error::NnError;
use crate::vars::Vars;
use lockstep_common::job::RmspropForm;
use std::collections::BTreeMap;
use tch::Tensor;

#[derive(Debug)]
pub(super) struct Rmsprop {
    form: RmspropForm,
    alpha: f64,
    eps: f64,
    square_avg: BTreeMap<String, Tensor>,
    momentum_buffers: BTreeMap<String, Tensor>,
}

impl Rmsprop {
    pub(super) fn new(form: RmspropForm, alpha: f64, eps: f64, vars: &Vars) -> Result<Self, NnError> {
        let square = |tensor: &Tensor| match form {
            RmspropForm::Torch => tensor.f_zeros_like(),
            RmspropForm::Tensorflow => tensor.f_ones_like(),
        };
        let squares = vars.parameters().map(|(name, var)| Ok((name.to_owned(), square(&var.tensor)?)));
        Ok(Self {
            form,
            alpha,
            eps,
            square_avg: squares.collect::<Result<_, NnError>>()?,
            momentum_buffers: super::zeros(vars)?,
        })
    }

    /// With s ← α s + (1 − α) g²:
    ///
    /// - PyTorch: b ← μ b + g / (√s + ε), p ← p − lr · b
    /// - TensorFlow: b ← μ b + lr · g / √(s + ε), p ← p − b
    pub(super) fn update(&mut self, learning: &mut Learning<'_>, momentum: f64) -> Result<(), NnError> {
        let Learning { name, parameter, gradient, rates } = learning;
        let g = rates.with_penalty(gradient, parameter)?;
        let square = of(&mut self.square_avg, name)?;
        let _ = square.f_mul_scalar_(self.alpha)?.f_add_(&g.f_square()?.f_mul_scalar(1.0 - self.alpha)?)?;
        let (root, inside, outside) = match self.form {
            RmspropForm::Torch => (square.f_sqrt()?.f_add_scalar(self.eps)?, 1.0, rates.lr),
            RmspropForm::Tensorflow => (square.f_add_scalar(self.eps)?.f_sqrt()?, rates.lr, 1.0),
        };
        let update = g.f_div(&root)?.f_mul_scalar(inside)?;
        let update = if momentum == 0.0 {
            update
        } else {
            let buffer = of(&mut self.momentum_buffers, name)?;
            let _ = buffer.f_mul_scalar_(momentum)?.f_add_(&update)?;
            buffer.shallow_clone()
        };
        let _ = parameter.f_sub_(&update.f_mul_scalar(outside)?)?;
        Ok(())
    }

    pub(super) fn state(&self) -> BTreeMap<String, Tensor> {
        prefixed("square_avg", &self.square_avg)
            .chain(prefixed("momentum_buffer", &self.momentum_buffers))
            .collect()
    }
}
