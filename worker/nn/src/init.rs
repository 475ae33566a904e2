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
    /// Gaussian with mean 0 whose draws beyond two standard deviations are drawn again, as TensorFlow does.
    TruncatedNormal {
        /// Standard deviation before the cut; after it 0.88 times that is left.
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

    /// Caffe's `xavier`: uniform with variance 1/`fan_in`.
    pub fn xavier(fan_in: i64) -> Self {
        Self::Uniform { bound: (3.0 / fan_in.max(1) as f64).sqrt() }
    }

    /// Glorot and Bengio 2010: uniform with variance 2/(`fan_in` + `fan_out`).
    pub fn glorot(fan_in: i64, fan_out: i64) -> Self {
        Self::Uniform { bound: (6.0 / (fan_in + fan_out).max(1) as f64).sqrt() }
    }

    /// He et al. 2015 as TF-Slim's `variance_scaling_initializer` draws it: a truncated Gaussian whose variance
    /// before the cut is 1.3 · 2/`fan_in`, so that about 2/`fan_in` is left.
    pub fn variance_scaling(fan_in: i64) -> Self {
        Self::TruncatedNormal { std: (1.3 * 2.0 / fan_in.max(1) as f64).sqrt() }
    }

    /// `count` values for the parameter `name` of `network`.
    pub(crate) fn draw(self, seed: u64, network: &str, name: &str, count: usize) -> Vec<f64> {
        let mut stream = Stream::new(seed, &format!("init {network}/{name}"), &[]);
        match self {
            Self::Constant(value) => vec![value; count],
            Self::Normal { std } => (0..count).map(|_| std * stream.normal()).collect(),
            Self::TruncatedNormal { std } => (0..count).map(|_| std * within_two(&mut stream)).collect(),
            Self::Uniform { bound } => (0..count).map(|_| stream.uniform_in(-bound, bound)).collect(),
        }
    }
}

/// A draw from the standard Gaussian within ±2.
fn within_two(stream: &mut Stream) -> f64 {
    loop {
        let z = stream.normal();
        if z.abs() <= 2.0 {
            return z;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_have_their_variance_and_their_bounds() {
        let check = |init: Init, variance: f64, bound: f64| {
            let values = init.draw(1, "model", "w", 20_000);
            let mean_square = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
            // The mean square of 20,000 draws has a standard deviation of at most 1% of itself.
            assert!((mean_square / variance - 1.0).abs() < 0.05, "{init:?}: {mean_square} for {variance}");
            let largest = values.iter().fold(0.0f64, |a, v| a.max(v.abs()));
            assert!(largest <= bound && largest > 0.95 * bound, "{init:?}: {largest} for {bound}");
        };
        // The variance of a Gaussian cut at two standard deviations is 0.7737 of the whole one's.
        check(Init::TruncatedNormal { std: 0.1 }, 0.7737 * 0.01, 0.2);
        check(Init::variance_scaling(50), 0.7737 * 1.3 * 0.04, 2.0 * (2.6f64 / 50.0).sqrt());
        check(Init::xavier(12), 1.0 / 12.0, 0.5);
        check(Init::glorot(4, 20), 1.0 / 12.0, 0.5);
    }
}
