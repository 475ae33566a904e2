//! Two-dimensional convolution.

use crate::error::NnError;
use crate::init::Init;
use crate::vars::Scope;
use tch::Tensor;

/// The geometry of a convolution.
#[derive(Clone, Copy, Debug)]
pub struct ConvSpec {
    /// Channels in.
    pub inputs: i64,
    /// Channels out.
    pub outputs: i64,
    /// Side of the square kernel.
    pub kernel: i64,
    /// Step between two positions.
    pub stride: i64,
    /// Zeros on each side.
    pub padding: i64,
}

impl ConvSpec {
    /// Inputs of one output.
    pub fn fan_in(&self) -> i64 {
        self.inputs * self.kernel * self.kernel
    }
}

/// A convolution with `weight` `[outputs, inputs, kernel, kernel]` and perhaps `bias` `[outputs]`.
#[derive(Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    stride: i64,
    padding: i64,
}

impl Conv2d {
    /// A convolution with `weight` initialized as told, and a bias only if `bias` says how.
    pub fn new(scope: &mut Scope, spec: ConvSpec, weight: Init, bias: Option<Init>) -> Result<Self, NnError> {
        let shape = [spec.outputs, spec.inputs, spec.kernel, spec.kernel];
        Ok(Self {
            weight: scope.parameter("weight", &shape, weight)?,
            bias: bias.map(|init| scope.parameter("bias", &[spec.outputs], init)).transpose()?,
            stride: spec.stride,
            padding: spec.padding,
        })
    }

    /// [N, inputs, H, W] to [N, outputs, H', W'].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, NnError> {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        Ok(x.f_conv2d(&self.weight, self.bias.as_ref(), stride, padding, [1, 1], 1)?)
    }
}
