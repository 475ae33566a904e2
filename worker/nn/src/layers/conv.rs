//! Two-dimensional convolution.

use crate::error::NnError;
use crate::init::Init;
use crate::shim::weight_for;
use crate::vars::Scope;
use tch::Tensor;

/// The geometry of a convolution.
#[derive(Clone, Copy, Debug)]
pub struct ConvSpec {
    /// Channels in.
    pub inputs: i64,
    /// Channels out.
    pub outputs: i64,
    /// Height and width of the kernel.
    pub kernel: [i64; 2],
    /// Step between two positions.
    pub stride: i64,
    /// Zeros above and below, and on the left and right.
    pub padding: [i64; 2],
}

impl ConvSpec {
    /// A convolution with stride 1 and no padding.
    pub fn valid(inputs: i64, outputs: i64, kernel: [i64; 2]) -> Self {
        Self { inputs, outputs, kernel, stride: 1, padding: [0, 0] }
    }

    /// A convolution whose output, with stride 1, has the size of its input. The kernel's sides are odd.
    pub fn same(inputs: i64, outputs: i64, kernel: [i64; 2]) -> Self {
        Self { padding: kernel.map(|side| side / 2), ..Self::valid(inputs, outputs, kernel) }
    }

    /// The same with another stride.
    pub fn stride(self, stride: i64) -> Self {
        Self { stride, ..self }
    }

    /// Inputs of one output.
    pub fn fan_in(&self) -> i64 {
        self.inputs * self.kernel[0] * self.kernel[1]
    }
}

/// A convolution with `weight` `[outputs, inputs, height, width]` and perhaps `bias` `[outputs]`.
#[derive(Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    stride: i64,
    padding: [i64; 2],
}

impl Conv2d {
    /// A convolution with `weight` initialized as told, and a bias only if `bias` says how.
    pub fn new(scope: &mut Scope, spec: ConvSpec, weight: Init, bias: Option<Init>) -> Result<Self, NnError> {
        let shape = [spec.outputs, spec.inputs, spec.kernel[0], spec.kernel[1]];
        Ok(Self {
            weight: scope.parameter("weight", &shape, weight)?,
            bias: bias.map(|init| scope.parameter("bias", &[spec.outputs], init)).transpose()?,
            stride: spec.stride,
            padding: spec.padding,
        })
    }

    /// [N, inputs, H, W] to [N, outputs, H', W'].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, NnError> {
        let weight = weight_for(x, &self.weight)?;
        Ok(x.f_conv2d(&weight, self.bias.as_ref(), [self.stride; 2], self.padding, [1, 1], 1)?)
    }
}
