//! Network in Network (Lin, Chen and Yan 2014), after the definitions in `mavenlin/cuda-convnet`, `NIN/*_def`, and for
//! ImageNet, which the paper does not try, after its authors' model in Caffe's model zoo.
//!
//! Blocks of a convolution and two cccp layers (1 × 1 convolutions), max pooling between them, dropout as well, a global
//! average at the end. Names are the references'. With batch norm, which the paper does not have, each convolution is
//! followed by `<name>_bn` and loses its bias, which the normalization would cancel.

use super::image::ImageInput;
use super::{Model, ModelInfo, OptionInfo, Output, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::init::Init;
use crate::layers::{ConvNorm, ConvSpec, Naming, NormSpec, Units, dropout, global_avg_pool, max_pool_ceil};
use crate::vars::Scope;
use lockstep_common::job::{ModelRole, ModelSpec};
use tch::Tensor;

pub(super) const INFO: ModelInfo = ModelInfo {
    name: "nin",
    summary: "Network in Network: 1x1 convolutions between the others, no fully connected layer",
    role: ModelRole::Classifier,
    input: "[N, in_channels, H, W]; 28x28 (mnist widths), 32x32 (cifar) or 224x224 (imagenet); at least 4x4 or 39x39 (imagenet)",
    reference: "Lin, Chen, Yan 2014, arXiv:1312.4400; mavenlin/cuda-convnet",
    options: &[
        OptionInfo {
            name: "widths",
            default: "cifar",
            meaning: "`cifar` or `mnist`: the paper's layer widths; `imagenet`: those of Caffe's model zoo",
        },
        OptionInfo { name: "classes", default: "10", meaning: "logits" },
        OptionInfo {
            name: "in_channels",
            default: "3 (cifar, imagenet), 1 (mnist)",
            meaning: "channels of the images",
        },
        OptionInfo {
            name: "final_relu",
            default: "true",
            meaning: "ReLU after the last layer, as in the paper",
        },
        OptionInfo { name: "dropout", default: "0.5", meaning: "share of values dropped between blocks" },
    ],
    build,
};

/// How weights begin.
type Weights = fn(&ConvSpec) -> Init;

/// `initW` in the paper's definitions: all weights there.
const WIDE: Weights = |_| Init::Normal { std: 0.05 };
/// Some layers of the network for ImageNet.
const NARROW: Weights = |_| Init::Normal { std: 0.01 };

/// A block: a convolution and its two cccp layers.
#[derive(Clone, Copy)]
struct Widths {
    /// What is appended to the names of its layers.
    suffix: &'static str,
    kernel: i64,
    stride: i64,
    /// Outputs of the three layers; those of the last block's last are the classes.
    outputs: [i64; 3],
    /// How the three layers' weights begin.
    weights: [Weights; 3],
    /// Whether dropout comes before it.
    drops: bool,
}

/// A block of the paper's networks.
const fn block(kernel: i64, outputs: [i64; 3], drops: bool) -> Widths {
    Widths { suffix: "", kernel, stride: 1, outputs, weights: [WIDE; 3], drops }
}

const CIFAR: &[Widths] =
    &[block(5, [192, 160, 96], false), block(5, [192, 192, 192], true), block(3, [192, 192, 0], true)];
const MNIST: &[Widths] =
    &[block(5, [96, 64, 48], false), block(5, [128, 96, 48], true), block(5, [128, 96, 0], true)];
/// Its first convolution has no padding.
const IMAGENET: &[Widths] = &[
    Widths { stride: 4, weights: [NARROW, WIDE, WIDE], ..block(11, [96, 96, 96], false) },
    block(5, [256, 256, 256], false),
    Widths { weights: [NARROW, WIDE, WIDE], ..block(3, [384, 384, 384], false) },
    Widths { suffix: "-1024", weights: [WIDE, WIDE, NARROW], ..block(3, [1024, 1024, 0], true) },
];

struct Nin {
    input: ImageInput,
    blocks: Vec<Block>,
    keep: f64,
}

struct Block {
    drops: bool,
    units: [ConvNorm; 3],
}

fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let widths = [("cifar", CIFAR), ("mnist", MNIST), ("imagenet", IMAGENET)];
    let plan = options::choice(spec, "widths", &widths)?;
    let classes = options::count(spec, "classes", 10)?;
    let final_relu = options::switch(spec, "final_relu", true)?;
    let channels = options::channels(spec)?;
    let mut inputs = channels;
    let mut blocks = Vec::new();
    for (b, Widths { suffix, kernel, stride, outputs: [conv, first, second], weights, drops }) in
        plan.iter().copied().enumerate()
    {
        let last = b + 1 == plan.len();
        let second = if last { classes } else { second };
        let mut unit = |name: String, conv: ConvSpec, weight, relu| {
            let units = Units {
                naming: Naming::Suffixed,
                mode: spec.batch_norm,
                norm: NormSpec::default(),
                weight,
                bias: Init::Constant(0.0),
                bias_before_norm: false,
            };
            ConvNorm::with(scope, &(name + suffix), conv, &units, relu)
        };
        let spatial = match stride {
            1 => ConvSpec::same(inputs, conv, [kernel; 2]),
            stride => ConvSpec::valid(inputs, conv, [kernel; 2]).stride(stride),
        };
        let (cccp1, cccp2) = (ConvSpec::same(conv, first, [1; 2]), ConvSpec::same(first, second, [1; 2]));
        let units = [
            unit(format!("conv{}", b + 1), spatial, weights[0], true)?,
            unit(format!("cccp{}", 2 * b + 1), cccp1, weights[1], true)?,
            unit(format!("cccp{}", 2 * b + 2), cccp2, weights[2], !last || final_relu)?,
        ];
        blocks.push(Block { drops, units });
        inputs = second;
    }
    let input = ImageInput::new(spec, channels);
    Ok(Box::new(Nin { input, blocks, keep: 1.0 - options::drop_rate(spec, "dropout", 0.5)? }))
}

impl Model for Nin {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        self.input.check(x)?;
        let mut x = x.shallow_clone();
        for (b, block) in self.blocks.iter().enumerate() {
            if b > 0 {
                // [N, C, 28, 28] -> [N, C, 14, 14] -> [N, C, 7, 7]; imagenet: 54, 27, 13, 6
                x = max_pool_ceil(&x, 3, 2)?;
            }
            if block.drops {
                x = dropout(&x, self.keep, &format!("dropout{b}"), fwd)?;
            }
            for unit in &block.units {
                x = unit.forward(&x, fwd)?;
            }
        }
        Ok(global_avg_pool(&x)?.into()) // [N, classes]
    }
}
