//! How the learning rate and the momentum change: pure functions of the step.

use lockstep_common::job::{OptimizerSpec, ScheduleSpec};
use std::f64::consts::PI;

/// The factor on the learning rate at `step` (from 0) of `total_steps`.
pub fn lr_factor(spec: &ScheduleSpec, step: u64, total_steps: u64, steps_per_epoch: u64) -> f64 {
    let warmup = match spec {
        ScheduleSpec::Constant { warmup_steps }
        | ScheduleSpec::Step { warmup_steps, .. }
        | ScheduleSpec::Milestones { warmup_steps, .. }
        | ScheduleSpec::Polynomial { warmup_steps, .. }
        | ScheduleSpec::Cosine { warmup_steps, .. }
        | ScheduleSpec::Exponential { warmup_steps, .. } => *warmup_steps,
    };
    if step < warmup {
        return (step + 1) as f64 / warmup as f64;
    }
    let epochs = step as f64 / steps_per_epoch.max(1) as f64;
    let progress = (step - warmup) as f64 / total_steps.saturating_sub(warmup).max(1) as f64;
    let progress = progress.min(1.0);
    match *spec {
        ScheduleSpec::Constant { .. } => 1.0,
        ScheduleSpec::Milestones { epochs: ref drops, gamma, .. } => {
            gamma.powi(drops.iter().filter(|drop| **drop <= epochs).count() as i32)
        }
        ScheduleSpec::Polynomial { power, final_factor, .. } => {
            final_factor + (1.0 - final_factor) * (1.0 - progress).powf(power)
        }
        // Rounding must not put off a drop by a step: 0.3 / 0.1 is less than 3.
        ScheduleSpec::Step { every_epochs, gamma, .. } => {
            gamma.powf((epochs / every_epochs * (1.0 + 4.0 * f64::EPSILON)).floor())
        }
        ScheduleSpec::Cosine { final_factor, .. } => {
            final_factor + (1.0 - final_factor) * 0.5 * (1.0 + (PI * progress).cos())
        }
        ScheduleSpec::Exponential { decay, floor, .. } => decay.powf(-(step as f64)).max(floor),
    }
}

/// The momentum at `step`: ramped linearly if the optimizer says so, else constant. `None` for an optimizer
/// that has none.
pub fn momentum(spec: &OptimizerSpec, step: u64) -> Option<f64> {
    match *spec {
        OptimizerSpec::Sgd { momentum, momentum_final: Some(end), momentum_ramp_steps, .. } => {
            let progress = (step as f64 / momentum_ramp_steps.max(1) as f64).min(1.0);
            Some(momentum + (end - momentum) * progress)
        }
        OptimizerSpec::Sgd { momentum, .. } | OptimizerSpec::Rmsprop { momentum, .. } => Some(momentum),
        OptimizerSpec::Adam { .. } | OptimizerSpec::Adamw { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(spec: &ScheduleSpec, expected: &[(u64, f64)]) {
        for &(step, factor) in expected {
            let got = lr_factor(spec, step, 110, 20);
            assert!((got - factor).abs() < 1e-12, "{spec:?} at {step}: {got} instead of {factor}");
        }
    }

    #[test]
    fn factors_at_the_corners_of_each_schedule() {
        check(&ScheduleSpec::Constant { warmup_steps: 0 }, &[(0, 1.0), (500, 1.0)]);
        check(&ScheduleSpec::Constant { warmup_steps: 4 }, &[(0, 0.25), (2, 0.75), (3, 1.0), (4, 1.0)]);
        let step = ScheduleSpec::Step { every_epochs: 2.0, gamma: 0.1, warmup_steps: 0 };
        check(&step, &[(0, 1.0), (39, 1.0), (40, 0.1), (80, 0.01)]);
        let often = ScheduleSpec::Step { every_epochs: 0.1, gamma: 0.5, warmup_steps: 0 };
        check(&often, &[(1, 1.0), (2, 0.5), (5, 0.25), (6, 0.125), (14, 0.5f64.powi(7))]);
        let cosine = ScheduleSpec::Cosine { final_factor: 0.0, warmup_steps: 10 };
        check(&cosine, &[(9, 1.0), (10, 1.0), (60, 0.5), (110, 0.0), (200, 0.0)]);
        let milestones = ScheduleSpec::Milestones { epochs: vec![2.0, 3.5], gamma: 0.1, warmup_steps: 0 };
        check(&milestones, &[(0, 1.0), (39, 1.0), (40, 0.1), (69, 0.1), (70, 0.01), (500, 0.01)]);
        let polynomial = ScheduleSpec::Polynomial { power: 0.5, final_factor: 0.2, warmup_steps: 10 };
        check(&polynomial, &[(10, 1.0), (85, 0.6), (110, 0.2), (200, 0.2)]);
        let exponential = ScheduleSpec::Exponential { decay: 2.0, floor: 0.1, warmup_steps: 0 };
        check(&exponential, &[(0, 1.0), (2, 0.25), (50, 0.1)]);
    }

    #[test]
    fn momentum_ramps_and_stays() {
        let spec = OptimizerSpec::Sgd {
            lr: 0.1,
            momentum: 0.5,
            momentum_final: Some(0.7),
            momentum_ramp_steps: 10,
            nesterov: false,
            weight_decay: 0.0,
            no_decay_norm_bias: false,
            groups: Vec::new(),
        };
        let at = |step| momentum(&spec, step).unwrap();
        assert_eq!((at(0), at(5), at(10), at(1000)), (0.5, 0.6, 0.7, 0.7));
    }
}
