//! RMSProp (Tieleman and Hinton, lecture 6e, 2012) as `torch.optim.RMSprop` and as TensorFlow's `ApplyRMSProp` has it.
//!
//! On the CPU it is one pass over memory by all of rayon's threads. Its square roots are correctly rounded, those of libtorch's
//! operations one by one are not always.

use super::at_once::AtOnce;
use super::pass::{Elementwise, Real};
use super::{Learning, Rates, of, prefixed};
use crate::error::NnError;
use crate::vars::Vars;
use lockstep_common::job::RmspropForm;
use std::collections::BTreeMap;
use tch::Tensor;

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

    pub(super) fn state(&self) -> BTreeMap<String, Tensor> {
        prefixed(SQUARE_AVG, &self.square_avg)
            .chain(prefixed(MOMENTUM_BUFFER, &self.momentum_buffers))
            .collect()
    }
}

const SQUARE_AVG: &str = "square_avg";
const MOMENTUM_BUFFER: &str = "momentum_buffer";

/// Not always with the bits of [`Rmsprop::update`].
impl AtOnce<2> for Rmsprop {
    type Step<T: Real> = Scaled<T>;

    const STATE: [&'static str; 2] = [SQUARE_AVG, MOMENTUM_BUFFER];

    fn parts(&self) -> [&BTreeMap<String, Tensor>; 2] {
        [&self.square_avg, &self.momentum_buffers]
    }

    fn step<T: Real>(&self, rates: Rates, momentum: f64) -> Scaled<T> {
        Scaled {
            form: self.form,
            lr: T::from_f64(rates.lr),
            decay: (rates.weight_decay != 0.0).then(|| T::from_f64(rates.weight_decay)),
            kept: T::from_f64(self.alpha),
            new: T::from_f64(1.0 - self.alpha),
            eps: T::from_f64(self.eps),
            momentum: (momentum != 0.0).then(|| T::from_f64(momentum)),
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Scaled<T> {
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

impl<T: Real> Elementwise<T, 2> for Scaled<T> {
    fn apply(self, parameter: &mut [T], state: [&mut [T]; 2], gradient: &[T]) {
        let (eps, lr) = (self.eps, self.lr);
        // The branches are outside of the loops, so that those become vector code.
        match self.form {
            RmspropForm::Torch => {
                self.decayed(parameter, state, gradient, |g, s| g / (s.root() + eps), |u| u * lr);
            }
            RmspropForm::Tensorflow => {
                self.decayed(parameter, state, gradient, |g, s| g / (s + eps).root() * lr, |u| u);
            }
        }
    }
}

impl<T: Real> Scaled<T> {
    fn decayed(
        self,
        parameter: &mut [T],
        state: [&mut [T]; 2],
        gradient: &[T],
        scaled: impl Fn(T, T) -> T,
        step: impl Fn(T) -> T,
    ) {
        match self.decay {
            None => self.heavy(parameter, state, gradient, |g, _| g, scaled, step),
            Some(decay) => self.heavy(parameter, state, gradient, |g, p| g + p * decay, scaled, step),
        }
    }

    fn heavy(
        self,
        parameter: &mut [T],
        state: [&mut [T]; 2],
        gradient: &[T],
        decayed: impl Fn(T, T) -> T,
        scaled: impl Fn(T, T) -> T,
        step: impl Fn(T) -> T,
    ) {
        match self.momentum {
            None => self.descend(parameter, state, gradient, decayed, scaled, |u, _| step(u)),
            Some(momentum) => self.descend(parameter, state, gradient, decayed, scaled, |u, b| {
                *b = *b * momentum + u;
                step(*b)
            }),
        }
    }

    fn descend(
        self,
        parameter: &mut [T],
        [square, buffer]: [&mut [T]; 2],
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
    use super::super::samples::{gradients, learn, vars};
    use super::super::trace::{Trace, checksums};
    use super::*;
    use crate::shim::{values, values_mut};
    use tch::Kind;

    fn update(
        vars: &Vars,
        rmsprop: &mut Rmsprop,
        seed: i64,
        rates: Rates,
        momentum: f64,
        at_once: bool,
    ) -> Trace {
        learn(vars, seed, rates, |learning| match at_once {
            true => rmsprop.update_all(learning, momentum, true).unwrap().unwrap(),
            false => {
                learning.iter_mut().for_each(|learning| rmsprop.update(learning, momentum).unwrap());
                Trace::default()
            }
        })
    }

    /// The rule by its formulas, element by element.
    fn formulas<T: Real>(
        form: RmspropForm,
        momentum: f64,
        rates: Rates,
        tensors: [&mut Tensor; 3],
        g: &Tensor,
    ) {
        let [p, s, b] = tensors.map(|tensor| values_mut::<T>(tensor));
        let [lr, decay, kept, alpha, new, eps] =
            [rates.lr, rates.weight_decay, momentum, ALPHA, 1.0 - ALPHA, EPS].map(T::from_f64);
        for (i, g) in values::<T>(g).iter().enumerate() {
            let g = if rates.weight_decay == 0.0 { *g } else { *g + p[i] * decay };
            s[i] = s[i] * alpha + g * g * new;
            let update = match form {
                RmspropForm::Torch => g / (s[i].root() + eps),
                RmspropForm::Tensorflow => g / (s[i] + eps).root() * lr,
            };
            if momentum != 0.0 {
                b[i] = b[i] * kept + update;
            }
            let update = if momentum == 0.0 { update } else { b[i] };
            p[i] = p[i] - if form == RmspropForm::Torch { update * lr } else { update };
        }
    }

    const ALPHA: f64 = 0.9;
    /// Large, so that an update is at most the gradient.
    const EPS: f64 = 1.0;

    fn cases() -> impl Iterator<Item = (Kind, RmspropForm, f64, Rates)> {
        let forms = [RmspropForm::Torch, RmspropForm::Tensorflow];
        let kinds = [Kind::Float, Kind::Double];
        let with = |kind, form| {
            [(0.9, 5e-4), (0.9, 0.0), (0.0, 5e-4), (0.0, 0.0)]
                .map(|(momentum, weight_decay)| (kind, form, momentum, Rates { lr: 0.1, weight_decay }))
        };
        kinds.into_iter().flat_map(move |kind| forms.into_iter().flat_map(move |form| with(kind, form)))
    }

    fn rule(form: RmspropForm, vars: &Vars) -> Rmsprop {
        Rmsprop::new(form, ALPHA, EPS, vars).unwrap()
    }

    #[test]
    fn one_pass_follows_the_formulas_to_the_bit_and_has_the_checksums_of_what_it_saw() {
        for (kind, form, momentum, rates) in cases() {
            let (vars, wanted) = (vars(kind), vars(kind));
            let (mut own, mut other) = (rule(form, &vars), rule(form, &wanted));
            for seed in 1..4 {
                let case = format!("{kind:?}, {form:?} {momentum} {rates:?}, update {seed}");
                let seen = |rule: &Rmsprop| {
                    let parameters = checksums(vars.iter().map(|(name, var)| (name, &var.tensor))).unwrap();
                    let touched = |all: crate::optim::Checksums| {
                        all.into_iter()
                            .filter(|(name, _)| !name.ends_with("still"))
                            .collect::<BTreeMap<_, _>>()
                    };
                    (touched(parameters), touched(checksums(rule.state()).unwrap()))
                };
                let before = seen(&own);
                let trace = update(&vars, &mut own, seed, rates, momentum, true);
                assert_eq!((trace.parameters_before, trace.state_before), before, "{case}");
                assert_eq!((trace.parameters_after, trace.state_after), seen(&own), "{case}");

                for (name, gradient) in gradients(&wanted, seed) {
                    let mut parameter = wanted.var(name).unwrap().tensor.detach();
                    let square = other.square_avg.get_mut(name).unwrap();
                    let tensors = [&mut parameter, square, other.momentum_buffers.get_mut(name).unwrap()];
                    match kind {
                        Kind::Float => formulas::<f32>(form, momentum, rates, tensors, &gradient),
                        _ => formulas::<f64>(form, momentum, rates, tensors, &gradient),
                    }
                }
                for (name, var) in vars.iter() {
                    let wanted = wanted.var(name).unwrap().tensor.detach();
                    assert!(var.tensor.detach().equal(&wanted), "{name} of {case}");
                }
                let wanted = other.state();
                for (name, tensor) in own.state() {
                    assert!(tensor.equal(&wanted[&name]), "{name} of {case}");
                }
            }
        }
    }

    #[test]
    fn one_pass_is_near_libtorchs_operations() {
        // With a decay the squares would depend on parameters that are not quite the same.
        for (kind, form, momentum, rates) in cases().filter(|(.., rates)| rates.weight_decay == 0.0) {
            let (own_vars, other_vars) = (vars(kind), vars(kind));
            let (mut own, mut other) = (rule(form, &own_vars), rule(form, &other_vars));
            for seed in 1..4 {
                update(&own_vars, &mut own, seed, rates, momentum, true);
                update(&other_vars, &mut other, seed, rates, momentum, false);
                let case = format!("{kind:?}, {form:?} {momentum}, update {seed}");
                let off = |found: &Tensor, wanted: &Tensor| (found - wanted).abs().max().double_value(&[]);
                let epsilon = if kind == Kind::Float { f64::from(f32::EPSILON) } else { f64::EPSILON };
                // |g| and |p| are below 8, so an update is too, and a buffer of three below 24. The roots may differ by an
                // epsilon, so each update by three epsilons of itself with its own roundings, and a buffer by those of three
                // and by two roundings of itself each time.
                let bound = 3.0 * (3.0 * 8.0 + 2.0 * 24.0) * epsilon;
                let wanted = other.state();
                for (name, tensor) in own.state() {
                    let bound = if name.starts_with(SQUARE_AVG) { 0.0 } else { bound };
                    assert!(off(&tensor, &wanted[&name]) <= bound, "{name} of {case}");
                }
                // Three times lr of that, and a rounding of itself.
                let bound = 3.0 * (rates.lr * bound + 8.0 * epsilon);
                for (name, var) in own_vars.iter() {
                    let wanted = other_vars.var(name).unwrap().tensor.detach();
                    assert!(off(&var.tensor.detach(), &wanted) <= bound, "{name} of {case}");
                }
            }
        }
    }
}
