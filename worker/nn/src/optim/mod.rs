//! Optimizers whose state is ours to checkpoint: PyTorch's update rules, tensor for tensor.

mod adam;
mod clip;
mod sgd;

pub use clip::{clip_norm, clip_value};

use crate::error::NnError;
use crate::schedule;
use crate::vars::{Vars, load_tensors};
use adam::Adam;
use lockstep_common::job::OptimizerSpec;
use sgd::Sgd;
use std::collections::BTreeMap;
use tch::{Tensor, no_grad};

/// A gradient by the name of its parameter.
pub type NamedGradient = (String, Tensor);

/// One network's optimizer with its state.
#[derive(Debug)]
pub struct Optimizer {
    spec: OptimizerSpec,
    no_decay_norm_bias: bool,
    rule: Rule,
}

#[derive(Debug)]
enum Rule {
    Sgd(Sgd),
    Adam(Adam),
}

impl Optimizer {
    /// A fresh optimizer for the parameters of `vars`.
    pub fn new(spec: &OptimizerSpec, vars: &Vars) -> Result<Self, NnError> {
        let (rule, no_decay_norm_bias) = match *spec {
            OptimizerSpec::Sgd { nesterov, weight_decay, no_decay_norm_bias, .. } => {
                (Rule::Sgd(Sgd::new(nesterov, weight_decay, vars)?), no_decay_norm_bias)
            }
            OptimizerSpec::Adam { beta1, beta2, eps, weight_decay, no_decay_norm_bias, .. } => {
                let adam = Adam::new([beta1, beta2], eps, weight_decay, false, vars)?;
                (Rule::Adam(adam), no_decay_norm_bias)
            }
            OptimizerSpec::Adamw { beta1, beta2, eps, weight_decay, no_decay_norm_bias, .. } => {
                let adam = Adam::new([beta1, beta2], eps, weight_decay, true, vars)?;
                (Rule::Adam(adam), no_decay_norm_bias)
            }
        };
        Ok(Self { spec: spec.clone(), no_decay_norm_bias, rule })
    }

    /// One update of `vars` by `gradients`, at the learning rate `lr` (the schedule's factor included).
    /// `step` is the network's update number from 0; it moves a momentum ramp.
    ///
    /// A parameter without a gradient stays as it is, its state too.
    pub fn step(
        &mut self,
        vars: &Vars,
        gradients: &[NamedGradient],
        lr: f64,
        step: u64,
    ) -> Result<(), NnError> {
        no_grad(|| {
            for (name, gradient) in gradients {
                let var = vars.var(name)?;
                let decays = var.decays() || !self.no_decay_norm_bias;
                let mut parameter = var.tensor.f_detach()?;
                match &mut self.rule {
                    Rule::Sgd(sgd) => {
                        let momentum = schedule::momentum(&self.spec, step).unwrap_or(0.0);
                        sgd.update(name, &mut parameter, gradient, lr, momentum, decays)?;
                    }
                    Rule::Adam(adam) => adam.update(name, &mut parameter, gradient, lr, decays)?,
                }
            }
            Ok(())
        })
    }

    /// The state by name, such as `momentum_buffer.fc.weight`: the tensors themselves, not copies.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        match &self.rule {
            Rule::Sgd(sgd) => sgd.state(),
            Rule::Adam(adam) => adam.state(),
        }
    }

    /// Sets the state from `saved`, which must hold exactly the names, shapes and types of [`state`](Self::state).
    /// On an error, which names every key that does not fit, nothing has changed.
    pub fn load_state(&mut self, saved: &BTreeMap<String, Tensor>) -> Result<(), NnError> {
        load_tensors("optimizer state", &self.state(), saved)
    }
}

/// A zero tensor for each parameter.
fn zeros(vars: &Vars) -> Result<BTreeMap<String, Tensor>, NnError> {
    vars.parameters().map(|(name, var)| Ok((name.to_owned(), var.tensor.f_zeros_like()?))).collect()
}

/// The state of the parameter `name`, or an error that says that it is no parameter.
fn of<'a>(state: &'a mut BTreeMap<String, Tensor>, name: &str) -> Result<&'a mut Tensor, NnError> {
    state.get_mut(name).ok_or_else(|| NnError::Variable {
        name: name.to_owned(),
        problem: "has a gradient and is not a parameter of this optimizer".to_owned(),
    })
}

/// `state` under the names `prefix.parameter`.
fn prefixed<'a>(
    prefix: &'a str,
    state: &'a BTreeMap<String, Tensor>,
) -> impl Iterator<Item = (String, Tensor)> + 'a {
    state.iter().map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor.shallow_clone()))
}
