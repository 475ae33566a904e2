//! The unit that convolutional networks repeat: a convolution, its batch norm, a ReLU.

use super::{BatchNorm, Conv2d, ConvSpec, NormSpec, relu};
use crate::error::NnError;
use crate::forward::Forward;
use crate::init::Init;
use crate::vars::Scope;
use lockstep_common::job::BatchNorm as Mode;
use tch::Tensor;

/// What the two parts of the unit `NAME` are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `NAME.conv` and `NAME.bn`, as in torchvision and timm.
    Nested,
    /// `NAME` and `NAME_bn`, as in networks that came from Caffe.
    Suffixed,
}

/// What the units of a network have in common.
#[derive(Clone, Copy, Debug)]
pub struct Units {
    /// What their parts are called.
    pub naming: Naming,
    /// Whose batch is normalized, if any.
    pub mode: Mode,
    /// The constants of the normalization.
    pub norm: NormSpec,
    /// How the weights begin.
    pub weight: fn(&ConvSpec) -> Init,
    /// How the biases begin, where there are any.
    pub bias: Init,
    /// Whether a convolution has a bias although the normalization behind it cancels it.
    pub bias_before_norm: bool,
}

/// A convolution, its normalization unless the network has none, and a ReLU if wanted.
#[derive(Debug)]
pub struct ConvNorm {
    conv: Conv2d,
    norm: Option<BatchNorm>,
    relu: bool,
}

impl ConvNorm {
    /// The unit `name` below `scope`, with a ReLU.
    pub fn new(scope: &mut Scope, name: &str, conv: ConvSpec, units: &Units) -> Result<Self, NnError> {
        Self::with(scope, name, conv, units, true)
    }

    /// [`new`](Self::new) with or without the ReLU.
    pub fn with(
        scope: &mut Scope,
        name: &str,
        conv: ConvSpec,
        units: &Units,
        relu: bool,
    ) -> Result<Self, NnError> {
        let (conv_name, norm_name) = match units.naming {
            Naming::Nested => (format!("{name}.conv"), format!("{name}.bn")),
            Naming::Suffixed => (name.to_owned(), format!("{name}_bn")),
        };
        let norm = BatchNorm::with(&mut scope.sub(&norm_name), conv.outputs, units.mode, relu, units.norm)?;
        let bias = (norm.is_none() || units.bias_before_norm).then_some(units.bias);
        let conv = Conv2d::new(&mut scope.sub(&conv_name), conv, (units.weight)(&conv), bias)?;
        Ok(Self { conv, norm, relu })
    }

    /// [N, inputs, H, W] to [N, outputs, H', W'].
    pub fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        let y = self.conv.forward(x)?;
        match &self.norm {
            Some(norm) => norm.forward(&y, fwd),
            None if self.relu => relu(&y),
            None => Ok(y),
        }
    }
}
