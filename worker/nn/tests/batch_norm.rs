//! Batch norm over the global batch against one big batch, and the kernels against libtorch's own.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Trainer, relative_error, spec};
use lockstep_common::ids::LogicalShard;
use lockstep_common::job::BatchNorm as Mode;
use lockstep_nn::NnError;
use lockstep_nn::forward::{BatchNormSync, BnCall, Forward, LocalOnly};
use lockstep_nn::layers::BatchNorm;
use lockstep_nn::shim;
use lockstep_nn::vars::Vars;
use serde_json::json;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

fn batches(steps: usize, rows: i64) -> Vec<(Tensor, Tensor)> {
    tch::manual_seed(3);
    (0..steps)
        .map(|_| {
            (
                Tensor::randn([rows, 1, 8, 8], (Kind::Double, CPU)),
                Tensor::randint(10, [rows], (Kind::Int64, CPU)),
            )
        })
        .collect()
}

/// The largest error of loss, gradients, parameters and running statistics over 5 steps: shards against one batch.
fn error_of_sharding(mode: Mode, sizes: &[i64]) -> f64 {
    let spec = spec("small-cnn", mode, json!({ "width": 4 }));
    let (mut whole, mut sharded) =
        (Trainer::new(spec.clone(), Kind::Double), Trainer::new(spec, Kind::Double));
    let rows = sizes.iter().sum();
    let mut worst = 0.0f64;
    for (images, labels) in batches(5, rows) {
        let (a, b) = (whole.step(&images, &labels, &[rows]), sharded.step(&images, &labels, sizes));
        worst = worst.max((a.loss - b.loss).abs());
        for ((name, a), (_, b)) in a.gradients.iter().zip(&b.gradients) {
            let error = relative_error(b, a);
            worst = worst.max(error);
            assert!(mode != Mode::Sync || error < 1e-10, "gradient of {name}: {error:e}");
        }
    }
    for ((name, a), (_, b)) in whole.vars.iter().zip(sharded.vars.iter()) {
        let error = relative_error(&b.tensor, &a.tensor);
        worst = worst.max(error);
        assert!(mode != Mode::Sync || error < 1e-10, "{name}: {error:e}");
    }
    worst
}

#[test]
fn shards_with_synchronized_batch_norm_equal_one_batch_whatever_their_sizes() {
    for sizes in [[8, 8, 8, 8].as_slice(), &[5, 1, 17, 9], &[0, 16, 16, 0], &[32, 0]] {
        let error = error_of_sharding(Mode::Sync, sizes);
        assert!(error < 1e-10, "{error:e} with {sizes:?}");
    }
}

#[test]
fn shards_with_local_batch_norm_differ_from_one_batch() {
    assert!(error_of_sharding(Mode::Local, &[8, 8, 8, 8]) > 1e-2);
}

#[test]
fn training_repeats_bit_for_bit() {
    let run = || {
        let mut trainer = Trainer::new(spec("small-cnn", Mode::Sync, json!({ "width": 4 })), Kind::Float);
        for (images, labels) in batches(3, 16) {
            trainer.step(&images.to_kind(Kind::Float), &labels, &[4, 4, 4, 4]);
        }
        trainer.vars.snapshot().unwrap()
    };
    assert_eq!(run(), run());
}

struct Case {
    x: Tensor,
    relu: bool,
    tolerance: f64,
}

/// Output, gradients and statistics of one layer against libtorch's training-mode batch norm and ReLU.
fn check_against_libtorch(Case { x, relu, tolerance }: Case) {
    let (channels, kind) = (x.size()[1], x.kind());
    let mut master = Vars::new("model", 1, kind, CPU);
    BatchNorm::new(&mut master.root().sub("bn"), channels, Mode::Sync, relu).unwrap();
    let mut vars = master.replica().unwrap();
    let layer = BatchNorm::new(&mut vars.root().sub("bn"), channels, Mode::Sync, relu).unwrap().unwrap();
    let parameter = |name: &str| vars.var(name).unwrap().tensor.shallow_clone();
    let (gamma, beta) = (parameter("bn.weight"), parameter("bn.bias"));
    tch::no_grad(|| {
        gamma.detach().copy_(&Tensor::linspace(-1.0, 2.0, channels, (kind, CPU)));
        beta.detach().copy_(&Tensor::linspace(0.3, -0.2, channels, (kind, CPU)));
    });
    let ours = x.detach().set_requires_grad(true);
    let samples = (0..x.size()[0] as u64).collect();
    let mut fwd = Forward::training(1, 0, LogicalShard(0), samples, Arc::new(LocalOnly));
    let y = layer.forward(&ours, &mut fwd).unwrap();
    let weights = x.cos();
    shim::backward(&(&y * &weights).sum(None)).unwrap();

    let leaf = |t: &Tensor| t.detach().to_kind(Kind::Double).set_requires_grad(true);
    let (rx, rgamma, rbeta) = (leaf(&x), leaf(&gamma), leaf(&beta));
    let (mean, var) =
        (Tensor::zeros([channels], (Kind::Double, CPU)), Tensor::ones([channels], (Kind::Double, CPU)));
    let ry = rx.batch_norm(Some(&rgamma), Some(&rbeta), Some(&mean), Some(&var), true, 1.0, 1e-5, false);
    let ry = if relu { ry.relu() } else { ry };
    (&ry * weights.to_kind(Kind::Double)).sum(None).backward();

    let label = format!("{:?} {kind:?} relu {relu}", x.size());
    let close = |what: &str, a: &Tensor, b: &Tensor| {
        let error = relative_error(&a.to_kind(Kind::Double), b);
        assert!(error < tolerance, "{label}: {what} {error:e}");
    };
    if x.is_contiguous() || x.stride()[1] == 1 {
        assert_eq!(y.stride(), x.stride(), "{label}: the layout stays");
    }
    close("output", &y, &ry);
    close("dx", &ours.grad(), &rx.grad());
    close("dgamma", &gamma.grad(), &rgamma.grad());
    close("dbeta", &beta.grad(), &rbeta.grad());
    let record = &fwd.take_records().unwrap()[0];
    close("mean", &Tensor::from_slice(&record.mean), &mean);
    close("unbiased variance", &Tensor::from_slice(&record.var_unbiased), &var);
}

#[test]
fn every_layout_and_type_agrees_with_libtorch() {
    tch::manual_seed(5);
    // Lengths, and numbers of channels, around the kernels' 8 and 16 lanes, and the shapes that have no fast path.
    for shape in
        [[6, 3, 1, 1], [2, 5, 3, 3], [4, 2, 4, 4], [3, 4, 5, 5], [2, 3, 7, 9], [2, 8, 3, 2], [3, 21, 2, 2]]
    {
        for relu in [false, true] {
            let x = || Tensor::randn(shape, (Kind::Double, CPU)) * 3.0 + 10.0;
            check_against_libtorch(Case { x: x(), relu, tolerance: 1e-11 });
            check_against_libtorch(Case { x: x().to_kind(Kind::Float), relu, tolerance: 2e-5 });
            let channels_last = shim::channels_last(&x()).unwrap();
            check_against_libtorch(Case { x: channels_last.shallow_clone(), relu, tolerance: 1e-11 });
            check_against_libtorch(Case { x: channels_last.to_kind(Kind::Float), relu, tolerance: 2e-5 });
            let strange = x().transpose(2, 3).contiguous().transpose(2, 3);
            check_against_libtorch(Case { x: strange, relu, tolerance: 1e-11 });
            check_against_libtorch(Case { x: x().flatten(1, -1), relu, tolerance: 1e-11 });
        }
    }
}

#[test]
fn nan_passes_through_the_fused_relu() {
    let mut vars = Vars::new("model", 1, Kind::Float, CPU);
    let layer = BatchNorm::new(&mut vars.root(), 1, Mode::Sync, true).unwrap().unwrap();
    let mut fwd = Forward::training(1, 0, LogicalShard(0), vec![0, 1], Arc::new(LocalOnly));
    let y = layer.forward(&Tensor::from_slice2(&[[f32::NAN], [1.0]]), &mut fwd).unwrap();
    assert_eq!(y.isnan().all().int64_value(&[]), 1);
}

#[derive(Debug, thiserror::Error)]
#[error("rank 3 is gone")]
struct Gone;

/// Fails in the exchange of forward or of backward.
struct Failing {
    in_backward: bool,
}

impl BatchNormSync for Failing {
    fn merge_moments(&self, _: BnCall, _: LogicalShard, local: Vec<f64>) -> Result<Vec<f64>, NnError> {
        if self.in_backward { Ok(local) } else { Err(NnError::Exchange(Box::new(Gone))) }
    }

    fn sum(&self, _: BnCall, _: LogicalShard, _: Vec<f64>) -> Result<Vec<f64>, NnError> {
        Err(NnError::Exchange(Box::new(Gone)))
    }

    fn is_alone(&self) -> bool {
        false
    }
}

#[test]
fn a_failed_exchange_ends_forward_or_backward_with_its_own_error() {
    let mut vars = Vars::new("model", 1, Kind::Float, CPU);
    let layer = BatchNorm::new(&mut vars.root(), 2, Mode::Sync, false).unwrap().unwrap();
    let x = Tensor::randn([3, 2], (Kind::Float, CPU)).set_requires_grad(true);
    let forward = |in_backward| {
        let mut fwd =
            Forward::training(1, 0, LogicalShard(0), vec![0, 1, 2], Arc::new(Failing { in_backward }));
        layer.forward(&x, &mut fwd)
    };
    let is_gone = |e: NnError| matches!(e, NnError::Exchange(inner) if inner.is::<Gone>());
    assert!(is_gone(forward(false).unwrap_err()));
    assert!(is_gone(shim::backward(&forward(true).unwrap().sum(None)).unwrap_err()));
}

#[test]
fn statistics_are_recorded_only_where_they_are_wanted_and_never_applied_by_forward() {
    let mut vars = Vars::new("model", 1, Kind::Float, CPU);
    let layer = BatchNorm::new(&mut vars.root().sub("bn"), 2, Mode::Sync, false).unwrap().unwrap();
    let before = vars.snapshot().unwrap();
    let mut fwd = Forward::training(1, 0, LogicalShard(0), vec![0, 1, 2], Arc::new(LocalOnly));
    fwd.update_stats = false;
    let x = Tensor::randn([3, 2], (Kind::Float, CPU));
    let _ = layer.forward(&x, &mut fwd).unwrap();
    assert!(fwd.take_records().unwrap().is_empty());
    fwd.update_stats = true;
    let _ = layer.forward(&x, &mut fwd).unwrap();
    assert_eq!(fwd.take_records().unwrap().len(), 1);
    assert_eq!(vars.snapshot().unwrap(), before);
}
