//! The networks of the first generative adversarial nets (Goodfellow et al. 2014), after
//! `goodfeli/adversarial`, `mnist.yaml`. Neither has batch norm.
//!
//! One deviation: the reference starts the generator's last bias at the logit of each pixel's mean over the
//! training set; here it starts at 0, because a network's initial values depend on the job file alone.

use super::{Model, ModelInfo, OptionInfo, Output, options};
use crate::error::NnError;
use crate::forward::Forward;
use crate::init::Init;
use crate::layers::{Linear, Maxout, dropout, relu};
use crate::vars::Scope;
use lockstep_common::job::{ModelRole, ModelSpec};
use lockstep_common::rng::Stream;
use tch::{Kind, Tensor};

pub(super) const GENERATOR: ModelInfo = ModelInfo {
    name: "gan-generator",
    summary: "The first GAN's generator: two hidden ReLU layers, sigmoid output",
    role: ModelRole::Generator,
    input: "[N, latent], uniform with variance 1",
    reference: "Goodfellow et al. 2014, arXiv:1406.2661; goodfeli/adversarial",
    options: &[
        OptionInfo { name: "latent", default: "100", meaning: "length of the latent vectors" },
        OptionInfo { name: "hidden", default: "1200", meaning: "units of each hidden layer" },
        OptionInfo { name: "outputs", default: "784", meaning: "pixels of one image" },
    ],
    build: build_generator,
};

pub(super) const DISCRIMINATOR: ModelInfo = ModelInfo {
    name: "gan-discriminator",
    summary: "The first GAN's discriminator: two maxout layers with dropout, one logit",
    role: ModelRole::Discriminator,
    input: "[N, ...] with `inputs` values a row",
    reference: "Goodfellow et al. 2014, arXiv:1406.2661; goodfeli/adversarial",
    options: &[
        OptionInfo { name: "inputs", default: "784", meaning: "pixels of one image" },
        OptionInfo { name: "hidden", default: "240", meaning: "units of each maxout layer" },
        OptionInfo { name: "pieces", default: "5", meaning: "linear pieces of each maxout unit" },
        OptionInfo {
            name: "dropout",
            default: "0.5",
            meaning: "share dropped of each hidden layer; 0.2 of the input",
        },
    ],
    build: build_discriminator,
};

/// The default length of a latent vector.
pub const LATENT: i64 = 100;

/// Latent vectors [samples, `length`], uniform in ±√3, so with variance 1. Row i depends on the seed, the step,
/// the phase and `samples[i]` alone.
pub fn latent(
    seed: u64,
    step: u64,
    phase: u16,
    samples: &[u64],
    length: i64,
    kind: Kind,
) -> Result<Tensor, NnError> {
    let bound = 3f64.sqrt();
    let mut values = Vec::with_capacity(samples.len() * length as usize);
    for &sample in samples {
        let mut stream = Stream::new(seed, "gan latent", &[step, u64::from(phase), sample]);
        values.extend((0..length).map(|_| stream.uniform_in(-bound, bound)));
    }
    Ok(Tensor::f_from_slice(&values)?.f_reshape([samples.len() as i64, length])?.f_to_kind(kind)?)
}

struct Generator {
    hidden: [Linear; 2],
    last: Linear,
}

fn build_generator(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let latent = options::count(spec, "latent", LATENT)?;
    let hidden = options::count(spec, "hidden", 1200)?;
    let outputs = options::numbers(spec)?;
    let mut linear = |name, inputs, outputs| {
        let weight = Init::Uniform { bound: 0.05 };
        Linear::new(&mut scope.sub(name), inputs, outputs, weight, Init::Constant(0.0))
    };
    Ok(Box::new(Generator {
        hidden: [linear("h0", latent, hidden)?, linear("h1", hidden, hidden)?],
        last: linear("y", hidden, outputs)?,
    }))
}

impl Model for Generator {
    /// [N, latent] to [N, outputs], values in (0, 1).
    fn forward(&self, z: &Tensor, _: &mut Forward) -> Result<Output, NnError> {
        let mut x = z.shallow_clone();
        for layer in &self.hidden {
            x = relu(&layer.forward(&x)?)?;
        }
        Ok(self.last.forward(&x)?.f_sigmoid()?.into())
    }
}

struct Discriminator {
    hidden: [Maxout; 2],
    last: Linear,
    input_keep: f64,
    hidden_keep: f64,
}

fn build_discriminator(spec: &ModelSpec, scope: &mut Scope) -> Result<Box<dyn Model>, NnError> {
    let inputs = options::numbers(spec)?;
    let hidden = options::count(spec, "hidden", 240)?;
    let pieces = options::count(spec, "pieces", 5)?;
    let drop_rate = options::drop_rate(spec, "dropout", 0.5)?;
    let weight = Init::Uniform { bound: 0.005 };
    Ok(Box::new(Discriminator {
        hidden: [
            Maxout::new(&mut scope.sub("h0"), inputs, hidden, pieces, weight)?,
            Maxout::new(&mut scope.sub("h1"), hidden, hidden, pieces, weight)?,
        ],
        last: Linear::new(&mut scope.sub("y"), hidden, 1, weight, Init::Constant(0.0))?,
        // The paper keeps 0.8 of the input and half of the rest; `dropout = 0` switches both off.
        input_keep: if drop_rate > 0.0 { 0.8 } else { 1.0 },
        hidden_keep: 1.0 - drop_rate,
    }))
}

impl Model for Discriminator {
    /// [N, inputs] to [N], the logit of being real.
    fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Output, NnError> {
        let mut x = dropout(&x.f_flatten(1, -1)?, self.input_keep, "dropout0", fwd)?;
        for (i, layer) in self.hidden.iter().enumerate() {
            x = dropout(&layer.forward(&x)?, self.hidden_keep, &format!("dropout{}", i + 1), fwd)?;
        }
        Ok(self.last.forward(&x)?.f_squeeze_dim(1)?.into())
    }
}
