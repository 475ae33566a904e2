//! Any network with the channels of a pixel beside each other in memory.

use super::{Model, Output};
use crate::error::NnError;
use crate::forward::Forward;
use crate::shim::channels_last;
use tch::Tensor;

/// A network whose images are channels-last. Its weights stay as they are: libtorch brings a convolution's to the order of
/// its input, and their gradients come out by element, whatever the order.
pub struct ChannelsLast(pub Box<dyn Model>);

impl Model for ChannelsLast {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        match x.dim() {
            4 => self.0.forward(&channels_last(x)?, fwd),
            _ => self.0.forward(x, fwd),
        }
    }
}
