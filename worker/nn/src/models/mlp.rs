//! A multilayer perceptron with two hidden layers.

use super::{Model, ModelInfo, OptionInfo, Output, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::init::Init;
use crate::layers::{BatchNorm, Linear, dropout, relu};
use crate::vars::Scope;
use lockstep_common::job::{ModelRole, ModelSpec};
use tch::Tensor;

pub(super) const INFO: ModelInfo = ModelInfo {
    name: "mlp",
    summary: "Two hidden layers with ReLU, optional batch norm and dropout",
    role: ModelRole::Classifier,
    input: "[N, ...] with `inputs` values a row",
    reference: "this project",
    options: &[
        OptionInfo { name: "classes", default: "10", meaning: "logits" },
        OptionInfo { name: "inputs", default: "784", meaning: "values of one sample" },
        OptionInfo { name: "hidden", default: "256", meaning: "units of each hidden layer" },
        OptionInfo { name: "dropout", default: "0", meaning: "share of hidden values dropped" },
    ],
    build,
};

struct Mlp {
    hidden: Vec<(Linear, Option<BatchNorm>)>,
    last: Linear,
    keep: f64,
}

fn build(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let inputs = options::numbers(spec)?;
    let units = options::count(spec, "hidden", 256)?;
    let mut hidden = Vec::new();
    for (i, inputs) in [inputs, units].into_iter().enumerate() {
        let init = Init::fan_in(inputs);
        let linear = Linear::new(&mut scope.sub(&format!("fc{}", i + 1)), inputs, units, init, init)?;
        hidden.push((
            linear,
            BatchNorm::new(&mut scope.sub(&format!("bn{}", i + 1)), units, spec.batch_norm, true)?,
        ));
    }
    let init = Init::fan_in(units);
    let last = Linear::new(&mut scope.sub("fc3"), units, options::count(spec, "classes", 10)?, init, init)?;
    Ok(Box::new(Mlp { hidden, last, keep: 1.0 - options::drop_rate(spec, "dropout", 0.0)? }))
}

impl Model for Mlp {
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        let mut x = x.f_flatten(1, -1)?;
        for (i, (linear, norm)) in self.hidden.iter().enumerate() {
            let y = linear.forward(&x)?;
            let y = match norm {
                Some(norm) => norm.forward(&y, fwd)?,
                None => relu(&y)?,
            };
            x = dropout(&y, self.keep, &format!("dropout{}", i + 1), fwd)?;
        }
        Ok(self.last.forward(&x)?.into())
    }
}
