//! What the Inception-ResNets of Szegedy et al. 2017 have in common: Inception blocks whose output is added to their
//! input, a linear 1 × 1 convolution with a bias and no batch norm before that.

use super::blocks::{Block, Path, Pool};
use super::{OptionInfo, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::layers::{Conv2d, ConvSpec, Units, relu};
use crate::vars::Scope;
use lockstep_common::job::ModelSpec;
use tch::Tensor;

pub(super) const RESIDUAL_SCALE: OptionInfo = OptionInfo {
    name: "residual_scale",
    default: "0.17, 0.1, 0.2",
    meaning: "factor of what a block adds to its input; by default one for each of the three sizes",
};

/// The released network's factors at 35 × 35, 17 × 17 and 8 × 8; the paper says 0.1 to 0.3.
const RELEASED_SCALES: [f64; 3] = [0.17, 0.10, 0.20];

/// The factors of `spec` at the three sizes.
pub(super) fn scales(spec: &ModelSpec) -> Result<[f64; 3], NnError> {
    let given = options::number(spec, "residual_scale", f64::NAN, 0.0..=1.0)?;
    Ok(if given.is_nan() { RELEASED_SCALES } else { [given; 3] })
}

/// Channels of the convolutions of one network, in the order of its figures.
pub(super) struct Widths {
    /// 35 × 35: the third path.
    pub(super) a: [i64; 3],
    /// 17 × 17: the first path, then the second.
    pub(super) b: [i64; 4],
    /// 8 × 8: the first path, then the second.
    pub(super) c: [i64; 4],
    /// From 35 × 35 to 17 × 17: the second path (k, l, m of the paper's table 1).
    pub(super) reduction_a: [i64; 3],
    /// From 17 × 17 to 8 × 8: the ends of the second and of the third path, the latter's middle first.
    pub(super) reduction_b: [i64; 3],
}

impl Widths {
    /// Figures 10 and 16.
    pub(super) fn block_a(&self) -> Vec<Path> {
        let [first, second, third] = self.a;
        vec![
            Path::new().conv("branch0", 32, [1, 1]),
            Path::new().conv("branch1.0", 32, [1, 1]).conv("branch1.1", 32, [3, 3]),
            Path::new().conv("branch2.0", first, [1, 1]).conv("branch2.1", second, [3, 3]).conv(
                "branch2.2",
                third,
                [3, 3],
            ),
        ]
    }

    /// Figure 7.
    pub(super) fn reduction_a(&self) -> Vec<Path> {
        let [k, l, m] = self.reduction_a;
        vec![
            Path::new().reduce("branch0", 384),
            Path::new().conv("branch1.0", k, [1, 1]).conv("branch1.1", l, [3, 3]).reduce("branch1.2", m),
            Path::pooled(Pool::MaxReduce),
        ]
    }

    /// Figures 11 and 17.
    pub(super) fn block_b(&self) -> Vec<Path> {
        let [alone, first, second, third] = self.b;
        vec![
            Path::new().conv("branch0", alone, [1, 1]),
            Path::new().conv("branch1.0", first, [1, 1]).conv("branch1.1", second, [1, 7]).conv(
                "branch1.2",
                third,
                [7, 1],
            ),
        ]
    }

    /// Figures 12 and 18.
    pub(super) fn reduction_b(&self) -> Vec<Path> {
        let [second, middle, third] = self.reduction_b;
        vec![
            Path::new().conv("branch0.0", 256, [1, 1]).reduce("branch0.1", 384),
            Path::new().conv("branch1.0", 256, [1, 1]).reduce("branch1.1", second),
            Path::new()
                .conv("branch2.0", 256, [1, 1])
                .conv("branch2.1", middle, [3, 3])
                .reduce("branch2.2", third),
            Path::pooled(Pool::MaxReduce),
        ]
    }

    /// Figures 13 and 19.
    pub(super) fn block_c(&self) -> Vec<Path> {
        let [alone, first, second, third] = self.c;
        vec![
            Path::new().conv("branch0", alone, [1, 1]),
            Path::new().conv("branch1.0", first, [1, 1]).conv("branch1.1", second, [1, 3]).conv(
                "branch1.2",
                third,
                [3, 1],
            ),
        ]
    }
}

/// A block whose output is scaled and added to its input.
pub(super) struct Residual {
    branches: Block,
    up: Conv2d,
    scale: f64,
    relu: bool,
}

impl Residual {
    /// The block `name` over `channels`, which it leaves as many.
    pub(super) fn new(
        scope: &mut Scope,
        name: &str,
        channels: i64,
        units: &Units,
        paths: &[Path],
        scale: f64,
    ) -> Result<Self, NnError> {
        let mut scope = scope.sub(name);
        let branches = Block::prefixed(&mut scope, "", channels, units, paths)?;
        let up = ConvSpec::same(branches.outputs(), channels, [1, 1]);
        let up = Conv2d::new(&mut scope.sub("conv2d"), up, (units.weight)(&up), Some(units.bias))?;
        Ok(Self { branches, up, scale, relu: true })
    }

    /// `count` blocks, `name.0` and so on.
    pub(super) fn repeat(
        scope: &mut Scope,
        (name, count): (&str, usize),
        channels: i64,
        units: &Units,
        paths: &[Path],
        scale: f64,
    ) -> Result<Vec<Self>, NnError> {
        let mut scope = scope.sub(name);
        (0..count).map(|i| Self::new(&mut scope, &i.to_string(), channels, units, paths, scale)).collect()
    }

    /// The same without a ReLU behind the sum.
    pub(super) fn linear(self) -> Self {
        Self { relu: false, ..self }
    }

    /// [N, channels, H, W] to the same shape.
    pub(super) fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        let added = self.up.forward(&self.branches.forward(x, fwd)?)?;
        let y = added.f_mul_scalar(self.scale)?.f_add(x)?;
        if self.relu { relu(&y) } else { Ok(y) }
    }
}

/// Applies blocks one after the other.
pub(super) fn all(blocks: &[Residual], x: Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
    blocks.iter().try_fold(x, |x, block| block.forward(&x, fwd))
}

/// The body between a stem and the classifier: three sizes with a reduction after each of the first two.
pub(super) struct Body {
    pub(super) a: Vec<Residual>,
    pub(super) reduction_a: Block,
    pub(super) b: Vec<Residual>,
    pub(super) reduction_b: Block,
    pub(super) c: Vec<Residual>,
    /// Channels out.
    pub(super) outputs: i64,
}

impl Body {
    /// A body over `inputs` channels; the names and numbers of the three sizes' blocks are `repeats`.
    pub(super) fn new(
        scope: &mut Scope,
        inputs: i64,
        units: &Units,
        widths: &Widths,
        repeats: [(&str, usize); 3],
        scales: [f64; 3],
    ) -> Result<Self, NnError> {
        let a = Residual::repeat(scope, repeats[0], inputs, units, &widths.block_a(), scales[0])?;
        let reduction_a = Block::new(scope, "mixed_6a", inputs, units, &widths.reduction_a())?;
        let middle = reduction_a.outputs();
        let b = Residual::repeat(scope, repeats[1], middle, units, &widths.block_b(), scales[1])?;
        let reduction_b = Block::new(scope, "mixed_7a", middle, units, &widths.reduction_b())?;
        let outputs = reduction_b.outputs();
        let c = Residual::repeat(scope, repeats[2], outputs, units, &widths.block_c(), scales[2])?;
        Ok(Self { a, reduction_a, b, reduction_b, c, outputs })
    }

    /// [N, inputs, 35, 35] to [N, outputs, 8, 8].
    pub(super) fn forward(&self, x: Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        let x = self.reduction_a.forward(&all(&self.a, x, fwd)?, fwd)?; // 17 × 17
        let x = self.reduction_b.forward(&all(&self.b, x, fwd)?, fwd)?; // 8 × 8
        all(&self.c, x, fwd)
    }
}
