//! GoogLeNet (Szegedy et al. 2015, "Going deeper with convolutions"), in two variants.
//!
//! `torchvision` is torchvision's: batch norm, no local response normalization, and, a known deviation that its
//! weights depend on (`pytorch/vision` issue 906), 3 × 3 convolutions where the paper has 5 × 5, a 2 × 2 window in the
//! last max pooling, and dropout of 0.2. `paper` is Caffe's `models/bvlc_googlenet`: biases and local response
//! normalization, no batch norm. Names are the reference's.
//!
//! Both take images of any size that leaves something for the last block; the paper's last pooling, 7 × 7, is one over
//! all positions. Caffe's auxiliary heads average 5 × 5 values at every third position, 4 × 4 results of 14 × 14; where
//! the map has another size, they share it out into 4 × 4, as torchvision's do.

use super::blocks::{Block, Path, Pool};
use super::image::ImageInput;
use super::options::{BN_EPS, BN_MOMENTUM, CLASSES, IMAGENET_CLASSES, IN_CHANNELS};
use super::{Auxiliary, Model, ModelInfo, OptionInfo, Output, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::init::Init;
use crate::layers::{
    ConvNorm, ConvSpec, Linear, Naming, NormSpec, Units, avg_pool, avg_pool_to, dropout, global_avg_pool,
    local_response_norm, max_pool_ceil, relu,
};
use crate::vars::Scope;
use lockstep_common::job::{BatchNorm, ModelRole, ModelSpec};
use tch::Tensor;

pub(super) const INFO: ModelInfo = ModelInfo {
    name: "googlenet",
    summary: "GoogLeNet (Inception v1): nine blocks, two auxiliary heads",
    role: ModelRole::Classifier,
    input: "[N, 3, H, W], 224x224 in the paper; at least 15x15 (torchvision) or 31x31 (paper)",
    reference: "Szegedy et al. 2015, arXiv:1409.4842; torchvision googlenet, BVLC/caffe bvlc_googlenet",
    options: &[
        OptionInfo {
            name: "variant",
            default: "torchvision",
            meaning: "`torchvision`: batch norm; `paper`: local response normalization, biases",
        },
        CLASSES,
        IN_CHANNELS,
        OptionInfo { name: "aux", default: "true", meaning: "whether there are the two auxiliary heads" },
        OptionInfo {
            name: "aux_weight",
            default: "0.3",
            meaning: "weight of each auxiliary head's loss, as in the paper",
        },
        OptionInfo {
            name: "dropout",
            default: "0.2 (torchvision), 0.4 (paper)",
            meaning: "share of values dropped before the last layer",
        },
        OptionInfo {
            name: "aux_dropout",
            default: "0.7",
            meaning: "share of values dropped in the auxiliary heads",
        },
        BN_EPS,
        BN_MOMENTUM,
    ],
    build,
};

/// What the variants differ in.
#[derive(Clone, Copy)]
struct Variant {
    names: fn(&str) -> Names,
    aux_names: [AuxNames; 2],
    last_name: &'static str,
    /// The side of the kernel that the paper makes 5 × 5.
    large_kernel: i64,
    /// The side of the last max pooling's window.
    last_pool: i64,
    local_response: bool,
    drop_rate: f64,
    linear: fn(i64) -> Init,
    hidden_bias: Init,
}

/// Names of a block and of its convolutions: 1 × 1, 3 × 3 with its reduction, 5 × 5 with its reduction, and behind the
/// pooling.
struct Names {
    block: String,
    convs: [&'static str; 6],
}

#[derive(Clone, Copy)]
struct AuxNames {
    output: &'static str,
    conv: &'static str,
    hidden: &'static str,
    last: &'static str,
}

const TORCHVISION: Variant = Variant {
    names: |block| Names {
        block: format!("inception{block}."),
        convs: ["branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1"],
    },
    aux_names: [
        AuxNames { output: "aux1", conv: "aux1.conv", hidden: "aux1.fc1", last: "aux1.fc2" },
        AuxNames { output: "aux2", conv: "aux2.conv", hidden: "aux2.fc1", last: "aux2.fc2" },
    ],
    last_name: "fc",
    large_kernel: 3,
    last_pool: 2,
    local_response: false,
    drop_rate: 0.2,
    linear: |_| Init::Normal { std: 0.01 },
    hidden_bias: Init::Constant(0.0),
};

const PAPER: Variant = Variant {
    names: |block| Names {
        block: format!("inception_{block}/"),
        convs: ["1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj"],
    },
    aux_names: [
        AuxNames { output: "loss1", conv: "loss1/conv", hidden: "loss1/fc", last: "loss1/classifier" },
        AuxNames { output: "loss2", conv: "loss2/conv", hidden: "loss2/fc", last: "loss2/classifier" },
    ],
    last_name: "loss3/classifier",
    large_kernel: 5,
    last_pool: 3,
    local_response: true,
    drop_rate: 0.4,
    linear: Init::xavier,
    hidden_bias: Init::Constant(0.2),
};

/// Outputs of the six convolutions of each block (table 1 of the paper).
const BLOCKS: [(&str, [i64; 6]); 9] = [
    ("3a", [64, 96, 128, 16, 32, 32]),
    ("3b", [128, 128, 192, 32, 96, 64]),
    ("4a", [192, 96, 208, 16, 48, 64]),
    ("4b", [160, 112, 224, 24, 64, 64]),
    ("4c", [128, 128, 256, 24, 64, 64]),
    ("4d", [112, 144, 288, 32, 64, 64]),
    ("4e", [256, 160, 320, 32, 128, 128]),
    ("5a", [256, 160, 320, 32, 128, 128]),
    ("5b", [384, 192, 384, 48, 128, 128]),
];

/// The blocks behind which a pooling follows, and those behind which a head looks at the map.
const POOLED: [&str; 2] = ["3b", "4e"];
const WATCHED: [&str; 2] = ["4a", "4d"];

struct GoogLeNet {
    input: ImageInput,
    variant: Variant,
    conv1: ConvNorm,
    conv2: [ConvNorm; 2],
    blocks: Vec<Block>,
    heads: Vec<Head>,
    keep: f64,
    fc: Linear,
}

fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let variant = options::choice(spec, "variant", &[("torchvision", TORCHVISION), ("paper", PAPER)])?;
    if let Some((option, problem)) = spec.contradiction() {
        let (option, problem) = (option.to_owned(), problem.to_owned());
        return Err(NnError::Option { model: spec.name.clone(), option, problem });
    }
    let units = if variant.local_response {
        Units {
            naming: Naming::Suffixed,
            mode: BatchNorm::None,
            norm: NormSpec::default(),
            weight: |conv| Init::xavier(conv.fan_in()),
            bias: variant.hidden_bias,
            bias_before_norm: true,
        }
    } else {
        Units {
            naming: Naming::Nested,
            mode: spec.batch_norm,
            norm: options::norm(spec, 1e-3)?,
            weight: |_| Init::Normal { std: 0.01 },
            bias: variant.hidden_bias,
            bias_before_norm: false,
        }
    };
    let names = if variant.local_response {
        ["conv1/7x7_s2", "conv2/3x3_reduce", "conv2/3x3"]
    } else {
        ["conv1", "conv2", "conv3"]
    };
    let channels = options::channels(spec)?;
    let classes = options::count(spec, "classes", IMAGENET_CLASSES)?;
    let conv1 = ConvNorm::new(scope, names[0], ConvSpec::same(channels, 64, [7, 7]).stride(2), &units)?;
    let conv2 = [
        ConvNorm::new(scope, names[1], ConvSpec::same(64, 64, [1, 1]), &units)?,
        ConvNorm::new(scope, names[2], ConvSpec::same(64, 192, [3, 3]), &units)?,
    ];
    let with_heads = options::switch(spec, "aux", true)?;
    let head = HeadSpec {
        units: &units,
        variant: &variant,
        classes,
        weight: options::number(spec, "aux_weight", 0.3, 0.0..=10.0)?,
        keep: 1.0 - options::drop_rate(spec, "aux_dropout", 0.7)?,
    };
    let (mut blocks, mut heads): (Vec<Block>, _) = (Vec::new(), Vec::new());
    for (name, widths) in BLOCKS {
        let inputs = blocks.last().map_or(192, Block::outputs);
        let block = inception(scope, &(variant.names)(name), inputs, widths, &variant, &units)?;
        if with_heads && WATCHED.contains(&name) {
            heads.push(head.build(scope, variant.aux_names[heads.len()], block.outputs())?);
        }
        blocks.push(block);
    }
    let fc = Linear::new(
        &mut scope.sub(variant.last_name),
        1024,
        classes,
        (variant.linear)(1024),
        Init::Constant(0.0),
    )?;
    let keep = 1.0 - options::drop_rate(spec, "dropout", variant.drop_rate)?;
    let input = ImageInput::new(spec, channels);
    Ok(Box::new(GoogLeNet { input, variant, conv1, conv2, blocks, heads, keep, fc }))
}

/// An Inception block: 1 × 1, 3 × 3, 5 × 5 and a max pooling side by side (figure 2b of the paper).
fn inception(
    scope: &mut Scope,
    names: &Names,
    inputs: i64,
    widths: [i64; 6],
    variant: &Variant,
    units: &Units,
) -> Result<Block, NnError> {
    let [n1, n3r, n3, n5r, n5, pool] = names.convs;
    let large = [variant.large_kernel; 2];
    let paths = [
        Path::new().conv(n1, widths[0], [1, 1]),
        Path::new().conv(n3r, widths[1], [1, 1]).conv(n3, widths[2], [3, 3]),
        Path::new().conv(n5r, widths[3], [1, 1]).conv(n5, widths[4], large),
        Path::pooled(Pool::Max).conv(pool, widths[5], [1, 1]),
    ];
    Block::prefixed(scope, &names.block, inputs, units, &paths)
}

/// What the heads have in common.
struct HeadSpec<'a> {
    units: &'a Units,
    variant: &'a Variant,
    classes: i64,
    weight: f64,
    keep: f64,
}

impl HeadSpec<'_> {
    fn build(&self, scope: &mut Scope, names: AuxNames, inputs: i64) -> Result<Head, NnError> {
        let variant = self.variant;
        let conv = ConvNorm::new(scope, names.conv, ConvSpec::same(inputs, 128, [1, 1]), self.units)?;
        let hidden = (variant.linear)(2048);
        let hidden = Linear::new(&mut scope.sub(names.hidden), 2048, 1024, hidden, variant.hidden_bias)?;
        let last = (variant.linear)(1024);
        let last = Linear::new(&mut scope.sub(names.last), 1024, self.classes, last, Init::Constant(0.0))?;
        let strided = variant.local_response;
        Ok(Head { name: names.output, conv, hidden, last, strided, weight: self.weight, keep: self.keep })
    }
}

/// An auxiliary classifier.
struct Head {
    name: &'static str,
    conv: ConvNorm,
    hidden: Linear,
    last: Linear,
    /// Whether the pooling is Caffe's where the map has the size for it.
    strided: bool,
    weight: f64,
    keep: f64,
}

impl Head {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Auxiliary, NnError> {
        // [N, 512 or 528, 14, 14]
        let fits = matches!(x.size()[..], [_, _, 14, 14]);
        let x = if self.strided && fits { avg_pool(x, 5, 3)? } else { avg_pool_to(x, 4)? };
        let x = self.conv.forward(&x, fwd)?; // [N, 128, 4, 4]
        let x = relu(&self.hidden.forward(&x.f_flatten(1, -1)?)?)?; // [N, 1024]
        let x = dropout(&x, self.keep, &format!("{}.dropout", self.name), fwd)?;
        Ok(Auxiliary { name: self.name, output: self.last.forward(&x)?, weight: self.weight })
    }
}

impl GoogLeNet {
    fn respond(&self, x: Tensor) -> Result<Tensor, NnError> {
        if self.variant.local_response { local_response_norm(&x, 5, 1e-4, 0.75) } else { Ok(x) }
    }
}

impl Model for GoogLeNet {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        self.input.check(x)?; // [N, 3, 224, 224]
        let x = self.conv1.forward(x, fwd)?; // [N, 64, 112, 112]
        let x = self.respond(max_pool_ceil(&x, 3, 2)?)?; // [N, 64, 56, 56]
        let x = self.conv2[0].forward(&x, fwd)?;
        let x = self.respond(self.conv2[1].forward(&x, fwd)?)?; // [N, 192, 56, 56]
        let mut x = max_pool_ceil(&x, 3, 2)?; // [N, 192, 28, 28]
        let mut heads = self.heads.iter().filter(|_| fwd.train).collect::<Vec<_>>().into_iter();
        let mut auxiliary = Vec::new();
        for (block, (name, _)) in self.blocks.iter().zip(BLOCKS) {
            x = block.forward(&x, fwd)?;
            if WATCHED.contains(&name) {
                auxiliary.extend(heads.next().map(|head| head.forward(&x, fwd)).transpose()?);
            }
            if POOLED.contains(&name) {
                let window = if name == "4e" { self.variant.last_pool } else { 3 };
                x = max_pool_ceil(&x, window, 2)?; // [N, 480, 14, 14], [N, 832, 7, 7]
            }
        }
        let x = dropout(&global_avg_pool(&x)?, self.keep, "dropout", fwd)?; // [N, 1024]
        Ok(Output { main: self.fc.forward(&x)?, auxiliary })
    }
}
