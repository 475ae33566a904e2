//! Optimizers and learning-rate schedules as a job file names them.

use serde::{Deserialize, Serialize};

/// An optimizer and its settings. The update rules are PyTorch's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case", deny_unknown_fields)]
pub enum OptimizerSpec {
    /// Stochastic gradient descent.
    Sgd {
        /// Learning rate before the schedule.
        lr: f64,
        /// Share of the last update that is kept.
        #[serde(default)]
        momentum: f64,
        /// Where the momentum ends when it is ramped, linearly over `momentum_ramp_steps`.
        #[serde(default)]
        momentum_final: Option<f64>,
        /// Steps of the momentum ramp.
        #[serde(default)]
        momentum_ramp_steps: u64,
        /// Looks ahead along the momentum.
        #[serde(default)]
        nesterov: bool,
        /// L2 penalty added to the gradient.
        #[serde(default)]
        weight_decay: f64,
        /// Whether biases and batch-norm parameters are spared from the weight decay.
        #[serde(default)]
        no_decay_norm_bias: bool,
    },
    /// Adam; the weight decay is added to the gradient.
    Adam {
        /// Learning rate before the schedule.
        lr: f64,
        /// Decay of the first moment.
        #[serde(default = "beta1")]
        beta1: f64,
        /// Decay of the second moment.
        #[serde(default = "beta2")]
        beta2: f64,
        /// Added to the root of the second moment.
        #[serde(default = "eps")]
        eps: f64,
        /// L2 penalty added to the gradient.
        #[serde(default)]
        weight_decay: f64,
        /// Whether biases and batch-norm parameters are spared from the weight decay.
        #[serde(default)]
        no_decay_norm_bias: bool,
    },
    /// AdamW; the weight decay acts on the weights, apart from the gradient.
    Adamw {
        /// Learning rate before the schedule.
        lr: f64,
        /// Decay of the first moment.
        #[serde(default = "beta1")]
        beta1: f64,
        /// Decay of the second moment.
        #[serde(default = "beta2")]
        beta2: f64,
        /// Added to the root of the second moment.
        #[serde(default = "eps")]
        eps: f64,
        /// Decoupled weight decay.
        #[serde(default = "adamw_decay")]
        weight_decay: f64,
        /// Whether biases and batch-norm parameters are spared from the weight decay.
        #[serde(default)]
        no_decay_norm_bias: bool,
    },
}

fn beta1() -> f64 {
    0.9
}
fn beta2() -> f64 {
    0.999
}
fn eps() -> f64 {
    1e-8
}
fn adamw_decay() -> f64 {
    1e-2
}

impl OptimizerSpec {
    /// The learning rate before the schedule.
    pub fn lr(&self) -> f64 {
        match self {
            Self::Sgd { lr, .. } | Self::Adam { lr, .. } | Self::Adamw { lr, .. } => *lr,
        }
    }
}

/// How the learning rate changes: a factor for each step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ScheduleSpec {
    /// Always 1.
    Constant {
        /// Steps over which the factor first rises linearly from 1 / `warmup_steps`.
        #[serde(default)]
        warmup_steps: u64,
    },
    /// Multiplied by `gamma` after every `every_epochs`.
    Step {
        /// Epochs between two drops.
        every_epochs: f64,
        /// The factor of each drop.
        gamma: f64,
        /// Steps over which the factor first rises linearly from 1 / `warmup_steps`.
        #[serde(default)]
        warmup_steps: u64,
    },
    /// Half a cosine from 1 to `final_factor` over the steps after the warm-up.
    Cosine {
        /// Where it ends.
        #[serde(default)]
        final_factor: f64,
        /// Steps over which the factor first rises linearly from 1 / `warmup_steps`.
        #[serde(default)]
        warmup_steps: u64,
    },
    /// Divided by `decay` after every step, never below `floor`.
    Exponential {
        /// The divisor of one step, slightly above 1.
        decay: f64,
        /// The smallest factor.
        #[serde(default)]
        floor: f64,
        /// Steps over which the factor first rises linearly from 1 / `warmup_steps`.
        #[serde(default)]
        warmup_steps: u64,
    },
}

impl Default for ScheduleSpec {
    fn default() -> Self {
        Self::Constant { warmup_steps: 0 }
    }
}
