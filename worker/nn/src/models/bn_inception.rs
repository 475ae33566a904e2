//! BN-Inception (Ioffe and Szegedy 2015, "Batch normalization", figure 5), after the network whose weights are in use,
//! `Cadene/pretrained-models.pytorch`, `bninception`. Names are its.
//!
//! Its convolutions have biases although the normalization behind them cancels them. Its published weights take images
//! of 224 × 224 in the order blue, green, red, with values 0 to 255 minus (104, 117, 128). That reference can only take
//! images whose map before a reduction has even sides; here the pooling beside a convolution with stride 2 always gives
//! as many values as that. Its package on
//! PyPI has PyTorch's momentum, as here; its source on GitHub says 0.9, what Caffe means by what is kept.

use super::blocks::{Block, Path, Pool, chain};
use super::image::ImageInput;
use super::options::{BN_MOMENTUM, CLASSES, IMAGENET_CLASSES, IN_CHANNELS};
use super::{Model, ModelInfo, OptionInfo, Output, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::init::Init;
use crate::layers::{ConvNorm, ConvSpec, Linear, Naming, Units, dropout, global_avg_pool, max_pool_ceil};
use crate::vars::Scope;
use lockstep_common::job::{ModelRole, ModelSpec};
use tch::Tensor;

pub(super) const INFO: ModelInfo = ModelInfo {
    name: "bn-inception",
    summary: "BN-Inception (Inception v2): GoogLeNet with batch norm and two 3x3 for each 5x5",
    role: ModelRole::Classifier,
    input: "[N, 3, H, W], 224x224 in the paper; at least 7x7; published weights: `channel_order = \"bgr\"`, 0-255 minus (104,117,128)",
    reference: "Ioffe, Szegedy 2015, arXiv:1502.03167; Cadene/pretrained-models.pytorch bninception",
    options: &[
        CLASSES,
        IN_CHANNELS,
        OptionInfo {
            name: "dropout",
            default: "0",
            meaning: "share of values dropped before the last layer; the paper drops none",
        },
        OptionInfo { name: "bn_eps", default: "0.00001", meaning: "added to the variance by batch norm" },
        BN_MOMENTUM,
    ],
    build,
};

/// Outputs of a block's convolutions; a block without `one` halves the map.
struct Widths {
    name: &'static str,
    one: Option<i64>,
    three: [i64; 2],
    double: [i64; 2],
    /// What is pooled, and the outputs of the convolution behind that.
    pool: (Pool, Option<i64>),
}

const fn block(name: &'static str, one: i64, three: [i64; 2], double: [i64; 2], pool: (Pool, i64)) -> Widths {
    Widths { name, one: Some(one), three, double, pool: (pool.0, Some(pool.1)) }
}

const fn reduction(name: &'static str, three: [i64; 2], double: [i64; 2]) -> Widths {
    Widths { name, one: None, three, double, pool: (Pool::MaxReduceCeil, None) }
}

const AVERAGE: Pool = Pool::AverageWithEdge;

const BLOCKS: [Widths; 10] = [
    block("inception_3a_", 64, [64, 64], [64, 96], (AVERAGE, 32)),
    block("inception_3b_", 64, [64, 96], [64, 96], (AVERAGE, 64)),
    reduction("inception_3c_", [128, 160], [64, 96]),
    block("inception_4a_", 224, [64, 96], [96, 128], (AVERAGE, 128)),
    block("inception_4b_", 192, [96, 128], [96, 128], (AVERAGE, 128)),
    block("inception_4c_", 160, [128, 160], [128, 160], (AVERAGE, 128)),
    block("inception_4d_", 96, [128, 192], [160, 192], (AVERAGE, 128)),
    reduction("inception_4e_", [128, 192], [192, 256]),
    block("inception_5a_", 352, [192, 320], [160, 224], (AVERAGE, 128)),
    block("inception_5b_", 352, [192, 320], [192, 224], (Pool::Max, 128)),
];

impl Widths {
    fn paths(&self) -> Vec<Path> {
        let Self { one, three: [three_reduce, three], double: [double_reduce, double], .. } = *self;
        let three_path = Path::new().conv("3x3_reduce", three_reduce, [1, 1]);
        let double_path =
            Path::new().conv("double_3x3_reduce", double_reduce, [1, 1]).conv("double_3x3_1", double, [3, 3]);
        let pool = Path::pooled(self.pool.0);
        let (three_path, double_path) = match one {
            Some(_) => {
                (three_path.conv("3x3", three, [3, 3]), double_path.conv("double_3x3_2", double, [3, 3]))
            }
            None => (three_path.reduce_same("3x3", three), double_path.reduce_same("double_3x3_2", double)),
        };
        let pool = match self.pool.1 {
            Some(outputs) => pool.conv("pool_proj", outputs, [1, 1]),
            None => pool,
        };
        let one = one.map(|outputs| Path::new().conv("1x1", outputs, [1, 1]));
        one.into_iter().chain([three_path, double_path, pool]).collect()
    }
}

struct BnInception {
    input: ImageInput,
    conv1: ConvNorm,
    conv2: [ConvNorm; 2],
    blocks: Vec<Block>,
    keep: f64,
    last: Linear,
}

fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let units = Units {
        naming: Naming::Suffixed,
        mode: spec.batch_norm,
        norm: options::norm(spec, 1e-5)?,
        // The paper names no initialization; this is the one of the GoogLeNet that it starts from.
        weight: |conv| Init::xavier(conv.fan_in()),
        bias: Init::Constant(0.0),
        bias_before_norm: true,
    };
    let channels = options::channels(spec)?;
    let classes = options::count(spec, "classes", IMAGENET_CLASSES)?;
    let mut unit = |name, conv| ConvNorm::new(scope, name, conv, &units);
    let conv1 = unit("conv1_7x7_s2", ConvSpec::same(channels, 64, [7, 7]).stride(2))?;
    let conv2 = [
        unit("conv2_3x3_reduce", ConvSpec::same(64, 64, [1, 1]))?,
        unit("conv2_3x3", ConvSpec::same(64, 192, [3, 3]))?,
    ];
    let mut blocks: Vec<Block> = Vec::new();
    for widths in &BLOCKS {
        let inputs = blocks.last().map_or(192, Block::outputs);
        blocks.push(Block::prefixed(scope, widths.name, inputs, &units, &widths.paths())?);
    }
    let last =
        Linear::new(&mut scope.sub("last_linear"), 1024, classes, Init::xavier(1024), Init::Constant(0.0))?;
    let keep = 1.0 - options::drop_rate(spec, "dropout", 0.0)?;
    let input = ImageInput::new(spec, channels);
    Ok(Box::new(BnInception { input, conv1, conv2, blocks, keep, last }))
}

impl Model for BnInception {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        self.input.check(x)?; // [N, 3, 224, 224]
        let x = self.conv1.forward(x, fwd)?; // [N, 64, 112, 112]
        let x = chain(&self.conv2, max_pool_ceil(&x, 3, 2)?, fwd)?; // [N, 192, 56, 56]
        let mut x = max_pool_ceil(&x, 3, 2)?; // [N, 192, 28, 28]
        for block in &self.blocks {
            x = block.forward(&x, fwd)?; // [N, 320, 28, 28], [N, 576, 14, 14], [N, 1024, 7, 7]
        }
        let x = dropout(&global_avg_pool(&x)?, self.keep, "dropout", fwd)?; // [N, 1024]
        Ok(self.last.forward(&x)?.into())
    }
}
