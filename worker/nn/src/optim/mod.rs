//! Optimizers whose state is ours to checkpoint: PyTorch's update rules, tensor for tensor.

mod adam;
mod at_once;
mod average;
mod clip;
mod pass;
mod rmsprop;
#[cfg(test)]
mod samples;
mod sgd;
mod trace;

pub use clip::{clip_norm, clip_value};
pub use trace::{Checksums, Trace, checksums};

use crate::error::NnError;
use crate::schedule;
use crate::vars::{Vars, load_tensors};
use adam::Adam;
use at_once::AtOnce;
use average::Average;
use lockstep_common::job::{AverageSpec, OptimizerSpec};
use lockstep_common::suggest::did_you_mean;
use rmsprop::Rmsprop;
use sgd::Sgd;
use std::collections::BTreeMap;
use tch::{Device, Tensor, no_grad};

/// A gradient by the name of its parameter.
pub type NamedGradient = (String, Tensor);

/// One network's optimizer with its state.
#[derive(Debug)]
pub struct Optimizer {
    spec: OptimizerSpec,
    /// By parameter; the learning rate is a factor here.
    rates: BTreeMap<String, Rates>,
    rule: Rule,
    average: Option<Average>,
}

#[derive(Debug)]
enum Rule {
    Sgd(Sgd),
    Adam(Adam),
    Rmsprop(Rmsprop),
}

/// What may differ from parameter to parameter.
#[derive(Clone, Copy, Debug)]
struct Rates {
    lr: f64,
    weight_decay: f64,
}

/// A parameter that an update changes.
struct Learning<'a> {
    name: &'a str,
    /// The parameter itself, outside of any graph.
    parameter: Tensor,
    gradient: &'a Tensor,
    rates: Rates,
}

impl Rates {
    /// The gradient of `parameter` with that of the L2 penalty.
    fn with_penalty(self, gradient: &Tensor, parameter: &Tensor) -> Result<Tensor, NnError> {
        match self.weight_decay {
            0.0 => Ok(gradient.shallow_clone()),
            decay => Ok(gradient.f_add(&parameter.f_mul_scalar(decay)?)?),
        }
    }
}

impl Optimizer {
    /// A fresh optimizer for the parameters of `vars`. Fails if one of its groups fits none of them.
    pub fn new(spec: &OptimizerSpec, vars: &Vars) -> Result<Self, NnError> {
        for group in spec.groups() {
            if !vars.parameters().any(|(name, _)| group.has(name)) {
                let pattern = group.parameters.clone();
                let hint = did_you_mean(&pattern, vars.parameters().map(|(name, _)| name));
                return Err(NnError::Group { pattern, hint });
            }
        }
        let rates = vars.parameters().map(|(name, var)| {
            let group = spec.groups().iter().find(|group| group.has(name));
            let decays = var.decays() || !spec.no_decay_norm_bias();
            let weight_decay = if decays { spec.weight_decay() } else { 0.0 };
            let rates = Rates {
                lr: group.map_or(1.0, |group| group.lr_factor),
                weight_decay: group.and_then(|group| group.weight_decay).unwrap_or(weight_decay),
            };
            (name.to_owned(), rates)
        });
        let rates = rates.collect();
        let rule = match *spec {
            OptimizerSpec::Sgd { nesterov, .. } => Rule::Sgd(Sgd::new(nesterov, vars)?),
            OptimizerSpec::Adam { beta1, beta2, eps, .. } => {
                Rule::Adam(Adam::new([beta1, beta2], eps, false, vars)?)
            }
            OptimizerSpec::Adamw { beta1, beta2, eps, .. } => {
                Rule::Adam(Adam::new([beta1, beta2], eps, true, vars)?)
            }
            OptimizerSpec::Rmsprop { form, alpha, eps, .. } => {
                Rule::Rmsprop(Rmsprop::new(form, alpha, eps, vars)?)
            }
        };
        Ok(Self { spec: spec.clone(), rates, rule, average: None })
    }

    /// The same, with an average of the weights.
    pub fn averaging(self, spec: Option<&AverageSpec>, vars: &Vars) -> Result<Self, NnError> {
        let average = spec.map(|spec| Average::new(spec.clone(), vars)).transpose()?;
        Ok(Self { average, ..self })
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
        no_grad(|| self.update(vars, gradients, lr, step, false)).map(drop)
    }

    /// The same, with the checksums of the parameters and the state that the update has found and of those that it has
    /// left, which cost little where they come from the same pass over memory.
    pub fn traced_step(
        &mut self,
        vars: &Vars,
        gradients: &[NamedGradient],
        lr: f64,
        step: u64,
    ) -> Result<Trace, NnError> {
        no_grad(|| self.update(vars, gradients, lr, step, true))
    }

    fn update(
        &mut self,
        vars: &Vars,
        gradients: &[NamedGradient],
        lr: f64,
        step: u64,
        is_traced: bool,
    ) -> Result<Trace, NnError> {
        let momentum = schedule::momentum(&self.spec, step).unwrap_or(0.0);
        let learning = gradients.iter().map(|(name, gradient)| {
            let parameter = vars.var(name)?.tensor.f_detach()?;
            let Some(own) = self.rates.get(name) else { return Err(not_a_parameter(name)) };
            Ok(Learning { name, parameter, gradient, rates: Rates { lr: lr * own.lr, ..*own } })
        });
        let mut learning = learning.collect::<Result<Vec<_>, NnError>>()?;
        let at_once = match &mut self.rule {
            Rule::Sgd(sgd) => sgd.update_all(&mut learning, momentum, is_traced)?,
            Rule::Rmsprop(rmsprop) => rmsprop.update_all(&mut learning, momentum, is_traced)?,
            Rule::Adam(_) => None,
        };
        if let Some(trace) = at_once {
            return Ok(trace);
        }
        let mut trace = Trace::default();
        if is_traced {
            trace.state_before = self.state_checksums()?;
            trace.parameters_before = parameter_checksums(&learning)?;
        }
        let on_gpu = learning.iter().all(|learning| learning.parameter.device() != Device::Cpu);
        match &mut self.rule {
            Rule::Sgd(sgd) if on_gpu => sgd.update_on_gpu(&learning, momentum)?,
            Rule::Sgd(sgd) => learning.iter_mut().try_for_each(|each| sgd.update(each, momentum))?,
            Rule::Adam(adam) => learning.iter_mut().try_for_each(|each| adam.update(each))?,
            Rule::Rmsprop(rmsprop) => {
                learning.iter_mut().try_for_each(|each| rmsprop.update(each, momentum))?;
            }
        }
        if is_traced {
            trace.state_after = self.state_checksums()?;
            trace.parameters_after = parameter_checksums(&learning)?;
        }
        Ok(trace)
    }

    /// The checksums of the state without that of the average.
    fn state_checksums(&self) -> Result<Checksums, NnError> {
        checksums(self.rule.state())
    }

    /// Takes `vars` into the average, if there is one: weights and running statistics as they are after update `step`.
    pub fn average(&mut self, vars: &Vars, step: u64) -> Result<(), NnError> {
        match &mut self.average {
            Some(average) => no_grad(|| average.update(vars, step, false)).map(drop),
            None => Ok(()),
        }
    }

    /// The same, with the checksums of the average as it was found and as it is left.
    pub fn traced_average(&mut self, vars: &Vars, step: u64) -> Result<[Checksums; 2], NnError> {
        match &mut self.average {
            Some(average) => no_grad(|| average.update(vars, step, true)),
            None => Ok(Default::default()),
        }
    }

    /// Exchanges the weights of `vars` with their averages, if there are any; a second exchange undoes the first.
    pub fn exchange_averages(&mut self, vars: &Vars) -> Result<(), NnError> {
        match &mut self.average {
            Some(average) => no_grad(|| average.exchange(vars)),
            None => Ok(()),
        }
    }

    /// The state by name, such as `momentum_buffer.fc.weight`: the tensors themselves, not copies.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let mut state = self.rule.state();
        state.extend(self.average.iter().flat_map(Average::state));
        state
    }

    /// Sets the state from `saved`, which must hold exactly the names, shapes and types of [`state`](Self::state).
    /// On an error, which names every key that does not fit, nothing has changed.
    pub fn load_state(&mut self, saved: &BTreeMap<String, Tensor>) -> Result<(), NnError> {
        load_tensors("optimizer state", &self.state(), saved)
    }
}

fn parameter_checksums(learning: &[Learning<'_>]) -> Result<Checksums, NnError> {
    checksums(learning.iter().map(|learning| (learning.name, &learning.parameter)))
}

impl Rule {
    fn state(&self) -> BTreeMap<String, Tensor> {
        match self {
            Self::Sgd(sgd) => sgd.state(),
            Self::Adam(adam) => adam.state(),
            Self::Rmsprop(rmsprop) => rmsprop.state(),
        }
    }
}

/// A zero tensor for each parameter.
fn zeros(vars: &Vars) -> Result<BTreeMap<String, Tensor>, NnError> {
    vars.parameters().map(|(name, var)| Ok((name.to_owned(), var.tensor.f_zeros_like()?))).collect()
}

/// The state of the parameter `name`, or an error that says that it is no parameter.
fn of<'a>(state: &'a mut BTreeMap<String, Tensor>, name: &str) -> Result<&'a mut Tensor, NnError> {
    state.get_mut(name).ok_or_else(|| not_a_parameter(name))
}

fn not_a_parameter(name: &str) -> NnError {
    NnError::Variable {
        name: name.to_owned(),
        problem: "has a gradient and is not a parameter of this optimizer".to_owned(),
    }
}

/// `state` under the names `prefix.parameter`.
fn prefixed<'a>(
    prefix: &'a str,
    state: &'a BTreeMap<String, Tensor>,
) -> impl Iterator<Item = (String, Tensor)> + 'a {
    state.iter().map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor.shallow_clone()))
}
