//! Inception-ResNet v1 (Szegedy et al. 2017), the paper's: 5, 10 and 5 residual blocks and one linear layer.
//!
//! Names are those of `timesler/facenet-pytorch`, `inception_resnet_v1`, whose network has one more block (`block8`) and
//! a bottleneck before its `logits`, and is the same up to there.

use super::blocks::chain;
use super::image::ImageInput;
use super::inception_resnet::{Body, RESIDUAL_SCALE, Widths, scales};
use super::inception_v4::{DROPOUT, classifier, units};
use super::options::{BN_EPS, BN_MOMENTUM, CLASSES, IN_CHANNELS};
use super::{Model, ModelInfo, Output, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::layers::{ConvNorm, ConvSpec, Linear, Units, dropout, global_avg_pool, max_pool};
use crate::vars::Scope;
use lockstep_common::job::{ModelRole, ModelSpec};
use tch::Tensor;

pub(super) const INFO: ModelInfo = ModelInfo {
    name: "inception-resnet-v1",
    summary: "Inception-ResNet v1: residual Inception blocks at the cost of Inception v3",
    role: ModelRole::Classifier,
    input: "[N, 3, H, W], 299x299 in the paper; at least 75x75",
    reference: "Szegedy et al. 2017, arXiv:1602.07261; trunk as in facenet-pytorch",
    options: &[CLASSES, IN_CHANNELS, DROPOUT, RESIDUAL_SCALE, BN_EPS, BN_MOMENTUM],
    build,
};

const WIDTHS: Widths = Widths {
    a: [32, 32, 32],
    b: [128, 128, 128, 128],
    c: [192, 192, 192, 192],
    reduction_a: [192, 192, 256],
    reduction_b: [256, 256, 256],
};

/// The first layers of Inception v3 and of the released Inception-ResNets, up to and behind a max pooling.
pub(super) struct NarrowStem {
    first: [ConvNorm; 3],
    second: Vec<ConvNorm>,
}

impl NarrowStem {
    /// Up to 192 channels.
    pub(super) fn new(scope: &mut Scope, channels: i64, units: &Units) -> Result<Self, NnError> {
        let mut unit = |name, conv| ConvNorm::new(scope, name, conv, units);
        Ok(Self {
            first: [
                unit("conv2d_1a", ConvSpec::valid(channels, 32, [3, 3]).stride(2))?,
                unit("conv2d_2a", ConvSpec::valid(32, 32, [3, 3]))?,
                unit("conv2d_2b", ConvSpec::same(32, 64, [3, 3]))?,
            ],
            second: vec![
                unit("conv2d_3b", ConvSpec::same(64, 80, [1, 1]))?,
                unit("conv2d_4a", ConvSpec::valid(80, 192, [3, 3]))?,
            ],
        })
    }

    pub(super) fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        let x = chain(&self.first, x.shallow_clone(), fwd)?; // [N, 64, 147, 147]
        chain(&self.second, max_pool(&x, 3, 2)?, fwd) // [N, 192, 71, 71]
    }
}

struct InceptionResnetV1 {
    input: ImageInput,
    stem: NarrowStem,
    conv2d_4b: ConvNorm,
    body: Body,
    keep: f64,
    logits: Linear,
}

fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let units = units(spec)?;
    let channels = options::channels(spec)?;
    let stem = NarrowStem::new(scope, channels, &units)?;
    let conv2d_4b = ConvNorm::new(scope, "conv2d_4b", ConvSpec::valid(192, 256, [3, 3]).stride(2), &units)?;
    let repeats = [("repeat_1", 5), ("repeat_2", 10), ("repeat_3", 5)];
    let body = Body::new(scope, 256, &units, &WIDTHS, repeats, scales(spec)?)?;
    let logits = classifier(&mut scope.sub("logits"), body.outputs, spec)?;
    let keep = 1.0 - options::drop_rate(spec, "dropout", 0.2)?;
    let input = ImageInput::new(spec, channels);
    Ok(Box::new(InceptionResnetV1 { input, stem, conv2d_4b, body, keep, logits }))
}

impl Model for InceptionResnetV1 {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        self.input.check(x)?; // [N, 3, 299, 299]
        let x = self.stem.forward(x, fwd)?; // [N, 192, 71, 71]
        let x = self.conv2d_4b.forward(&x, fwd)?; // [N, 256, 35, 35]
        let x = self.body.forward(x, fwd)?; // [N, 1792, 8, 8]
        let x = dropout(&global_avg_pool(&x)?, self.keep, "dropout", fwd)?; // [N, 1792]
        Ok(self.logits.forward(&x)?.into())
    }
}
