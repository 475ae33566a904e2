//! Averages of the weights over the steps, to evaluate with.
//!
//! The running statistics of batch norms are averaged like weights, as TensorFlow's Inception did with its moving averages:
//! those of the newest weights do not fit averages of older ones.

use super::{of, prefixed};
use crate::error::NnError;
use crate::vars::{Var, Vars};
use lockstep_common::job::AverageSpec;
use std::collections::BTreeMap;
use tch::Tensor;

#[derive(Debug)]
pub(super) struct Average {
    spec: AverageSpec,
    /// By parameter or buffer.
    mean: BTreeMap<String, Tensor>,
}

impl Average {
    /// The average of nothing but the initial weights.
    pub(super) fn new(spec: AverageSpec, vars: &Vars) -> Result<Self, NnError> {
        let copy = |(name, var): (&str, &Var)| Ok((name.to_owned(), copy_of(&var.tensor)?));
        Ok(Self { spec, mean: vars.iter().map(copy).collect::<Result<_, NnError>>()? })
    }

    /// Takes in the weights after update `step`, which counts from 0.
    pub(super) fn update(&mut self, vars: &Vars, step: u64) -> Result<(), NnError> {
        let weight = new_weight(&self.spec, step);
        for (name, var) in vars.iter() {
            let mean = of(&mut self.mean, name)?;
            // A weight of 1 must leave nothing of the old value, not even by rounding.
            if weight == 1.0 {
                mean.f_copy_(&var.tensor)?;
            } else {
                let _ = mean.f_lerp_(&var.tensor, weight)?;
            }
        }
        Ok(())
    }

    /// Exchanges the weights of `vars` with their averages.
    pub(super) fn exchange(&mut self, vars: &Vars) -> Result<(), NnError> {
        for (name, var) in vars.iter() {
            let mean = of(&mut self.mean, name)?;
            let weights = copy_of(&var.tensor)?;
            var.tensor.f_detach()?.f_copy_(mean)?;
            mean.f_copy_(&weights)?;
        }
        Ok(())
    }

    pub(super) fn state(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        prefixed("average", &self.mean)
    }
}

fn copy_of(tensor: &Tensor) -> Result<Tensor, NnError> {
    let tensor = tensor.f_detach()?;
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(&tensor)?;
    Ok(copy)
}

/// The share of the weights after update `step` in the new average.
fn new_weight(spec: &AverageSpec, step: u64) -> f64 {
    match *spec {
        AverageSpec::Ema { decay, warmup: false } => 1.0 - decay,
        AverageSpec::Ema { decay, warmup: true } => {
            let t = (step + 1) as f64;
            1.0 - decay.min((1.0 + t) / (10.0 + t))
        }
        AverageSpec::Polyak { from_step } => 1.0 / (step + 1).saturating_sub(from_step).max(1) as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::Init;
    use tch::{Device, Kind, no_grad};

    /// The average after each of these values of the only weight, which was 0 at first.
    fn averages(spec: AverageSpec, values: &[f64]) -> Vec<f64> {
        let mut vars = Vars::new("model", 1, Kind::Double, Device::Cpu);
        let _ = vars.root().parameter("weight", &[1], Init::Constant(0.0)).unwrap();
        let mut average = Average::new(spec, &vars).unwrap();
        let mut after = |(step, value): (usize, &f64)| {
            no_grad(|| {
                let mut weight = vars.var("weight").unwrap().tensor.detach();
                let _ = weight.fill_(*value);
                average.update(&vars, step as u64).unwrap();
                average.mean["weight"].double_value(&[0])
            })
        };
        values.iter().enumerate().map(&mut after).collect()
    }

    fn close(a: &[f64], b: &[f64]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-14)
    }

    #[test]
    fn averages_follow_their_formulas() {
        let plain = averages(AverageSpec::Ema { decay: 0.75, warmup: false }, &[4.0, 4.0]);
        assert!(close(&plain, &[1.0, 1.75]), "{plain:?}");
        // After the first step (1 + 1) / (10 + 1) is kept.
        let warm = averages(AverageSpec::Ema { decay: 0.75, warmup: true }, &[11.0]);
        assert!(close(&warm, &[9.0]), "{warm:?}");
        let mean = averages(AverageSpec::Polyak { from_step: 2 }, &[7.0, 9.0, 1.0, 3.0, 8.0]);
        assert!(close(&mean, &[7.0, 9.0, 1.0, 2.0, 4.0]), "{mean:?}");
    }

    #[test]
    fn an_exchange_and_another_one_change_nothing() {
        let mut vars = Vars::new("model", 1, Kind::Float, Device::Cpu);
        let _ = vars.root().parameter("weight", &[2], Init::Normal { std: 1.0 }).unwrap();
        let _ = vars.root().buffer("running_mean", &[2], 1.0).unwrap();
        let names = ["weight", "running_mean"];
        let values = || names.map(|name| vars.var(name).unwrap().tensor.detach().copy());
        let same = |a: &[Tensor], b: &[Tensor]| a.iter().zip(b).all(|(a, b)| a.equal(b));
        let mut average = Average::new(AverageSpec::Polyak { from_step: 0 }, &vars).unwrap();
        let before = values();
        let learn = |name| vars.var(name).unwrap().tensor.detach().f_mul_scalar_(3.0).map(drop);
        no_grad(|| names.map(|name| learn(name).unwrap()));
        let learnt = values();
        no_grad(|| average.exchange(&vars)).unwrap();
        assert!(same(&values(), &before), "statistics too belong to the average");
        no_grad(|| average.exchange(&vars)).unwrap();
        assert!(same(&values(), &learnt) && average.mean["weight"].equal(&before[0]));
    }
}
