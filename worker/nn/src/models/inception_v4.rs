//! Inception v4 (Szegedy et al. 2017, "Inception-v4, Inception-ResNet and the impact of residual connections on
//! learning"), after timm's `inception_v4`, which is TensorFlow's released network. Names are timm's.
//!
//! The zeros beyond the edge do not count in the average poolings of the blocks.

use super::blocks::{Block, Path, Pool, chain};
use super::image::ImageInput;
use super::options::{BN_EPS, BN_MOMENTUM, CLASSES, IMAGENET_CLASSES, IN_CHANNELS};
use super::{Model, ModelInfo, OptionInfo, Output, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::init::Init;
use crate::layers::{ConvNorm, ConvSpec, Linear, Naming, Units, dropout, global_avg_pool};
use crate::vars::Scope;
use lockstep_common::job::{ModelRole, ModelSpec};
use tch::Tensor;

pub(super) const INFO: ModelInfo = ModelInfo {
    name: "inception-v4",
    summary: "Inception v4: a deeper, more uniform Inception, no auxiliary head",
    role: ModelRole::Classifier,
    input: "[N, 3, H, W], 299x299 in the paper; at least 75x75",
    reference: "Szegedy et al. 2017, arXiv:1602.07261; timm inception_v4",
    options: &[CLASSES, IN_CHANNELS, DROPOUT, BN_EPS, BN_MOMENTUM],
    build,
};

/// The paper keeps 0.8 in all three of its networks.
pub(super) const DROPOUT: OptionInfo = OptionInfo {
    name: "dropout",
    default: "0.2",
    meaning: "share of values dropped before the last layer, as in the paper",
};

/// The units of the paper's networks, initialized as TF-Slim does.
pub(super) fn units(spec: &ModelSpec) -> Result<Units, NnError> {
    Ok(Units {
        naming: Naming::Nested,
        mode: spec.batch_norm,
        norm: options::norm(spec, 1e-3)?,
        weight: |conv| Init::variance_scaling(conv.fan_in()),
        bias: Init::Constant(0.0),
        bias_before_norm: false,
    })
}

/// The last layer, initialized as TF-Slim does.
pub(super) fn classifier(scope: &mut Scope, inputs: i64, spec: &ModelSpec) -> Result<Linear, NnError> {
    let classes = options::count(spec, "classes", IMAGENET_CLASSES)?;
    Linear::new(scope, inputs, classes, Init::glorot(inputs, classes), Init::Constant(0.0))
}

/// From the image to 384 channels (figure 3 of the paper). The parts are numbered.
pub(super) struct Stem {
    convs: [ConvNorm; 3],
    blocks: [Block; 3],
}

impl Stem {
    pub(super) fn new(scope: &mut Scope, channels: i64, units: &Units) -> Result<Self, NnError> {
        let mut unit = |name, conv| ConvNorm::new(scope, name, conv, units);
        let convs = [
            unit("0", ConvSpec::valid(channels, 32, [3, 3]).stride(2))?,
            unit("1", ConvSpec::valid(32, 32, [3, 3]))?,
            unit("2", ConvSpec::same(32, 64, [3, 3]))?,
        ];
        let split = [
            Path::new().conv("branch0.0", 64, [1, 1]).valid("branch0.1", 96),
            Path::new()
                .conv("branch1.0", 64, [1, 1])
                .conv("branch1.1", 64, [1, 7])
                .conv("branch1.2", 64, [7, 1])
                .valid("branch1.3", 96),
        ];
        let pool = || Path::pooled(Pool::MaxReduce);
        let mut block = |name, inputs, paths: &[Path]| Block::new(scope, name, inputs, units, paths);
        let blocks = [
            block("3", 64, &[pool(), Path::new().reduce("conv", 96)])?,
            block("4", 160, &split)?,
            block("5", 192, &[Path::new().reduce("conv", 192), pool()])?,
        ];
        Ok(Self { convs, blocks })
    }

    pub(super) fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        let mut x = chain(&self.convs, x.shallow_clone(), fwd)?; // [N, 64, 147, 147]
        for block in &self.blocks {
            x = block.forward(&x, fwd)?; // [N, 160, 73, 73], [N, 192, 71, 71], [N, 384, 35, 35]
        }
        Ok(x)
    }

    pub(super) const OUTPUTS: i64 = 384;
}

struct InceptionV4 {
    input: ImageInput,
    stem: Stem,
    blocks: Vec<Block>,
    keep: f64,
    last: Linear,
}

fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let units = units(spec)?;
    let channels = options::channels(spec)?;
    let mut features = scope.sub("features");
    let stem = Stem::new(&mut features, channels, &units)?;
    let mut blocks = Vec::new();
    let mut inputs = Stem::OUTPUTS;
    let plan = [(4, paths_a()), (1, reduction_a()), (7, paths_b()), (1, reduction_b()), (3, paths_c())];
    for paths in plan.iter().flat_map(|(count, paths)| std::iter::repeat_n(paths, *count)) {
        // The stem is 0 to 5.
        let block = Block::new(&mut features, &format!("{}", 6 + blocks.len()), inputs, &units, paths)?;
        inputs = block.outputs();
        blocks.push(block);
    }
    let last = classifier(&mut scope.sub("last_linear"), inputs, spec)?;
    let keep = 1.0 - options::drop_rate(spec, "dropout", 0.2)?;
    let input = ImageInput::new(spec, channels);
    Ok(Box::new(InceptionV4 { input, stem, blocks, keep, last }))
}

/// Figure 4.
fn paths_a() -> Vec<Path> {
    vec![
        Path::new().conv("branch0", 96, [1, 1]),
        Path::new().conv("branch1.0", 64, [1, 1]).conv("branch1.1", 96, [3, 3]),
        Path::new().conv("branch2.0", 64, [1, 1]).conv("branch2.1", 96, [3, 3]).conv("branch2.2", 96, [3, 3]),
        Path::pooled(Pool::Average).conv("branch3.1", 96, [1, 1]),
    ]
}

/// Figure 7 with k, l, m, n = 192, 224, 256, 384.
fn reduction_a() -> Vec<Path> {
    vec![
        Path::new().reduce("branch0", 384),
        Path::new().conv("branch1.0", 192, [1, 1]).conv("branch1.1", 224, [3, 3]).reduce("branch1.2", 256),
        Path::pooled(Pool::MaxReduce),
    ]
}

/// Figure 5.
fn paths_b() -> Vec<Path> {
    vec![
        Path::new().conv("branch0", 384, [1, 1]),
        Path::new().conv("branch1.0", 192, [1, 1]).conv("branch1.1", 224, [1, 7]).conv(
            "branch1.2",
            256,
            [7, 1],
        ),
        Path::new()
            .conv("branch2.0", 192, [1, 1])
            .conv("branch2.1", 192, [7, 1])
            .conv("branch2.2", 224, [1, 7])
            .conv("branch2.3", 224, [7, 1])
            .conv("branch2.4", 256, [1, 7]),
        Path::pooled(Pool::Average).conv("branch3.1", 128, [1, 1]),
    ]
}

/// Figure 8.
fn reduction_b() -> Vec<Path> {
    vec![
        Path::new().conv("branch0.0", 192, [1, 1]).reduce("branch0.1", 192),
        Path::new()
            .conv("branch1.0", 256, [1, 1])
            .conv("branch1.1", 256, [1, 7])
            .conv("branch1.2", 320, [7, 1])
            .reduce("branch1.3", 320),
        Path::pooled(Pool::MaxReduce),
    ]
}

/// Figure 6.
fn paths_c() -> Vec<Path> {
    vec![
        Path::new().conv("branch0", 256, [1, 1]),
        Path::new().conv("branch1_0", 384, [1, 1]).fork("branch1_1a", "branch1_1b", 256),
        Path::new()
            .conv("branch2_0", 384, [1, 1])
            .conv("branch2_1", 448, [3, 1])
            .conv("branch2_2", 512, [1, 3])
            .fork("branch2_3a", "branch2_3b", 256),
        Path::pooled(Pool::Average).conv("branch3.1", 256, [1, 1]),
    ]
}

impl Model for InceptionV4 {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        self.input.check(x)?; // [N, 3, 299, 299]
        let mut x = self.stem.forward(x, fwd)?; // [N, 384, 35, 35]
        for block in &self.blocks {
            x = block.forward(&x, fwd)?; // [N, 384, 35, 35], [N, 1024, 17, 17], [N, 1536, 8, 8]
        }
        let x = dropout(&global_avg_pool(&x)?, self.keep, "dropout", fwd)?; // [N, 1536]
        Ok(self.last.forward(&x)?.into())
    }
}
