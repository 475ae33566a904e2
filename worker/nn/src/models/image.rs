//! Which images a network takes.

use crate::error::NnError;
use lockstep_common::job::ModelSpec;
use tch::Tensor;

/// Images [N, channels, H, W] of at least some size.
#[derive(Clone, Debug)]
pub(super) struct ImageInput {
    model: String,
    channels: i64,
    least: i64,
    least_in_training: i64,
}

impl ImageInput {
    /// Those of `channels` channels that the network of `spec` takes.
    pub(super) fn new(spec: &ModelSpec, channels: i64) -> Self {
        Self {
            model: spec.name.clone(),
            channels,
            least: spec.least_side().into(),
            least_in_training: spec.least_side_in_training().into(),
        }
    }

    /// Refuses what the network cannot take, with a line that says what it would take.
    pub(super) fn check(&self, x: &Tensor) -> Result<(), NnError> {
        self.check_for(x, self.least, "")
    }

    /// The same for training with auxiliary heads; `remedy` says what to do beside taking larger images.
    pub(super) fn check_in_training(&self, x: &Tensor, remedy: &str) -> Result<(), NnError> {
        self.check_for(x, self.least_in_training, remedy)
    }

    fn check_for(&self, x: &Tensor, least: i64, remedy: &str) -> Result<(), NnError> {
        let size = x.size();
        let fault = |expected: String, got: String| {
            Err(NnError::Shape { what: format!("model `{}`", self.model), expected, got })
        };
        match size[..] {
            [_, channels, _, _] if channels != self.channels => fault(
                format!("images of {} channels (option `in_channels`)", self.channels),
                format!("images of {channels}"),
            ),
            [_, _, height, width] if height.min(width) < least => fault(
                format!("images of at least {least}x{least} pixels{remedy}"),
                format!("images of {height}x{width}"),
            ),
            [_, _, _, _] => Ok(()),
            _ => fault("images [N, channels, height, width]".to_owned(), format!("a shape of {size:?}")),
        }
    }
}
