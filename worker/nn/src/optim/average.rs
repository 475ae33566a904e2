//! Averages of the weights over the steps, to evaluate with.
//!
//! The running statistics of batch norms are averaged like weights, as TensorFlow's Inception did with its moving averages:
//! those of the newest weights do not fit averages of older ones.

use super::at_once::is_plain;
use super::pass::{Changes, Elementwise, Real, Work, pass};
use super::trace::{Checksums, checksums};
use super::{of, prefixed};
use crate::error::NnError;
use crate::shim::{values, values_mut};
use crate::vars::{Var, Vars};
use lockstep_common::job::AverageSpec;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

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

    /// Takes in the weights after update `step`, which counts from 0. Returns the checksums of [`state`](Self::state)
    /// before and after, if it `is_traced`; empty ones otherwise.
    pub(super) fn update(
        &mut self,
        vars: &Vars,
        step: u64,
        is_traced: bool,
    ) -> Result<[Checksums; 2], NnError> {
        let weight = new_weight(&self.spec, step);
        // Both have the same names in the same order.
        let mut pairs = self.mean.values().zip(vars.iter());
        let kind = vars.kind();
        let are_plain = pairs.all(|(mean, (_, Var { tensor, .. }))| {
            is_plain(mean, tensor, kind) && is_plain(tensor, tensor, kind)
        });
        match kind {
            Kind::Float if are_plain => Ok(self.sweep::<f32>(vars, weight, is_traced)),
            Kind::Double if are_plain => Ok(self.sweep::<f64>(vars, weight, is_traced)),
            _ => self.update_one_by_one(vars, weight, is_traced),
        }
    }

    fn update_one_by_one(
        &mut self,
        vars: &Vars,
        weight: f64,
        is_traced: bool,
    ) -> Result<[Checksums; 2], NnError> {
        let traced = |average: &Self| match is_traced {
            true => checksums(average.state()),
            false => Ok(Checksums::new()),
        };
        let before = traced(self)?;
        for (name, var) in vars.iter() {
            let mean = of(&mut self.mean, name)?;
            // A weight of 1 must leave nothing of the old value, not even by rounding.
            if weight == 1.0 {
                mean.f_copy_(&var.tensor)?;
            } else {
                let _ = mean.f_lerp_(&var.tensor, weight)?;
            }
        }
        Ok([before, traced(self)?])
    }

    /// One pass over memory by all of rayon's threads.
    fn sweep<T: Real>(&mut self, vars: &Vars, weight: f64, is_traced: bool) -> [Checksums; 2] {
        let rule = Nearer { weight: (weight != 1.0).then(|| T::from_f64(weight)) };
        let mut names = Vec::new();
        let mut all = Vec::new();
        for ((name, mean), (_, var)) in self.mean.iter_mut().zip(vars.iter()) {
            all.push(Work { changed: values_mut(mean), state: [], read: values(&var.tensor), rule });
            names.push(format!("{AVERAGE}.{name}"));
        }
        let changes = pass(all, is_traced);
        let named = || names.iter().zip(&changes);
        [
            named().map(|(name, Changes { changed, .. })| (name.clone(), changed.before)).collect(),
            named().map(|(name, Changes { changed, .. })| (name.clone(), changed.after)).collect(),
        ]
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
        prefixed(AVERAGE, &self.mean)
    }
}

const AVERAGE: &str = "average";

#[derive(Clone, Copy)]
struct Nearer<T> {
    /// `None` for 1, which must leave nothing of the old value, not even by rounding.
    weight: Option<T>,
}

impl<T: Real> Elementwise<T, 0> for Nearer<T> {
    fn apply(self, mean: &mut [T], []: [&mut [T]; 0], value: &[T]) {
        match self.weight {
            None => mean.copy_from_slice(value),
            Some(weight) => mean.iter_mut().zip(value).for_each(|(m, v)| *m = *m + (*v - *m) * weight),
        }
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
    use tch::{Device, no_grad};

    /// The average after each of these values of the only weight, which was 0 at first.
    fn averages(spec: AverageSpec, values: &[f64]) -> Vec<f64> {
        let mut vars = Vars::new("model", 1, Kind::Double, Device::Cpu);
        let _ = vars.root().parameter("weight", &[1], Init::Constant(0.0)).unwrap();
        let mut average = Average::new(spec, &vars).unwrap();
        let mut after = |(step, value): (usize, &f64)| {
            no_grad(|| {
                let mut weight = vars.var("weight").unwrap().tensor.detach();
                let _ = weight.fill_(*value);
                average.update(&vars, step as u64, false).unwrap();
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

    #[test]
    fn one_pass_is_near_libtorchs_operations_and_sees_what_it_found_and_left() {
        for kind in [Kind::Float, Kind::Double] {
            let mut vars = Vars::new("model", 1, kind, Device::Cpu);
            let _ = vars.root().parameter("weight", &[200_003], Init::Normal { std: 1.0 }).unwrap();
            let _ = vars.root().buffer("running_mean", &[5], 1.0).unwrap();
            let spec = AverageSpec::Ema { decay: 0.75, warmup: false };
            let mut averages = [(); 2].map(|()| Average::new(spec.clone(), &vars).unwrap());
            let [one, other] = &mut averages;
            let seen = |average: &Average| checksums(average.state()).unwrap();
            tch::manual_seed(1);
            no_grad(|| {
                for weight in [0.3, 0.7, 1.0] {
                    let _ = vars.var("weight").unwrap().tensor.detach().normal_(0.0, 1.0);
                    let before = seen(one);
                    let trace = match kind {
                        Kind::Float => one.sweep::<f32>(&vars, weight, true),
                        _ => one.sweep::<f64>(&vars, weight, true),
                    };
                    assert_eq!(trace, [before, seen(one)]);
                    let wanted = other.update_one_by_one(&vars, weight, true).unwrap();
                    assert_eq!(wanted[1], seen(other));
                    for (name, mean) in &one.mean {
                        let off = (mean - &other.mean[name]).abs().max().double_value(&[]);
                        // Three roundings of numbers below 16 by half an epsilon in either, and what is left, 0.3 times,
                        // of those before.
                        let epsilon =
                            if kind == Kind::Float { f64::from(f32::EPSILON) } else { f64::EPSILON };
                        let bound = 1.3 * 3.0 * 16.0 * epsilon;
                        assert!(off <= bound, "{name}, {kind:?}, {weight}: {off}");
                        assert!(weight != 1.0 || off == 0.0, "{name}: all of the old value is gone");
                    }
                }
            });
        }
    }
}
