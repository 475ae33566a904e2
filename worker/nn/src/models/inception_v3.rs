//! Inception v3 (Szegedy et al. 2016, "Rethinking the Inception architecture for computer vision"), after
//! torchvision's `inception_v3`, which is TensorFlow's released network. Names are torchvision's.
//!
//! The zeros beyond the edge count in the average poolings of the blocks, as in torchvision.

use super::blocks::{Block, Path, Pool, chain};
use super::image::ImageInput;
use super::options::{BN_EPS, BN_MOMENTUM, CLASSES, IMAGENET_CLASSES, IN_CHANNELS};
use super::{Auxiliary, Model, ModelInfo, OptionInfo, Output, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::init::Init;
use crate::layers::{
    ConvNorm, ConvSpec, Linear, Naming, Units, avg_pool, dropout, global_avg_pool, max_pool,
};
use crate::vars::Scope;
use lockstep_common::job::{ModelRole, ModelSpec};
use tch::Tensor;

pub(super) const INFO: ModelInfo = ModelInfo {
    name: "inception-v3",
    summary: "Inception v3: factorized convolutions, an auxiliary head with batch norm",
    role: ModelRole::Classifier,
    input: "[N, 3, H, W], 299x299 in the paper; at least 75x75 (training with `aux`: 299x299)",
    reference: "Szegedy et al. 2016, arXiv:1512.00567; torchvision inception_v3",
    options: &[
        CLASSES,
        IN_CHANNELS,
        OptionInfo { name: "aux", default: "true", meaning: "whether there is the auxiliary head" },
        OptionInfo {
            name: "aux_weight",
            default: "0.4",
            meaning: "weight of the auxiliary head's loss, as in TensorFlow's code",
        },
        OptionInfo {
            name: "dropout",
            default: "0.5",
            meaning: "share of values dropped before the last layer",
        },
        BN_EPS,
        BN_MOMENTUM,
    ],
    build,
};

struct InceptionV3 {
    input: ImageInput,
    stem: [ConvNorm; 3],
    middle: [ConvNorm; 2],
    /// Up to the map that the head looks at, and behind it.
    blocks: Vec<Block>,
    last_blocks: Vec<Block>,
    head: Option<Head>,
    keep: f64,
    fc: Linear,
}

fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    // TensorFlow's default for these networks, which torchvision's initialization names as well.
    const WEIGHT: Init = Init::TruncatedNormal { std: 0.1 };
    let units = Units {
        naming: Naming::Nested,
        mode: spec.batch_norm,
        norm: options::norm(spec, 1e-3)?,
        weight: |_| WEIGHT,
        bias: Init::Constant(0.0),
        bias_before_norm: false,
    };
    let channels = options::channels(spec)?;
    let classes = options::count(spec, "classes", IMAGENET_CLASSES)?;
    let mut unit = |name, conv| ConvNorm::new(scope, name, conv, &units);
    let stem = [
        unit("Conv2d_1a_3x3", ConvSpec::valid(channels, 32, [3, 3]).stride(2))?,
        unit("Conv2d_2a_3x3", ConvSpec::valid(32, 32, [3, 3]))?,
        unit("Conv2d_2b_3x3", ConvSpec::same(32, 64, [3, 3]))?,
    ];
    let middle = [
        unit("Conv2d_3b_1x1", ConvSpec::same(64, 80, [1, 1]))?,
        unit("Conv2d_4a_3x3", ConvSpec::valid(80, 192, [3, 3]))?,
    ];
    let first = [
        ("Mixed_5b", paths_a(32)),
        ("Mixed_5c", paths_a(64)),
        ("Mixed_5d", paths_a(64)),
        ("Mixed_6a", paths_b()),
        ("Mixed_6b", paths_c(128)),
        ("Mixed_6c", paths_c(160)),
        ("Mixed_6d", paths_c(160)),
        ("Mixed_6e", paths_c(192)),
    ];
    let last = [("Mixed_7a", paths_d()), ("Mixed_7b", paths_e()), ("Mixed_7c", paths_e())];
    let mut inputs = 192;
    let mut build_all = |scope: &mut Scope, plans: &[(&str, Vec<Path>)]| {
        let build = |(name, paths): &(&str, Vec<Path>)| {
            let block = Block::new(scope, name, inputs, &units, paths)?;
            inputs = block.outputs();
            Ok(block)
        };
        plans.iter().map(build).collect::<Result<Vec<_>, NnError>>()
    };
    let blocks = build_all(scope, &first)?;
    // The head before the blocks behind it, so that batch norms are numbered as they run.
    let head = if options::switch(spec, "aux", true)? {
        Some(Head::new(
            &mut scope.sub("AuxLogits"),
            768,
            classes,
            options::number(spec, "aux_weight", 0.4, 0.0..=10.0)?,
            &units,
        )?)
    } else {
        None
    };
    let last_blocks = build_all(scope, &last)?;
    let fc = Linear::new(&mut scope.sub("fc"), 2048, classes, WEIGHT, Init::Constant(0.0))?;
    let keep = 1.0 - options::drop_rate(spec, "dropout", 0.5)?;
    let input = ImageInput::new(spec, channels);
    Ok(Box::new(InceptionV3 { input, stem, middle, blocks, last_blocks, head, keep, fc }))
}

/// Figure 5 of the paper, its 5 × 5 kept as in the released network.
fn paths_a(pool: i64) -> Vec<Path> {
    vec![
        Path::new().conv("branch1x1", 64, [1, 1]),
        Path::new().conv("branch5x5_1", 48, [1, 1]).conv("branch5x5_2", 64, [5, 5]),
        Path::new().conv("branch3x3dbl_1", 64, [1, 1]).conv("branch3x3dbl_2", 96, [3, 3]).conv(
            "branch3x3dbl_3",
            96,
            [3, 3],
        ),
        Path::pooled(Pool::AverageWithEdge).conv("branch_pool", pool, [1, 1]),
    ]
}

/// From 35 × 35 to 17 × 17 (figure 10).
fn paths_b() -> Vec<Path> {
    vec![
        Path::new().reduce("branch3x3", 384),
        Path::new()
            .conv("branch3x3dbl_1", 64, [1, 1])
            .conv("branch3x3dbl_2", 96, [3, 3])
            .reduce("branch3x3dbl_3", 96),
        Path::pooled(Pool::MaxReduce),
    ]
}

/// 7 × 7 as 1 × 7 and 7 × 1 (figure 6), `width` channels between.
fn paths_c(width: i64) -> Vec<Path> {
    vec![
        Path::new().conv("branch1x1", 192, [1, 1]),
        Path::new().conv("branch7x7_1", width, [1, 1]).conv("branch7x7_2", width, [1, 7]).conv(
            "branch7x7_3",
            192,
            [7, 1],
        ),
        Path::new()
            .conv("branch7x7dbl_1", width, [1, 1])
            .conv("branch7x7dbl_2", width, [7, 1])
            .conv("branch7x7dbl_3", width, [1, 7])
            .conv("branch7x7dbl_4", width, [7, 1])
            .conv("branch7x7dbl_5", 192, [1, 7]),
        Path::pooled(Pool::AverageWithEdge).conv("branch_pool", 192, [1, 1]),
    ]
}

/// From 17 × 17 to 8 × 8.
fn paths_d() -> Vec<Path> {
    vec![
        Path::new().conv("branch3x3_1", 192, [1, 1]).reduce("branch3x3_2", 320),
        Path::new()
            .conv("branch7x7x3_1", 192, [1, 1])
            .conv("branch7x7x3_2", 192, [1, 7])
            .conv("branch7x7x3_3", 192, [7, 1])
            .reduce("branch7x7x3_4", 192),
        Path::pooled(Pool::MaxReduce),
    ]
}

/// 3 × 3 as 1 × 3 beside 3 × 1 (figure 7).
fn paths_e() -> Vec<Path> {
    vec![
        Path::new().conv("branch1x1", 320, [1, 1]),
        Path::new().conv("branch3x3_1", 384, [1, 1]).fork("branch3x3_2a", "branch3x3_2b", 384),
        Path::new().conv("branch3x3dbl_1", 448, [1, 1]).conv("branch3x3dbl_2", 384, [3, 3]).fork(
            "branch3x3dbl_3a",
            "branch3x3dbl_3b",
            384,
        ),
        Path::pooled(Pool::AverageWithEdge).conv("branch_pool", 192, [1, 1]),
    ]
}

/// The auxiliary classifier over the last 17 × 17 map.
struct Head {
    conv0: ConvNorm,
    conv1: ConvNorm,
    fc: Linear,
    weight: f64,
}

impl Head {
    fn new(
        scope: &mut Scope,
        inputs: i64,
        classes: i64,
        weight: f64,
        units: &Units,
    ) -> Result<Self, NnError> {
        let small = Units { weight: |_| Init::TruncatedNormal { std: 0.01 }, ..*units };
        let fc = Init::TruncatedNormal { std: 0.001 };
        Ok(Self {
            conv0: ConvNorm::new(scope, "conv0", ConvSpec::same(inputs, 128, [1, 1]), units)?,
            conv1: ConvNorm::new(scope, "conv1", ConvSpec::valid(128, 768, [5, 5]), &small)?,
            fc: Linear::new(&mut scope.sub("fc"), 768, classes, fc, Init::Constant(0.0))?,
            weight,
        })
    }

    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Auxiliary, NnError> {
        let x = avg_pool(x, 5, 3)?; // [N, 768, 5, 5]
        let x = self.conv0.forward(&x, fwd)?; // [N, 128, 5, 5]
        let x = global_avg_pool(&self.conv1.forward(&x, fwd)?)?; // [N, 768]
        Ok(Auxiliary { name: "AuxLogits", output: self.fc.forward(&x)?, weight: self.weight })
    }
}

impl Model for InceptionV3 {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        self.input.check(x)?; // [N, 3, 299, 299]
        let head = self.head.as_ref().filter(|_| fwd.train);
        if head.is_some() {
            self.input.check_in_training(x, " to train with `aux`, or `aux = false`")?;
        }
        let x = chain(&self.stem, x.shallow_clone(), fwd)?; // [N, 64, 147, 147]
        let x = chain(&self.middle, max_pool(&x, 3, 2)?, fwd)?; // [N, 192, 71, 71]
        let mut x = max_pool(&x, 3, 2)?; // [N, 192, 35, 35]
        for block in &self.blocks {
            x = block.forward(&x, fwd)?; // [N, 288, 35, 35], then [N, 768, 17, 17]
        }
        let auxiliary = head.map(|head| head.forward(&x, fwd)).transpose()?.into_iter().collect();
        for block in &self.last_blocks {
            x = block.forward(&x, fwd)?; // [N, 1280, 8, 8], then [N, 2048, 8, 8]
        }
        let x = dropout(&global_avg_pool(&x)?, self.keep, "dropout", fwd)?; // [N, 2048]
        Ok(Output { main: self.fc.forward(&x)?, auxiliary })
    }
}
