//! A small convolutional network with batch norm: seconds to train on a CPU, and cheap in f64.

use super::{Model, ModelInfo, OptionInfo, Output, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::init::Init;
use crate::layers::{BatchNorm, Conv2d, ConvSpec, Linear, global_avg_pool, relu};
use crate::vars::Scope;
use lockstep_common::job::{ModelRole, ModelSpec};
use tch::Tensor;

pub(super) const INFO: ModelInfo = ModelInfo {
    name: "small-cnn",
    summary: "Three 3x3 convolutions (the later two with stride 2), global average, one linear layer",
    role: ModelRole::Classifier,
    input: "[N, in_channels, H, W]",
    reference: "this project; worker/nn/parity/reference.py is the same network in PyTorch",
    options: &[
        OptionInfo { name: "classes", default: "10", meaning: "logits" },
        OptionInfo { name: "in_channels", default: "1", meaning: "channels of the images" },
        OptionInfo {
            name: "width",
            default: "16",
            meaning: "channels of the first layer; the next have twice as many",
        },
    ],
    build,
};

struct SmallCnn {
    convs: Vec<(Conv2d, Option<BatchNorm>)>,
    fc: Linear,
}

fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let width = options::count(spec, "width", 16)?;
    let mut inputs = options::channels(spec)?;
    let mut convs = Vec::new();
    for (i, (outputs, stride)) in [(width, 1), (2 * width, 2), (4 * width, 2)].into_iter().enumerate() {
        let conv = ConvSpec::same(inputs, outputs, [3, 3]).stride(stride);
        let init = Init::fan_in(conv.fan_in());
        let norm = BatchNorm::new(&mut scope.sub(&format!("bn{}", i + 1)), outputs, spec.batch_norm, true)?;
        let bias = norm.is_none().then_some(init);
        convs.push((Conv2d::new(&mut scope.sub(&format!("conv{}", i + 1)), conv, init, bias)?, norm));
        inputs = outputs;
    }
    let init = Init::fan_in(inputs);
    let fc = Linear::new(&mut scope.sub("fc"), inputs, options::count(spec, "classes", 10)?, init, init)?;
    Ok(Box::new(SmallCnn { convs, fc }))
}

impl Model for SmallCnn {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        let mut x = x.shallow_clone();
        for (conv, norm) in &self.convs {
            let y = conv.forward(&x)?;
            x = match norm {
                Some(norm) => norm.forward(&y, fwd)?,
                None => relu(&y)?,
            };
        }
        Ok(self.fc.forward(&global_avg_pool(&x)?)?.into())
    }
}
