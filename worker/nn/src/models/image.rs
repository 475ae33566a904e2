//! Which images a network takes.

use crate::error::NnError;
use tch::Tensor;

/// Images [N, channels, H, W] of at least some size.
#[derive(Clone, Copy, Debug)]
pub(super) struct ImageInput {
    pub(super) model: &'static str,
    pub(super) channels: i64,
    /// The least height and width from which something is left for the last layer.
    pub(super) least: i64,
}

impl ImageInput {
    /// Refuses what the network cannot take, with a line that says what it would take.
    pub(super) fn check(&self, x: &Tensor) -> Result<(), NnError> {
        self.check_for(x, self.least, "")
    }

    /// The same with another least size; `remedy` says what to do beside taking larger images.
    pub(super) fn check_for(&self, x: &Tensor, least: i64, remedy: &str) -> Result<(), NnError> {
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
