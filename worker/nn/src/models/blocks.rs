//! What the Inception networks are built of: paths of convolutions over one input, their outputs side by side.
//!
//! An architecture's file says which paths a block has; channels are counted here.

use crate::error::NnError;
use crate::forward::Forward;
use crate::layers::{ConvNorm, ConvSpec, Units, avg_pool_around, max_pool, max_pool_around};
use crate::vars::Scope;
use tch::Tensor;

/// A pooling at the head of a path.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pool {
    /// The mean of 3 × 3 values; the zeros beyond the edge count.
    AverageWithEdge,
    /// The mean of 3 × 3 values, of those within the image.
    Average,
    /// The largest of 3 × 3 values.
    Max,
    /// The largest of 3 × 3 values at every second position, windows within the image.
    MaxReduce,
    /// The largest of 3 × 3 values at every second position; its output has the size that a 3 × 3 convolution with
    /// stride 2 and padding 1 has.
    MaxReduceCeil,
}

impl Pool {
    fn forward(self, x: &Tensor) -> Result<Tensor, NnError> {
        match self {
            Self::AverageWithEdge => avg_pool_around(x, true),
            Self::Average => avg_pool_around(x, false),
            Self::Max => max_pool_around(x),
            Self::MaxReduce => max_pool(x, 3, 2),
            Self::MaxReduceCeil => max_pool(&pad_for_windows(x)?, 3, 2),
        }
    }
}

/// Adds values that no maximum takes below and on the right, so that a 3 × 3 window begins at every second position.
fn pad_for_windows(x: &Tensor) -> Result<Tensor, NnError> {
    let (height, width) = (x.size()[2], x.size()[3]);
    let missing = |side: i64| if side % 2 == 0 { 1 } else { 2 };
    let padding = [0, missing(width), 0, missing(height)];
    Ok(x.f_pad(padding, "constant", f64::NEG_INFINITY)?)
}

/// One convolution of a path; its inputs are the outputs of what comes before it.
#[derive(Clone, Copy, Debug)]
struct Step {
    name: &'static str,
    outputs: i64,
    kernel: [i64; 2],
    stride: i64,
    /// Whether zeros keep the size.
    same: bool,
}

impl Step {
    fn spec(&self, inputs: i64) -> ConvSpec {
        let shape = if self.same { ConvSpec::same } else { ConvSpec::valid };
        shape(inputs, self.outputs, self.kernel).stride(self.stride)
    }
}

/// What a path of a block does, before it has variables.
#[derive(Clone, Debug, Default)]
pub(super) struct Path {
    pool: Option<Pool>,
    chain: Vec<Step>,
    fork: Vec<Step>,
}

impl Path {
    /// A path that begins with the block's input.
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// A path that begins with a pooling of the block's input.
    pub(super) fn pooled(pool: Pool) -> Self {
        Self { pool: Some(pool), ..Self::default() }
    }

    /// A convolution that keeps the size.
    pub(super) fn conv(self, name: &'static str, outputs: i64, kernel: [i64; 2]) -> Self {
        self.step(Step { name, outputs, kernel, stride: 1, same: true })
    }

    /// A 3 × 3 convolution without padding.
    pub(super) fn valid(self, name: &'static str, outputs: i64) -> Self {
        self.step(Step { name, outputs, kernel: [3, 3], stride: 1, same: false })
    }

    /// A 3 × 3 convolution with stride 2 without padding.
    pub(super) fn reduce(self, name: &'static str, outputs: i64) -> Self {
        self.step(Step { name, outputs, kernel: [3, 3], stride: 2, same: false })
    }

    /// A 3 × 3 convolution with stride 2 and padding 1.
    pub(super) fn reduce_same(self, name: &'static str, outputs: i64) -> Self {
        self.step(Step { name, outputs, kernel: [3, 3], stride: 2, same: true })
    }

    /// 1 × 3 and 3 × 1 convolutions of the same values, side by side, at the end of the path.
    pub(super) fn fork(mut self, wide: &'static str, high: &'static str, outputs: i64) -> Self {
        for (name, kernel) in [(wide, [1, 3]), (high, [3, 1])] {
            self.fork.push(Step { name, outputs, kernel, stride: 1, same: true });
        }
        self
    }

    fn step(mut self, step: Step) -> Self {
        self.chain.push(step);
        self
    }

    fn outputs(&self, inputs: i64) -> i64 {
        if self.fork.is_empty() {
            self.chain.last().map_or(inputs, |step| step.outputs)
        } else {
            self.fork.iter().map(|step| step.outputs).sum()
        }
    }

    fn build(&self, scope: &mut Scope, prefix: &str, inputs: i64, units: &Units) -> Result<Branch, NnError> {
        let mut unit = |step: &Step, channels| {
            ConvNorm::new(scope, &format!("{prefix}{}", step.name), step.spec(channels), units)
        };
        let mut channels = inputs;
        let mut chain = Vec::new();
        for step in &self.chain {
            chain.push(unit(step, channels)?);
            channels = step.outputs;
        }
        let fork = self.fork.iter().map(|step| unit(step, channels));
        Ok(Branch { pool: self.pool, chain, fork: fork.collect::<Result<_, _>>()? })
    }
}

struct Branch {
    pool: Option<Pool>,
    chain: Vec<ConvNorm>,
    fork: Vec<ConvNorm>,
}

impl Branch {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        let x = match self.pool {
            Some(pool) => pool.forward(x)?,
            None => x.shallow_clone(),
        };
        let x = chain(&self.chain, x, fwd)?;
        if self.fork.is_empty() {
            return Ok(x);
        }
        let both: Result<Vec<_>, _> = self.fork.iter().map(|conv| conv.forward(&x, fwd)).collect();
        Ok(Tensor::f_cat(&both?, 1)?)
    }
}

/// Applies units one after the other.
pub(super) fn chain(units: &[ConvNorm], x: Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
    units.iter().try_fold(x, |x, unit| unit.forward(&x, fwd))
}

/// Paths over one input, their outputs side by side.
pub(super) struct Block {
    branches: Vec<Branch>,
    outputs: i64,
}

impl Block {
    /// The block `name` below `scope` over `inputs` channels.
    pub(super) fn new(
        scope: &mut Scope,
        name: &str,
        inputs: i64,
        units: &Units,
        paths: &[Path],
    ) -> Result<Self, NnError> {
        Self::prefixed(&mut scope.sub(name), "", inputs, units, paths)
    }

    /// The block at `scope` over `inputs` channels, every convolution's name behind `prefix`.
    pub(super) fn prefixed(
        scope: &mut Scope,
        prefix: &str,
        inputs: i64,
        units: &Units,
        paths: &[Path],
    ) -> Result<Self, NnError> {
        let branches = paths.iter().map(|path| path.build(scope, prefix, inputs, units));
        Ok(Self {
            branches: branches.collect::<Result<_, _>>()?,
            outputs: paths.iter().map(|path| path.outputs(inputs)).sum(),
        })
    }

    /// Channels out.
    pub(super) fn outputs(&self) -> i64 {
        self.outputs
    }

    /// [N, inputs, H, W] to [N, outputs, H', W'].
    pub(super) fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        let branches: Result<Vec<_>, _> = self.branches.iter().map(|b| b.forward(x, fwd)).collect();
        Ok(Tensor::f_cat(&branches?, 1)?)
    }
}
