//! Inception-ResNet v2 (Szegedy et al. 2017), in two variants.
//!
//! `released` is the network that TensorFlow released, after timm's `inception_resnet_v2`: the stem of Inception v3, then
//! 10, 20 and 10 blocks, the last of which is neither scaled nor followed by a ReLU, and a 1 × 1 convolution. Names are
//! timm's. `paper` is the paper's: the stem of Inception v4 and 5, 10 and 5 blocks. Where the paper's figures 17 and 19
//! say 1154 and 2048 channels, the blocks before give 1152 and 2144, which is what they must be for the sum.

use super::blocks::{Block, Path, Pool};
use super::image::ImageInput;
use super::inception_resnet::{Body, RESIDUAL_SCALE, Residual, Widths, scales};
use super::inception_resnet_v1::NarrowStem;
use super::inception_v4::{DROPOUT, Stem, classifier, units};
use super::options::{BN_EPS, BN_MOMENTUM, CLASSES, IN_CHANNELS};
use super::{Model, ModelInfo, OptionInfo, Output, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::layers::{ConvNorm, ConvSpec, Linear, Units, dropout, global_avg_pool, max_pool};
use crate::vars::Scope;
use lockstep_common::job::{ModelRole, ModelSpec};
use tch::Tensor;

pub(super) const INFO: ModelInfo = ModelInfo {
    name: "inception-resnet-v2",
    summary: "Inception-ResNet v2: residual Inception blocks at the cost of Inception v4",
    role: ModelRole::Classifier,
    input: "[N, 3, H, W], 299x299 in the paper; at least 75x75",
    reference: "Szegedy et al. 2017, arXiv:1602.07261; timm inception_resnet_v2",
    options: &[
        OptionInfo {
            name: "variant",
            default: "released",
            meaning: "`released`: TensorFlow's network; `paper`: the paper's",
        },
        CLASSES,
        IN_CHANNELS,
        DROPOUT,
        RESIDUAL_SCALE,
        BN_EPS,
        BN_MOMENTUM,
    ],
    build,
};

const WIDTHS: Widths = Widths {
    a: [32, 48, 64],
    b: [192, 128, 160, 192],
    c: [192, 192, 224, 256],
    reduction_a: [256, 256, 384],
    reduction_b: [288, 288, 320],
};

#[derive(Clone, Copy)]
enum Variant {
    Released,
    Paper,
}

/// What lies before the blocks.
enum First {
    Released { stem: NarrowStem, mixed_5b: Block },
    Paper(Stem),
}

/// What the released network has behind its blocks.
struct Tail {
    block8: Residual,
    conv2d_7b: ConvNorm,
}

struct InceptionResnetV2 {
    input: ImageInput,
    first: First,
    body: Body,
    tail: Option<Tail>,
    keep: f64,
    classif: Linear,
}

fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let choices = [("released", Variant::Released), ("paper", Variant::Paper)];
    let variant = options::choice(spec, "variant", &choices)?;
    let units = units(spec)?;
    let channels = options::channels(spec)?;
    let names = |counts: [usize; 3]| {
        let [a, b, c] = counts;
        [("repeat", a), ("repeat_1", b), ("repeat_2", c)]
    };
    let (first, inputs, repeats) = match variant {
        Variant::Released => {
            let stem = NarrowStem::new(scope, channels, &units)?;
            let mixed_5b = Block::new(scope, "mixed_5b", 192, &units, &mixed_5b())?;
            let outputs = mixed_5b.outputs();
            (First::Released { stem, mixed_5b }, outputs, names([10, 20, 9]))
        }
        Variant::Paper => {
            let stem = Stem::new(&mut scope.sub("stem"), channels, &units)?;
            (First::Paper(stem), Stem::OUTPUTS, names([5, 10, 5]))
        }
    };
    let body = Body::new(scope, inputs, &units, &WIDTHS, repeats, scales(spec)?)?;
    let (tail, outputs) = match variant {
        Variant::Released => (Some(Tail::new(scope, body.outputs, &units)?), 1536),
        Variant::Paper => (None, body.outputs),
    };
    let classif = classifier(&mut scope.sub("classif"), outputs, spec)?;
    let keep = 1.0 - options::drop_rate(spec, "dropout", 0.2)?;
    let input = ImageInput::new(spec, channels);
    Ok(Box::new(InceptionResnetV2 { input, first, body, tail, keep, classif }))
}

/// An Inception block without a residual, from 192 to 320 channels.
fn mixed_5b() -> [Path; 4] {
    [
        Path::new().conv("branch0", 96, [1, 1]),
        Path::new().conv("branch1.0", 48, [1, 1]).conv("branch1.1", 64, [5, 5]),
        Path::new().conv("branch2.0", 64, [1, 1]).conv("branch2.1", 96, [3, 3]).conv("branch2.2", 96, [3, 3]),
        Path::pooled(Pool::Average).conv("branch3.1", 64, [1, 1]),
    ]
}

impl First {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        match self {
            Self::Released { stem, mixed_5b } => {
                let x = stem.forward(x, fwd)?; // [N, 192, 71, 71]
                mixed_5b.forward(&max_pool(&x, 3, 2)?, fwd) // [N, 320, 35, 35]
            }
            Self::Paper(stem) => stem.forward(x, fwd), // [N, 384, 35, 35]
        }
    }
}

impl Tail {
    fn new(scope: &mut Scope, inputs: i64, units: &Units) -> Result<Self, NnError> {
        let block8 = Residual::new(scope, "block8", inputs, units, &WIDTHS.block_c(), 1.0)?.linear();
        let conv2d_7b = ConvNorm::new(scope, "conv2d_7b", ConvSpec::same(inputs, 1536, [1, 1]), units)?;
        Ok(Self { block8, conv2d_7b })
    }

    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        self.conv2d_7b.forward(&self.block8.forward(x, fwd)?, fwd) // [N, 1536, 8, 8]
    }
}

impl Model for InceptionResnetV2 {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        self.input.check(x)?; // [N, 3, 299, 299]
        let x = self.first.forward(x, fwd)?;
        let mut x = self.body.forward(x, fwd)?; // [N, 2080 or 2144, 8, 8]
        if let Some(tail) = &self.tail {
            x = tail.forward(&x, fwd)?;
        }
        let x = dropout(&global_avg_pool(&x)?, self.keep, "dropout", fwd)?;
        Ok(self.classif.forward(&x)?.into())
    }
}
