//! Updates of all parameters in one [`pass`], for the rules that go element by element.

use super::pass::{Elementwise, Real, Work, pass};
use super::trace::Trace;
use super::{Learning, Rates, not_a_parameter};
use crate::error::NnError;
use crate::shim::{values, values_mut};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// A rule that changes each element of a parameter, and of its `N` tensors of state, by that of the gradient.
pub(super) trait AtOnce<const N: usize> {
    /// What happens to each element.
    type Step<T: Real>: Elementwise<T, N>;

    /// The names of the state's parts, such as `momentum_buffer`.
    const STATE: [&'static str; N];

    /// Those parts, by parameter.
    fn parts(&self) -> [&BTreeMap<String, Tensor>; N];

    /// The step of a parameter that learns at `rates`.
    fn step<T: Real>(&self, rates: Rates, momentum: f64) -> Self::Step<T>;

    /// Updates all of `learning`, if that is on the CPU, of one type and without gaps; `None`, and nothing has changed,
    /// otherwise and for no parameters. The trace is empty unless it is wanted.
    ///
    /// The bits of an update may depend on whether this is `None`, so that must be the same on all ranks: on the CPU reduced
    /// gradients have no gaps anywhere, and neither have parameters and states.
    fn update_all(
        &mut self,
        learning: &mut [Learning<'_>],
        momentum: f64,
        is_traced: bool,
    ) -> Result<Option<Trace>, NnError> {
        let Some(kind) = learning.first().map(|first| first.parameter.kind()) else { return Ok(None) };
        let mut states = Vec::with_capacity(learning.len());
        for Learning { name, parameter, gradient, .. } in &*learning {
            let own = self.parts().map(|part| part.get(*name).map(Tensor::shallow_clone));
            let own: Vec<_> = own.into_iter().flatten().collect();
            let own: [Tensor; N] = own.try_into().map_err(|_| not_a_parameter(name))?;
            if ![parameter, *gradient].into_iter().chain(&own).all(|tensor| is_plain(tensor, parameter, kind))
            {
                return Ok(None);
            }
            states.push(own);
        }
        match kind {
            Kind::Float => Ok(Some(sweep::<f32, Self, N>(self, learning, &mut states, momentum, is_traced))),
            Kind::Double => Ok(Some(sweep::<f64, Self, N>(self, learning, &mut states, momentum, is_traced))),
            _ => Ok(None),
        }
    }
}

fn sweep<T: Real, R: AtOnce<N> + ?Sized, const N: usize>(
    rule: &R,
    learning: &mut [Learning<'_>],
    states: &mut [[Tensor; N]],
    momentum: f64,
    is_traced: bool,
) -> Trace {
    let names: Vec<&str> = learning.iter().map(|learning| learning.name).collect();
    let work =
        learning.iter_mut().zip(states).map(|(Learning { parameter, gradient, rates, .. }, state)| Work {
            changed: values_mut(parameter),
            state: state.each_mut().map(|part| values_mut(part)),
            read: values(gradient),
            rule: rule.step::<T>(*rates, momentum),
        });
    Trace::of(&names, R::STATE, &pass(work.collect(), is_traced))
}

/// Whether `tensor` lies on the CPU without gaps, of the type `kind` and of the shape of `like`.
pub(super) fn is_plain(tensor: &Tensor, like: &Tensor, kind: Kind) -> bool {
    let is_there = tensor.device() == Device::Cpu && tensor.is_contiguous();
    is_there && tensor.kind() == kind && tensor.size() == like.size()
}
