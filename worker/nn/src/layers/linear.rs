//! Fully connected layer.

use crate::error::NnError;
use crate::init::Init;
use crate::vars::Scope;
use tch::Tensor;

/// x · weightᵀ + bias, with `weight` `[outputs, inputs]` and `bias` `[outputs]`.
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// A layer with `weight` and `bias` initialized as told.
    pub fn new(
        scope: &mut Scope,
        inputs: i64,
        outputs: i64,
        weight: Init,
        bias: Init,
    ) -> Result<Self, NnError> {
        Ok(Self {
            weight: scope.parameter("weight", &[outputs, inputs], weight)?,
            bias: scope.parameter("bias", &[outputs], bias)?,
        })
    }

    /// [N, inputs] to [N, outputs].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, NnError> {
        Ok(x.f_linear(&self.weight, Some(&self.bias))?)
    }
}
