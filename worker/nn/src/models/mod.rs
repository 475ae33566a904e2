//! The architectures, by name.

pub mod gan;
mod mlp;
mod nin;
mod options;
mod small_cnn;

use crate::error::NnError;
use crate::forward::Forward;
use crate::vars::{Scope, Vars};
use lockstep_common::job::{ModelRole, ModelSpec};
use lockstep_common::suggest::did_you_mean;
use tch::{Device, Kind, Tensor};

/// A network built over some variables.
pub trait Model: Send {
    /// The network's output for the rows of `x`, which may be none.
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError>;
}

/// Builds one architecture whose option names have been checked.
type Build = fn(&ModelSpec, &mut Scope) -> Result<Box<dyn Model>, NnError>;

/// One option of an architecture.
#[derive(Clone, Copy, Debug)]
pub struct OptionInfo {
    /// The key in a job file.
    pub name: &'static str,
    /// Its value when the key is absent.
    pub default: &'static str,
    /// What it does.
    pub meaning: &'static str,
}

/// One architecture.
#[derive(Clone, Copy, Debug)]
pub struct ModelInfo {
    /// The name in job files.
    pub name: &'static str,
    /// What it is.
    pub summary: &'static str,
    /// What it is for.
    pub role: ModelRole,
    /// The shape of its input, N being the batch.
    pub input: &'static str,
    /// The paper or code that it follows.
    pub reference: &'static str,
    /// The keys it takes besides `name`, `batch_norm` and `optimizer`.
    pub options: &'static [OptionInfo],
    build: Build,
}

/// The size of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelSummary {
    /// Numbers that learn.
    pub parameters: u64,
    /// Tensors, parameters and buffers together.
    pub tensors: usize,
}

/// Every architecture.
pub fn registry() -> &'static [ModelInfo] {
    &[nin::INFO, small_cnn::INFO, mlp::INFO, gan::GENERATOR, gan::DISCRIMINATOR]
}

/// Builds the network that `spec` describes over the variables at `scope`.
///
/// Fails on an unknown model or option (naming the nearest known one) and on a value out of range.
pub fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let info =
        registry().iter().find(|info| info.name == spec.name).ok_or_else(|| NnError::UnknownModel {
            name: spec.name.clone(),
            hint: did_you_mean(&spec.name, registry().iter().map(|info| info.name)),
        })?;
    options::check_names(info, spec)?;
    (info.build)(spec, scope)
}

/// Builds the network once, to find the errors of `spec` and its size.
pub fn validate(spec: &ModelSpec) -> Result<ModelSummary, NnError> {
    let mut vars = Vars::new("model", 0, Kind::Float, Device::Cpu);
    build(spec, &mut vars.root())?;
    Ok(ModelSummary { parameters: vars.parameter_count(), tensors: vars.iter().count() })
}

#[cfg(test)]
mod tests;
