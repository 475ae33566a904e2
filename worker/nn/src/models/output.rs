//! What a network gives: its output, and in training those of its auxiliary heads.

use tch::Tensor;

/// The outputs of one pass.
#[derive(Debug)]
pub struct Output {
    /// The output that evaluation looks at.
    pub main: Tensor,
    /// Those of the auxiliary heads, in the order of the network; none outside of training.
    pub auxiliary: Vec<Auxiliary>,
}

/// The output of a head in the midst of a network, there to give the layers below it a gradient.
#[derive(Debug)]
pub struct Auxiliary {
    /// The head's name in the network.
    pub name: &'static str,
    /// As [`Output::main`].
    pub output: Tensor,
    /// The weight of its loss beside that of the main output, 1.
    pub weight: f64,
}

impl From<Tensor> for Output {
    fn from(main: Tensor) -> Self {
        Self { main, auxiliary: Vec::new() }
    }
}
