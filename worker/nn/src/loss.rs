//! Losses as sums over a shard's samples, divided by the samples of the whole global batch, so that the shards'
//! losses and gradients simply add.

use crate::error::NnError;
use tch::{Kind, Reduction, Tensor};

/// The target that libtorch leaves out; no label of ours is negative.
const NO_IGNORED_INDEX: i64 = -100;

/// Cross entropy of `logits` `[N, classes]` with `labels` `[N]` (i64).
///
/// A share `label_smoothing` of each target is spread evenly over all classes (Szegedy et al. 2016).
pub fn cross_entropy(
    logits: &Tensor,
    labels: &Tensor,
    label_smoothing: f64,
    global_count: f64,
) -> Result<Tensor, NnError> {
    let sum = wide(logits)?.f_cross_entropy_loss::<&Tensor>(
        labels,
        None,
        Reduction::Sum,
        NO_IGNORED_INDEX,
        label_smoothing,
    )?;
    share(&sum, global_count)
}

/// How many rows of `logits` [N, classes] have their label among the `k` largest: a scalar (f64).
pub fn correct_in_top(logits: &Tensor, labels: &Tensor, k: i64) -> Result<Tensor, NnError> {
    let classes = logits.size().last().copied().unwrap_or(0);
    if labels.numel() == 0 {
        return Ok(Tensor::f_zeros([0i64; 0], (Kind::Double, logits.device()))?);
    }
    let (_, top) = logits.f_topk(k.min(classes), 1, true, false)?;
    Ok(top.f_eq_tensor(&labels.f_unsqueeze(1)?)?.f_sum(Kind::Double)?)
}

/// The discriminator's loss, −log D(x) − log(1 − D(G(z))), from its logits (Goodfellow et al. 2014).
pub fn discriminator(real: &Tensor, fake: &Tensor, global_count: f64) -> Result<Tensor, NnError> {
    let (real, fake) = (wide(real)?, wide(fake)?);
    let sum = (real.f_neg()?.f_softplus()?.f_sum(None)?).f_add(&fake.f_softplus()?.f_sum(None)?)?;
    share(&sum, global_count)
}

/// The generator's non-saturating loss, −log D(G(z)), from the discriminator's logits.
pub fn generator(fake: &Tensor, global_count: f64) -> Result<Tensor, NnError> {
    share(&wide(fake)?.f_neg()?.f_softplus()?.f_sum(None)?, global_count)
}

/// `logits` in the precision of the weights: autocast leaves them in half of it.
fn wide(logits: &Tensor) -> Result<Tensor, NnError> {
    match logits.f_kind()? {
        Kind::BFloat16 => Ok(logits.f_to_kind(Kind::Float)?),
        _ => Ok(logits.shallow_clone()),
    }
}

fn share(sum: &Tensor, global_count: f64) -> Result<Tensor, NnError> {
    Ok(sum.f_div_scalar(global_count)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn close(a: &Tensor, b: &Tensor) -> bool {
        (a - b).abs().max().double_value(&[]) < 1e-14
    }

    #[test]
    fn shard_losses_add_up_to_the_mean_over_the_batch_with_and_without_smoothing() {
        let logits = Tensor::randn([7, 5], (Kind::Double, Device::Cpu));
        let labels = Tensor::from_slice(&[0i64, 1, 2, 3, 4, 0, 1]);
        for smoothing in [0.0, 0.1] {
            let part = |from, n| {
                let (l, t) = (logits.narrow(0, from, n), labels.narrow(0, from, n));
                cross_entropy(&l, &t, smoothing, 7.0).unwrap()
            };
            let whole = logits.cross_entropy_loss::<&Tensor>(&labels, None, Reduction::Mean, -100, smoothing);
            assert!(close(&(part(0, 5) + part(5, 2) + part(7, 0)), &whole));
        }
    }

    #[test]
    fn gan_losses_equal_binary_cross_entropy() {
        let (real, fake) = (Tensor::from_slice(&[0.3, -2.0]), Tensor::from_slice(&[1.5, -40.0]));
        let bce = |logits: &Tensor, target: f64| {
            let target = logits.ones_like() * target;
            logits.binary_cross_entropy_with_logits::<&Tensor>(&target, None, None, Reduction::Mean)
        };
        assert!(close(&discriminator(&real, &fake, 2.0).unwrap(), &(bce(&real, 1.0) + bce(&fake, 0.0))));
        assert!(close(&generator(&fake, 2.0).unwrap(), &bce(&fake, 1.0)));
    }

    #[test]
    fn correct_in_top_counts_rows_and_takes_an_empty_batch() {
        let logits = Tensor::from_slice2(&[[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]);
        let labels = Tensor::from_slice(&[1i64, 0]);
        let counts = [1, 2, 5].map(|k| correct_in_top(&logits, &labels, k).unwrap().double_value(&[]));
        assert_eq!(counts, [1.0, 2.0, 2.0]);
        let none = Tensor::from_slice::<i64>(&[]);
        assert_eq!(correct_in_top(&logits.narrow(0, 0, 0), &none, 1).unwrap().double_value(&[]), 0.0);
    }
}
