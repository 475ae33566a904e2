//! The architectures, by name.

mod blocks;
mod bn_inception;
mod channels_last;
pub mod gan;
mod googlenet;
mod image;
mod inception_resnet;
mod inception_resnet_v1;
mod inception_resnet_v2;
mod inception_v3;
mod inception_v4;
mod mlp;
mod nin;
mod options;
mod output;
mod small_cnn;

pub use channels_last::ChannelsLast;
pub use output::{Auxiliary, Output};

use crate::error::NnError;
use crate::forward::Forward;
use crate::vars::{Scope, Vars};
use lockstep_common::job::{ModelRole, ModelSpec};
use lockstep_common::suggest::did_you_mean;
use tch::Tensor;

/// A network built over some variables.
pub trait Model: Send {
    /// The network's outputs for the rows of `x`, which may be none. Auxiliary ones come in training only.
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError>;
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
    /// The keys it takes besides `name`, `batch_norm`, `optimizer`, `weights` and `weights_blake3`.
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
    &[
        nin::INFO,
        googlenet::INFO,
        bn_inception::INFO,
        inception_v3::INFO,
        inception_v4::INFO,
        inception_resnet_v1::INFO,
        inception_resnet_v2::INFO,
        small_cnn::INFO,
        mlp::INFO,
        gan::GENERATOR,
        gan::DISCRIMINATOR,
    ]
}

/// The architecture `name`. Fails naming the nearest known one.
pub fn info(name: &str) -> Result<&'static ModelInfo, NnError> {
    registry().iter().find(|info| info.name == name).ok_or_else(|| NnError::UnknownModel {
        name: name.to_owned(),
        hint: did_you_mean(name, registry().iter().map(|info| info.name)),
    })
}

/// The logits of the classifier that `spec` describes.
pub fn classes(spec: &ModelSpec) -> Result<i64, NnError> {
    let options = info(&spec.name)?.options.iter();
    let default = options.filter(|o| o.name == "classes").find_map(|o| o.default.parse().ok());
    options::count(spec, "classes", default.unwrap_or(10))
}

/// Builds the network that `spec` describes over the variables at `scope`.
///
/// Fails on an unknown model or option (naming the nearest known one) and on a value out of range.
pub fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let info = info(&spec.name)?;
    options::check_names(info, spec)?;
    (info.build)(spec, scope)
}

/// The variables of the network that `spec` describes, with shapes and without values.
pub fn outline(spec: &ModelSpec) -> Result<Vars, NnError> {
    let mut vars = Vars::outline("model");
    build(spec, &mut vars.root())?;
    Ok(vars)
}

/// Finds the errors of `spec` and the network's size.
pub fn validate(spec: &ModelSpec) -> Result<ModelSummary, NnError> {
    let vars = outline(spec)?;
    Ok(ModelSummary { parameters: vars.parameter_count(), tensors: vars.iter().count() })
}

#[cfg(test)]
mod tests;
