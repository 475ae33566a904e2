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
        /// Parameters that are treated in another way.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        groups: Vec<ParameterGroup>,
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
        /// Parameters that are treated in another way.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        groups: Vec<ParameterGroup>,
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
        /// Parameters that are treated in another way.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        groups: Vec<ParameterGroup>,
    },
    /// RMSProp, of Hinton's lecture, in one of the two forms that the field has.
    Rmsprop {
        /// Learning rate before the schedule.
        lr: f64,
        /// Which form.
        #[serde(default)]
        form: RmspropForm,
        /// Decay of the mean square.
        #[serde(default = "alpha")]
        alpha: f64,
        /// Keeps the root of the mean square away from 0.
        #[serde(default = "eps")]
        eps: f64,
        /// Share of the last update that is kept.
        #[serde(default)]
        momentum: f64,
        /// L2 penalty added to the gradient.
        #[serde(default)]
        weight_decay: f64,
        /// Whether biases and batch-norm parameters are spared from the weight decay.
        #[serde(default)]
        no_decay_norm_bias: bool,
        /// Parameters that are treated in another way.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        groups: Vec<ParameterGroup>,
    },
}

/// The two forms of RMSProp. With the large epsilons of the Inception papers they differ much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RmspropForm {
    /// `torch.optim.RMSprop`: epsilon beside the root, mean square from 0, learning rate outside of the momentum.
    #[default]
    Torch,
    /// TensorFlow's `ApplyRMSProp`, which the Inception papers used: epsilon under the root, mean square from 1, learning
    /// rate inside the momentum.
    Tensorflow,
}

/// Parameters that an optimizer treats in another way than the rest. Of several groups that a parameter fits, the first
/// counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParameterGroup {
    /// Their names, `*` standing for any part: `*.bias`.
    pub parameters: String,
    /// A factor on their learning rate.
    #[serde(default = "one")]
    pub lr_factor: f64,
    /// Their weight decay, whatever the optimizer's is.
    pub weight_decay: Option<f64>,
}

impl ParameterGroup {
    /// Whether `name` is one of them.
    pub fn has(&self, name: &str) -> bool {
        let mut parts = self.parameters.split('*');
        let Some(rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        // Each part at its first place leaves the most for those after it.
        let middle = parts.try_fold(rest, |rest, part| Some(&rest[rest.find(part)? + part.len()..]));
        middle.is_some_and(|rest| rest.ends_with(last))
    }
}

fn one() -> f64 {
    1.0
}
fn alpha() -> f64 {
    0.99
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

/// What every optimizer has.
struct Common<'a> {
    lr: f64,
    weight_decay: f64,
    no_decay_norm_bias: bool,
    groups: &'a [ParameterGroup],
}

impl OptimizerSpec {
    /// The learning rate before the schedule.
    pub fn lr(&self) -> f64 {
        self.common().lr
    }

    /// The L2 penalty or decoupled decay of weights that no group treats in another way.
    pub fn weight_decay(&self) -> f64 {
        self.common().weight_decay
    }

    /// Whether biases and batch-norm parameters are spared from the weight decay.
    pub fn no_decay_norm_bias(&self) -> bool {
        self.common().no_decay_norm_bias
    }

    /// Parameters that are treated in another way.
    pub fn groups(&self) -> &[ParameterGroup] {
        self.common().groups
    }

    fn common(&self) -> Common<'_> {
        match *self {
            Self::Sgd { lr, weight_decay, no_decay_norm_bias, ref groups, .. }
            | Self::Adam { lr, weight_decay, no_decay_norm_bias, ref groups, .. }
            | Self::Adamw { lr, weight_decay, no_decay_norm_bias, ref groups, .. }
            | Self::Rmsprop { lr, weight_decay, no_decay_norm_bias, ref groups, .. } => {
                Common { lr, weight_decay, no_decay_norm_bias, groups }
            }
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
    /// Multiplied by `gamma` after each of the epochs in `epochs`.
    Milestones {
        /// After how many epochs it drops, in ascending order.
        epochs: Vec<f64>,
        /// The factor of each drop.
        gamma: f64,
        /// Steps over which the factor first rises linearly from 1 / `warmup_steps`.
        #[serde(default)]
        warmup_steps: u64,
    },
    /// From 1 to `final_factor` over the steps after the warm-up, as the remaining share to the power `power`.
    Polynomial {
        /// 1 falls linearly, 0.5 slowly at first.
        #[serde(default = "one")]
        power: f64,
        /// Where it ends.
        #[serde(default)]
        final_factor: f64,
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

/// Averages of the weights, with which a job is evaluated; training goes on with the weights themselves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case", deny_unknown_fields)]
pub enum AverageSpec {
    /// The exponential moving average: after each step, `decay` of it is kept.
    Ema {
        /// The share that is kept.
        decay: f64,
        /// Keeps less at first: after step t at most (1 + t) / (10 + t), as TensorFlow's `num_updates` does.
        #[serde(default)]
        warmup: bool,
    },
    /// The mean of all weights after step `from_step` (Polyak and Juditsky 1992); the weights themselves before.
    Polyak {
        /// After how many steps it begins.
        #[serde(default)]
        from_step: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_part_of_a_name() {
        let has = |parameters: &str, name| {
            ParameterGroup { parameters: parameters.to_owned(), lr_factor: 1.0, weight_decay: None }.has(name)
        };
        let fitting = [
            ("*.bias", "conv1.bias"),
            ("fc.*", "fc.weight"),
            ("fc.bias", "fc.bias"),
            ("*", ""),
            ("a*b*b", "abb"),
            ("*b*", "abc"),
            ("a**c", "abc"),
        ];
        for (pattern, name) in fitting {
            assert!(has(pattern, name), "{pattern} has {name}");
        }
        let unfitting = [
            ("*.bias", "conv1.weight"),
            ("fc.*", "a.fc.weight"),
            ("fc.bias", "fc.bias2"),
            ("a*a", "a"),
            ("a*b*b", "ab"),
            ("", "a"),
        ];
        for (pattern, name) in unfitting {
            assert!(!has(pattern, name), "{pattern} does not have {name}");
        }
    }
}
