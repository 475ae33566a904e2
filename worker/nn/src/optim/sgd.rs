//! Stochastic gradient descent with momentum, as `torch.optim.SGD` without dampening.
//!
//! On the CPU it is one pass over memory by all of rayon's threads, with the same bits as libtorch's operations one by one.

use super::at_once::AtOnce;
use super::pass::{Elementwise, Real};
use super::{Learning, Rates, not_a_parameter, of, prefixed, zeros};
use crate::error::NnError;
use crate::shim::{Moving, fused_sgd};
use crate::vars::Vars;
use std::collections::BTreeMap;
use tch::Tensor;

#[derive(Debug)]
pub(super) struct Sgd {
    nesterov: bool,
    /// Zero at the start: PyTorch's first buffer, the gradient itself, is momentum · 0 + gradient.
    momentum_buffers: BTreeMap<String, Tensor>,
}

impl Sgd {
    pub(super) fn new(nesterov: bool, vars: &Vars) -> Result<Self, NnError> {
        Ok(Self { nesterov, momentum_buffers: zeros(vars)? })
    }

    /// b ← μ b + (g + λ p), then p ← p − lr · b, or with Nesterov's step p ← p − lr · (g + λ p + μ b).
    pub(super) fn update(&mut self, learning: &mut Learning<'_>, momentum: f64) -> Result<(), NnError> {
        let Learning { name, parameter, gradient, rates } = learning;
        let decayed = rates.with_penalty(gradient, parameter)?;
        let direction = if momentum == 0.0 {
            decayed
        } else {
            let buffer = of(&mut self.momentum_buffers, name)?;
            let _ = buffer.f_mul_scalar_(momentum)?.f_add_(&decayed)?;
            if self.nesterov {
                decayed.f_add(&buffer.f_mul_scalar(momentum)?)?
            } else {
                buffer.shallow_clone()
            }
        };
        let _ = parameter.f_sub_(&direction.f_mul_scalar(rates.lr)?)?;
        Ok(())
    }

    /// The same as [`Self::update`] for all of `learning`, which is on a GPU, in few kernels.
    pub(super) fn update_on_gpu(&self, learning: &[Learning<'_>], momentum: f64) -> Result<(), NnError> {
        let rates = |learning: &Learning<'_>| [learning.rates.lr, learning.rates.weight_decay];
        let mut rest: Vec<_> = learning.iter().collect();
        while let Some(first) = rest.first() {
            let (own, kind) = (rates(first), first.parameter.kind());
            let is_alike = |other: &&Learning<'_>| rates(other) == own && other.parameter.kind() == kind;
            let (alike, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(is_alike);
            rest = others;
            let moving = alike.iter().map(|learning| {
                let momentum_buffer =
                    self.momentum_buffers.get(learning.name).ok_or_else(|| not_a_parameter(learning.name))?;
                Ok(Moving { parameter: &learning.parameter, gradient: learning.gradient, momentum_buffer })
            });
            let moving = moving.collect::<Result<Vec<_>, NnError>>()?;
            let [lr, weight_decay] = own;
            fused_sgd(&moving, lr, weight_decay, momentum, self.nesterov)?;
        }
        Ok(())
    }

    pub(super) fn state(&self) -> BTreeMap<String, Tensor> {
        prefixed(MOMENTUM_BUFFER, &self.momentum_buffers).collect()
    }
}

const MOMENTUM_BUFFER: &str = "momentum_buffer";

/// With the same bits as [`Sgd::update`].
impl AtOnce<1> for Sgd {
    type Step<T: Real> = Descent<T>;

    const STATE: [&'static str; 1] = [MOMENTUM_BUFFER];

    fn parts(&self) -> [&BTreeMap<String, Tensor>; 1] {
        [&self.momentum_buffers]
    }

    fn step<T: Real>(&self, rates: Rates, momentum: f64) -> Descent<T> {
        Descent {
            lr: T::from_f64(rates.lr),
            decay: (rates.weight_decay != 0.0).then(|| T::from_f64(rates.weight_decay)),
            momentum: (momentum != 0.0).then(|| T::from_f64(momentum)),
            nesterov: self.nesterov,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Descent<T> {
    lr: T,
    decay: Option<T>,
    momentum: Option<T>,
    nesterov: bool,
}

impl<T: Real> Elementwise<T, 1> for Descent<T> {
    fn apply(self, parameter: &mut [T], [buffer]: [&mut [T]; 1], gradient: &[T]) {
        // The branches are outside of the loops, so that those become vector code.
        match (self.decay, self.momentum) {
            (None, None) => self.descend(parameter, gradient, buffer, |g, _| g, |d, _| d),
            (Some(decay), None) => self.descend(parameter, gradient, buffer, |g, p| g + p * decay, |d, _| d),
            (None, Some(momentum)) => self.heavy(parameter, gradient, buffer, momentum, |g, _| g),
            (Some(decay), Some(momentum)) => {
                self.heavy(parameter, gradient, buffer, momentum, |g, p| g + p * decay);
            }
        }
    }
}

impl<T: Real> Descent<T> {
    fn heavy(
        self,
        parameter: &mut [T],
        gradient: &[T],
        buffer: &mut [T],
        momentum: T,
        decayed: impl Fn(T, T) -> T,
    ) {
        match self.nesterov {
            false => self.descend(parameter, gradient, buffer, decayed, |d, b| {
                *b = *b * momentum + d;
                *b
            }),
            true => self.descend(parameter, gradient, buffer, decayed, |d, b| {
                *b = *b * momentum + d;
                d + *b * momentum
            }),
        }
    }

    fn descend(
        self,
        parameter: &mut [T],
        gradient: &[T],
        buffer: &mut [T],
        decayed: impl Fn(T, T) -> T,
        direction: impl Fn(T, &mut T) -> T,
    ) {
        for ((p, g), b) in parameter.iter_mut().zip(gradient).zip(buffer) {
            *p = *p - direction(decayed(*g, *p), b) * self.lr;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{learn, vars};
    use super::super::trace::Trace;
    use super::*;
    use crate::checksum::Checksum;
    use crate::optim::trace::checksums;
    use tch::{Device, Kind};

    fn update(vars: &Vars, sgd: &mut Sgd, seed: i64, rates: Rates, momentum: f64, at_once: bool) -> Trace {
        learn(vars, seed, rates, |learning| match at_once {
            true => sgd.update_all(learning, momentum, true).unwrap().unwrap(),
            false => {
                learning.iter_mut().for_each(|learning| sgd.update(learning, momentum).unwrap());
                Trace::default()
            }
        })
    }

    #[test]
    fn one_pass_gives_the_bits_of_libtorchs_operations_and_the_checksums_of_what_it_saw() {
        for kind in [Kind::Float, Kind::Double] {
            for (nesterov, momentum, weight_decay) in [
                (false, 0.9, 5e-4),
                (true, 0.9, 5e-4),
                (false, 0.9, 0.0),
                (false, 0.0, 5e-4),
                (false, 0.0, 0.0),
            ] {
                let rates = Rates { lr: 0.1, weight_decay };
                let (one, other) = (vars(kind), vars(kind));
                let mut sgds = [&one, &other].map(|vars| Sgd::new(nesterov, vars).unwrap());
                for seed in 1..4 {
                    let before = checksums(sgds[0].state()).unwrap();
                    let learnt = checksums(one.iter().map(|(name, var)| (name, &var.tensor))).unwrap();
                    let trace = update(&one, &mut sgds[0], seed, rates, momentum, true);
                    update(&other, &mut sgds[1], seed, rates, momentum, false);
                    let state = sgds[0].state();
                    for (name, var) in one.iter() {
                        let (found, wanted) = (var.tensor.detach(), other.var(name).unwrap().tensor.detach());
                        assert!(
                            found.equal(&wanted),
                            "{name} of {kind:?}, {nesterov} {momentum} {weight_decay}"
                        );
                        let buffer = format!("{MOMENTUM_BUFFER}.{name}");
                        assert!(state[&buffer].equal(&sgds[1].state()[&buffer]), "{buffer}");
                        if name == "still" {
                            assert!(!trace.parameters_after.contains_key(name), "nothing has touched it");
                            continue;
                        }
                        assert_eq!(trace.parameters_before[name], learnt[name], "{name}");
                        assert_eq!(
                            trace.parameters_after[name],
                            Checksum::of_tensor(&found).unwrap(),
                            "{name}"
                        );
                        assert_eq!(trace.state_before[&buffer], before[&buffer], "{buffer}");
                        assert_eq!(trace.state_after[&buffer], Checksum::of_tensor(&state[&buffer]).unwrap());
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_plain_memory_is_left_to_libtorch() {
        let vars = vars(Kind::Float);
        let mut sgd = Sgd::new(false, &vars).unwrap();
        let parameter = vars.var("small").unwrap().tensor.detach();
        for gradient in [
            parameter.to_kind(Kind::Double),
            Tensor::zeros([10], (Kind::Float, Device::Cpu)).slice(0, 0, 10, 2),
        ] {
            let parameter = parameter.shallow_clone();
            let rates = Rates { lr: 0.1, weight_decay: 0.0 };
            let mut learning = [Learning { name: "small", parameter, gradient: &gradient, rates }];
            assert_eq!(sgd.update_all(&mut learning, 0.9, true).unwrap(), None);
        }
    }
}
