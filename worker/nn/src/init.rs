//! Initial values, keyed by (job seed, network, parameter name): never by who draws them or when.

use lockstep_common::rng::Stream;

/// A distribution of initial values. All draws are made in f64 and then rounded to the network's type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Every element the same.
    Constant(f64),
    /// Gaussian with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform in [−bound, bound).
    Uniform {
        /// The largest magnitude.
        bound: f64,
    },
}

impl Init {
    /// PyTorch's default for convolutions and linear layers, weights and biases alike: uniform within
    /// ±1/√`fan_in`, where `fan_in` is the number of inputs of one output.
    pub fn fan_in(fan_in: i64) -> Self {
        Self::Uniform { bound: 1.0 / (fan_in.max(1) as f64).sqrt() }
    }

    /// `count` values for the parameter `name` of `network`.
    pub(crate) fn draw(self, seed: u64, network: &str, name: &str, count: usize) -> Vec<f64> {
        let mut stream = Stream::new(seed, &format!("init {network}/{name}"), &[]);
        match self {
            Self::Constant(value) => vec![value; count],
            Self::Normal { std } => (0..count).map(|_| std * stream.normal()).collect(),
            Self::Uniform { bound } => (0..count).map(|_| stream.uniform_in(-bound, bound)).collect(),
        }
    }
}
