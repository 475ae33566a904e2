//! What the rules are tested with.

use super::pass::{BLOCK, PIECE};
use super::{Learning, Rates};
use crate::init::Init;
use crate::vars::Vars;
use tch::{Device, Kind, Tensor, no_grad};

/// Parameters of which one has several pieces and a last row that is not whole, and one that never gets a gradient, `still`.
pub(super) fn vars(kind: Kind) -> Vars {
    let mut vars = Vars::new("model", 3, kind, Device::Cpu);
    for (name, size) in [("large", 2 * PIECE + BLOCK + 21), ("small", 5), ("still", 4)] {
        let _ = vars.root().parameter(name, &[size as i64], Init::Normal { std: 1.0 }).unwrap();
    }
    vars
}

/// Gradients of two of them.
pub(super) fn gradients(vars: &Vars, seed: i64) -> [(&'static str, Tensor); 2] {
    tch::manual_seed(seed);
    ["small", "large"].map(|name| (name, vars.var(name).unwrap().tensor.detach().randn_like()))
}

/// Runs `update` on those of `seed`.
pub(super) fn learn<R>(
    vars: &Vars,
    seed: i64,
    rates: Rates,
    update: impl FnOnce(&mut [Learning<'_>]) -> R,
) -> R {
    let gradients = gradients(vars, seed);
    let learning = gradients.iter().map(|(name, gradient)| {
        let parameter = vars.var(name).unwrap().tensor.detach();
        Learning { name, parameter, gradient, rates }
    });
    let mut learning: Vec<_> = learning.collect();
    no_grad(|| update(&mut learning))
}
