//! RMSProp (Tieleman and Hinton, lecture 6e, 2012) as `torch.optim.RMSprop` and as TensorFlow's `ApplyRMSProp` has it.
//!
//! On the CPU it is one pass over memory by all of rayon's threads. Its square roots are correctly rounded, those of libtorch's
//! operations one by one are not always.

use super::pass::{Real, Row, Rule, pass};
use super::trace::Trace;
use super::{Learning, by_name, of, plain_kind, prefixed};
use crate::error::NnError;
use crate::shim::{values, values_mut};
use crate::vars::Vars;
use lockstep_common::job::RmspropForm;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(super) struct Rmsprop {
    form: RmspropForm,
    alpha: f64,
    eps: f64,
    square_avg: BTreeMap<String, Tensor>,
    momentum_buffers: BTreeMap<String, Tensor>,
}

impl Rmsprop {
    pub(super) fn new(form: RmspropForm, alpha: f64, eps: f64, vars: &Vars) -> Result<Self, NnError> {
        let square = |tensor: &Tensor| match form {
            RmspropForm::Torch => tensor.f_zeros_like(),
            RmspropForm::Tensorflow => tensor.f_ones_like(),
        };
        let squares = vars.parameters().map(|(name, var)| Ok((name.to_owned(), square(&var.tensor)?)));
        Ok(Self {
            form,
            alpha,
            eps,
            square_avg: squares.collect::<Result<_, NnError>>()?,
            momentum_buffers: super::zeros(vars)?,
        })
    }

    /// With s ← α s + (1 − α) g²:
    ///
    /// - PyTorch: b ← μ b + g / (√s + ε), p ← p − lr · b
    /// - TensorFlow: b ← μ b + lr · g / √(s + ε), p ← p − b
    pub(super) fn update(&mut self, learning: &mut Learning<'_>, momentum: f64) -> Result<(), NnError> {
        let Learning { name, parameter, gradient, rates } = learning;
        let g = rates.with_penalty(gradient, parameter)?;
        let square = of(&mut self.square_avg, name)?;
        let _ = square.f_mul_scalar_(self.alpha)?.f_add_(&g.f_square()?.f_mul_scalar(1.0 - self.alpha)?)?;
        let (root, inside, outside) = match self.form {
            RmspropForm::Torch => (square.f_sqrt()?.f_add_scalar(self.eps)?, 1.0, rates.lr),
            RmspropForm::Tensorflow => (square.f_add_scalar(self.eps)?.f_sqrt()?, rates.lr, 1.0),
        };
        let update = g.f_div(&root)?.f_mul_scalar(inside)?;
        let update = if momentum == 0.0 {
            update
        } else {
            let buffer = of(&mut self.momentum_buffers, name)?;
            let _ = buffer.f_mul_scalar_(momentum)?.f_add_(&update)?;
            buffer.shallow_clone()
        };
        let _ = parameter.f_sub_(&update.f_mul_scalar(outside)?)?;
        Ok(())
    }

    /// The same as [`Self::update`] for all of `learning` at once, if that is on the CPU, of one kind and without gaps;
    /// `None`, and nothing has changed, otherwise. The trace is empty unless it is wanted.
    pub(super) fn update_all(
        &mut self,
        learning: &mut [Learning<'_>],
        momentum: f64,
        is_traced: bool,
    ) -> Result<Option<Trace>, NnError> {
        match plain_kind(learning, &[&self.square_avg, &self.momentum_buffers])? {
            Some(Kind::Float) => Ok(Some(self.sweep::<f32>(learning, momentum, is_traced))),
            Some(Kind::Double) => Ok(Some(self.sweep::<f64>(learning, momentum, is_traced))),
            _ => Ok(None),
        }
    }

    fn sweep<T: Real>(&mut self, learning: &mut [Learning<'_>], momentum: f64, is_traced: bool) -> Trace {
        let mut by_name = by_name(learning);
        let mut names = Vec::new();
        let mut rows = Vec::new();
        // Both have the same names in the same order.
        for ((name, square), buffer) in self.square_avg.iter_mut().zip(self.momentum_buffers.values_mut()) {
            let Some(Learning { parameter, gradient, rates, .. }) = by_name.remove(name.as_str()) else {
                continue;
            };
            let rule = Scaled {
                form: self.form,
                lr: T::from_f64(rates.lr),
                decay: (rates.weight_decay != 0.0).then(|| T::from_f64(rates.weight_decay)),
                kept: T::from_f64(self.alpha),
                new: T::from_f64(1.0 - self.alpha),
                eps: T::from_f64(self.eps),
                momentum: (momentum != 0.0).then(|| T::from_f64(momentum)),
            };
            let changed = [values_mut(parameter), values_mut(square), values_mut(buffer)];
            rows.push(Row { changed, read: values(gradient), rule });
            names.push(name.as_str());
        }
        let changes = pass(rows, is_traced);
        let changes = changes.iter().map(|[parameter, square, buffer]| (parameter, [square, buffer]));
        Trace::of(&names, [SQUARE_AVG, MOMENTUM_BUFFER], changes)
    }

    pub(super) fn state(&self) -> BTreeMap<String, Tensor> {
        prefixed(SQUARE_AVG, &self.square_avg)
            .chain(prefixed(MOMENTUM_BUFFER, &self.momentum_buffers))
            .collect()
    }
}

const SQUARE_AVG: &str = "square_avg";
const MOMENTUM_BUFFER: &str = "momentum_buffer";

#[derive(Clone, Copy)]
struct Scaled<T> {
    form: RmspropForm,
    lr: T,
    decay: Option<T>,
    /// α
    kept: T,
    /// 1 − α
    new: T,
    eps: T,
    momentum: Option<T>,
}

impl<T: Real> Rule<T, 3> for Scaled<T> {
    fn apply(self, changed: [&mut [T]; 3], gradient: &[T]) {
        let (eps, lr) = (self.eps, self.lr);
        // The branches are outside of the loops, so that those become vector code.
        match self.form {
            RmspropForm::Torch => self.decayed(changed, gradient, |g, s| g / (s.root() + eps), |u| u * lr),
            RmspropForm::Tensorflow => {
                self.decayed(changed, gradient, |g, s| g / (s + eps).root() * lr, |u| u)
            }
        }
    }
}

impl<T: Real> Scaled<T> {
    fn decayed(
        self,
        changed: [&mut [T]; 3],
        gradient: &[T],
        scaled: impl Fn(T, T) -> T,
        step: impl Fn(T) -> T,
    ) {
        match self.decay {
            None => self.heavy(changed, gradient, |g, _| g, scaled, step),
            Some(decay) => self.heavy(changed, gradient, |g, p| g + p * decay, scaled, step),
        }
    }

    fn heavy(
        self,
        changed: [&mut [T]; 3],
        gradient: &[T],
        decayed: impl Fn(T, T) -> T,
        scaled: impl Fn(T, T) -> T,
        step: impl Fn(T) -> T,
    ) {
        match self.momentum {
            None => self.descend(changed, gradient, decayed, scaled, |u, _| step(u)),
            Some(momentum) => self.descend(changed, gradient, decayed, scaled, |u, b| {
                *b = *b * momentum + u;
                step(*b)
            }),
        }
    }

    fn descend(
        self,
        [parameter, square, buffer]: [&mut [T]; 3],
        gradient: &[T],
        decayed: impl Fn(T, T) -> T,
        scaled: impl Fn(T, T) -> T,
        step: impl Fn(T, &mut T) -> T,
    ) {
        for (((p, g), s), b) in parameter.iter_mut().zip(gradient).zip(square).zip(buffer) {
            let g = decayed(*g, *p);
            *s = *s * self.kept + g * g * self.new;
            *p = *p - step(scaled(g, *s), b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Rates;
    use super::super::pass::{BLOCK, PIECE};
    use super::super::trace::checksums;
    use super::*;
    use crate::init::Init;
    use tch::{Device, no_grad};

    /// Parameters of which one has several pieces and a last row that is not whole.
    fn vars(kind: Kind) -> Vars {
        let mut vars = Vars::new("model", 3, kind, Device::Cpu);
        for (name, size) in [("large", 2 * PIECE + BLOCK + 21), ("small", 5), ("still", 4)] {
            let _ = vars.root().parameter(name, &[size as i64], Init::Normal { std: 1.0 }).unwrap();
        }
        vars
    }

    fn update(
        vars: &Vars,
        rmsprop: &mut Rmsprop,
        seed: i64,
        rates: Rates,
        momentum: f64,
        at_once: bool,
    ) -> Trace {
        tch::manual_seed(seed);
        let gradients =
            ["small", "large"].map(|name| (name, vars.var(name).unwrap().tensor.detach().randn_like()));
        let mut learning: Vec<_> = gradients
            .iter()
            .map(|(name, gradient)| {
                let parameter = vars.var(name).unwrap().tensor.detach();
                Learning { name, parameter, gradient, rates }
            })
            .collect();
        no_grad(|| match at_once {
            true => rmsprop.update_all(&mut learning, momentum, true).unwrap().unwrap(),
            false => {
                learning.iter_mut().for_each(|learning| rmsprop.update(learning, momentum).unwrap());
                Trace::default()
            }
        })
    }

    #[test]
    fn one_pass_does_what_libtorchs_operations_do_and_has_the_checksums_of_what_it_saw() {
        let forms = [RmspropForm::Torch, RmspropForm::Tensorflow];
        let cases = forms.iter().flat_map(|form| [(form, 0.9, 5e-4), (form, 0.9, 0.0), (form, 0.0, 5e-4)]);
        for (kind, (form, momentum, weight_decay)) in
            [Kind::Float, Kind::Double].iter().flat_map(|kind| cases.clone().map(move |case| (*kind, case)))
        {
            let rates = Rates { lr: 0.1, weight_decay };
            let (one, other) = (vars(kind), vars(kind));
            let mut rules = [&one, &other].map(|vars| Rmsprop::new(*form, 0.9, 1.0, vars).unwrap());
            for seed in 1..4 {
                let before = checksums(rules[0].state()).unwrap();
                let learnt = checksums(one.iter().map(|(name, var)| (name, &var.tensor))).unwrap();
                let trace = update(&one, &mut rules[0], seed, rates, momentum, true);
                update(&other, &mut rules[1], seed, rates, momentum, false);
                let case = format!("{kind:?}, {form:?} {momentum} {weight_decay}, update {seed}");
                let (state, wanted) = (rules[0].state(), rules[1].state());
                let pairs = one.iter().map(|(name, var)| {
                    (name.to_owned(), var.tensor.detach(), other.var(name).unwrap().tensor.detach())
                });
                let pairs =
                    pairs.chain(state.iter().map(|(name, t)| (name.clone(), t.copy(), wanted[name].copy())));
                for (name, found, wanted) in pairs {
                    let off = (&found - &wanted).abs().max().double_value(&[]);
                    // An ε of 1 keeps an update below lr · |g| < 1, and the parameters are below 8. Each of three updates has
                    // four roundings that may differ, of the root, the quotient, the product and the sum in the buffer,
                    // which reach the parameter up to three times, beside its own.
                    let ulp = if kind == Kind::Float { f64::from(f32::EPSILON) } else { f64::EPSILON };
                    let bound =
                        if name.starts_with(SQUARE_AVG) { 0.0 } else { 3.0 * (3.0 * 4.0 + 8.0) * ulp };
                    assert!(off <= bound, "{name} of {case}: {off}");
                }
                let touched = |all: crate::optim::Checksums| {
                    all.into_iter().filter(|(name, _)| !name.ends_with("still")).collect::<BTreeMap<_, _>>()
                };
                let left = checksums(one.iter().map(|(name, var)| (name, &var.tensor))).unwrap();
                assert_eq!(trace.parameters_before, touched(learnt), "{case}");
                assert_eq!(trace.parameters_after, touched(left), "{case}");
                assert_eq!(trace.state_before, touched(before), "{case}");
                assert_eq!(trace.state_after, touched(checksums(state).unwrap()), "{case}");
            }
        }
    }
}
