//! Activations.

use super::Linear;
use crate::error::NnError;
use crate::init::Init;
use crate::vars::Scope;
use tch::Tensor;

/// max(x, 0).
pub fn relu(x: &Tensor) -> Result<Tensor, NnError> {
    Ok(x.f_relu()?)
}

/// The largest of `pieces` linear functions, for each of `units` outputs (Goodfellow et al. 2013).
#[derive(Debug)]
pub struct Maxout {
    linear: Linear,
    units: i64,
    pieces: i64,
}

impl Maxout {
    /// A layer whose linear part is initialized with `weight` and zero biases.
    pub fn new(
        scope: &mut Scope,
        inputs: i64,
        units: i64,
        pieces: i64,
        weight: Init,
    ) -> Result<Self, NnError> {
        let linear = Linear::new(scope, inputs, units * pieces, weight, Init::Constant(0.0))?;
        Ok(Self { linear, units, pieces })
    }

    /// [N, inputs] to [N, units].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, NnError> {
        Ok(self.linear.forward(x)?.f_view([x.size()[0], self.units, self.pieces])?.f_amax([2], false)?)
    }
}
