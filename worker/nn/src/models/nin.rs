//! Network in Network (Lin, Chen and Yan 2014), after the definitions in `mavenlin/cuda-convnet`, `NIN/*_def`.
//!
//! Three blocks of a convolution and two cccp layers (1 × 1 convolutions), max pooling and dropout between them,
//! a global average at the end. Names are the reference's. With batch norm, which the paper does not have, each
//! convolution is followed by `<name>_bn` and loses its bias, which the normalization would cancel.

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
    input: "[N, in_channels, H, W]; 28x28 (mnist widths) or 32x32 (cifar widths) in the paper",
    reference: "Lin, Chen, Yan 2014, arXiv:1312.4400; mavenlin/cuda-convnet",
    options: &[
        OptionInfo {
            name: "widths",
            default: "cifar",
            meaning: "`cifar` or `mnist`: the paper's layer widths",
        },
        OptionInfo { name: "classes", default: "10", meaning: "logits" },
        OptionInfo {
            name: "in_channels",
            default: "3 (cifar), 1 (mnist)",
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

/// The three blocks' widths (convolution, then two cccp layers; the last is the number of classes) and the third
/// convolution's kernel.
#[derive(Clone, Copy)]
struct Widths {
    in_channels: i64,
    blocks: [[i64; 3]; 3],
    last_kernel: i64,
}

const CIFAR: Widths =
    Widths { in_channels: 3, blocks: [[192, 160, 96], [192, 192, 192], [192, 192, 0]], last_kernel: 3 };
const MNIST: Widths =
    Widths { in_channels: 1, blocks: [[96, 64, 48], [128, 96, 48], [128, 96, 0]], last_kernel: 5 };

/// Standard deviation of all initial weights (`initW` in the reference).
const WEIGHT: Init = Init::Normal { std: 0.05 };

struct Nin {
    input: ImageInput,
    blocks: Vec<[ConvNorm; 3]>,
    keep: f64,
}

fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let widths = options::choice(spec, "widths", &[("cifar", CIFAR), ("mnist", MNIST)])?;
    let classes = options::count(spec, "classes", 10)?;
    let final_relu = options::switch(spec, "final_relu", true)?;
    let channels = options::count(spec, "in_channels", widths.in_channels)?;
    let units = Units {
        naming: Naming::Suffixed,
        mode: spec.batch_norm,
        norm: NormSpec::default(),
        weight: |_| WEIGHT,
        bias: Init::Constant(0.0),
        bias_before_norm: false,
    };
    let mut inputs = channels;
    let mut blocks = Vec::new();
    for (b, [conv, first, second]) in widths.blocks.into_iter().enumerate() {
        let last = b + 1 == widths.blocks.len();
        let kernel = if last { widths.last_kernel } else { 5 };
        let second = if last { classes } else { second };
        let mut unit = |name: String, inputs, outputs, kernel, relu| {
            ConvNorm::with(scope, &name, ConvSpec::same(inputs, outputs, [kernel; 2]), &units, relu)
        };
        blocks.push([
            unit(format!("conv{}", b + 1), inputs, conv, kernel, true)?,
            unit(format!("cccp{}", 2 * b + 1), conv, first, 1, true)?,
            unit(format!("cccp{}", 2 * b + 2), first, second, 1, !last || final_relu)?,
        ]);
        inputs = second;
    }
    // Two poolings halve the image, and a window needs two positions.
    let input = ImageInput { model: INFO.name, channels, least: 4 };
    Ok(Box::new(Nin { input, blocks, keep: 1.0 - options::drop_rate(spec, "dropout", 0.5)? }))
}

impl Model for Nin {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        self.input.check(x)?;
        let mut x = x.shallow_clone();
        for (b, block) in self.blocks.iter().enumerate() {
            if b > 0 {
                x = max_pool_ceil(&x, 3, 2)?; // [N, C, 28, 28] -> [N, C, 14, 14] -> [N, C, 7, 7]
                x = dropout(&x, self.keep, &format!("dropout{b}"), fwd)?;
            }
            for unit in block {
                x = unit.forward(&x, fwd)?;
            }
        }
        Ok(global_avg_pool(&x)?.into()) // [N, classes]
    }
}
