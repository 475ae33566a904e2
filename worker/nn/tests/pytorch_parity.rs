//! Training and optimizers against PyTorch's own values, written by `parity/reference.py`.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Trainer, optimizer, relative_error, spec};
use lockstep_common::job::{BatchNorm, OptimizerSpec};
use lockstep_nn::bytes::RawTensor;
use lockstep_nn::init::Init;
use lockstep_nn::optim::Optimizer;
use lockstep_nn::vars::Vars;
use safetensors::SafeTensors;
use serde_json::json;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

fn fixture() -> BTreeMap<String, Tensor> {
    let bytes = include_bytes!("fixtures/pytorch.safetensors");
    let read = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let dtype = view.dtype().to_string();
        (name, RawTensor::tensor_of(&dtype, view.shape(), view.data()).unwrap())
    };
    SafeTensors::deserialize(bytes).unwrap().tensors().into_iter().map(read).collect()
}

fn below(fixture: &BTreeMap<String, Tensor>, prefix: &str) -> BTreeMap<String, Tensor> {
    let strip = |(k, v): (&String, &Tensor)| Some((k.strip_prefix(prefix)?.to_owned(), v.shallow_clone()));
    fixture.iter().filter_map(strip).collect()
}

/// The largest relative error of the losses and of the final weights and running statistics.
fn error_against_pytorch(run: &str, batch_norm: BatchNorm, label_smoothing: f64, shards: &[i64]) -> f64 {
    let fixture = fixture();
    let mut trainer = Trainer::new(spec("small-cnn", batch_norm, json!({ "width": 4 })), Kind::Double);
    trainer.label_smoothing = label_smoothing;
    trainer.vars.load(&below(&fixture, &format!("{run}.init."))).unwrap();
    let (images, labels) = (&fixture["images"].to_kind(Kind::Double), &fixture["labels"]);
    let losses: Vec<f64> = (0..images.size()[0])
        .map(|step| trainer.step(&images.get(step), &labels.get(step), shards).loss)
        .collect();
    let mut worst = relative_error(&Tensor::from_slice(&losses), &fixture[&format!("{run}.losses")]);
    for (name, expected) in below(&fixture, &format!("{run}.final.")) {
        worst = worst.max(relative_error(&trainer.vars.var(&name).unwrap().tensor, &expected));
    }
    worst
}

#[test]
fn plain_training_equals_pytorch_on_the_whole_batch() {
    let error = error_against_pytorch("plain", BatchNorm::None, 0.0, &[8, 8, 8, 8]);
    assert!(error < 1e-9, "{error:e}");
}

#[test]
fn synchronized_batch_norm_equals_pytorch_on_the_whole_batch() {
    for shards in [[8, 8, 8, 8].as_slice(), &[1, 0, 20, 11]] {
        let error = error_against_pytorch("norm", BatchNorm::Sync, 0.1, shards);
        assert!(error < 1e-9, "{error:e} with shards {shards:?}");
    }
}

/// The negative control: statistics of each shard by itself are another computation, and the test sees it.
#[test]
fn local_batch_norm_differs_from_pytorch_on_the_whole_batch() {
    let error = error_against_pytorch("norm", BatchNorm::Local, 0.1, &[8, 8, 8, 8]);
    assert!(error > 1e-3, "{error:e}");
}

fn check_optimizer(case: &str, spec: &OptimizerSpec) {
    let fixture = below(&fixture(), &format!("optim.{case}."));
    let mut vars = Vars::new("model", 1, Kind::Double, Device::Cpu);
    let _ = vars.root().parameter("weight", &[3, 4], Init::Constant(0.0)).unwrap();
    let _ = vars.root().parameter("bias", &[3], Init::Constant(0.0)).unwrap();
    vars.load(&below(&fixture, "init.")).unwrap();
    let gradients = below(&fixture, "gradients.");
    let mut optimizer = Optimizer::new(spec, &vars).unwrap();
    for step in 0..10 {
        let named: Vec<_> = gradients.iter().map(|(name, g)| (name.clone(), g.get(step))).collect();
        optimizer.step(&vars, &named, spec.lr(), step as u64).unwrap();
        if step == 4 {
            // A checkpoint in the middle: a new optimizer goes on from the saved state.
            let state = optimizer.state();
            optimizer = Optimizer::new(spec, &vars).unwrap();
            optimizer.load_state(&state).unwrap();
        }
    }
    for (name, expected) in below(&fixture, "final.") {
        let error = relative_error(&vars.var(&name).unwrap().tensor, &expected);
        assert!(error < 1e-12, "{case} {name}: {error:e}");
    }
}

#[test]
fn optimizers_equal_pytorch_also_across_a_checkpoint() {
    let cases = [
        ("sgd", json!({ "name": "sgd", "lr": 0.05, "weight_decay": 0.1 })),
        ("momentum", json!({ "name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1 })),
        ("nesterov", json!({ "name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": true })),
        ("adam", json!({ "name": "adam", "lr": 0.01, "beta1": 0.8, "beta2": 0.99, "weight_decay": 0.1 })),
        ("adamw", json!({ "name": "adamw", "lr": 0.01, "weight_decay": 0.1 })),
        ("rmsprop", json!({ "name": "rmsprop", "lr": 0.01, "weight_decay": 0.1 })),
        ("rmsprop-momentum", json!({ "name": "rmsprop", "lr": 0.01, "alpha": 0.9, "momentum": 0.9 })),
        (
            "rmsprop-tensorflow",
            json!({ "name": "rmsprop", "form": "tensorflow", "lr": 0.045, "alpha": 0.9, "eps": 1.0, "momentum": 0.9 }),
        ),
        (
            "groups",
            json!({ "name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1,
                "groups": [{ "parameters": "b*s", "lr_factor": 2.0, "weight_decay": 0.0 }] }),
        ),
    ];
    for (case, spec) in cases {
        check_optimizer(case, &optimizer(spec));
    }
}

#[test]
fn a_group_that_fits_no_parameter_is_named() {
    let spec = json!({ "name": "sgd", "lr": 0.05, "groups": [{ "parameters": "weigth", "lr_factor": 2.0 }] });
    let mut vars = Vars::new("model", 1, Kind::Double, Device::Cpu);
    let _ = vars.root().parameter("weight", &[1], Init::Constant(1.0)).unwrap();
    let message = Optimizer::new(&optimizer(spec), &vars).unwrap_err().to_string();
    let wanted =
        "`weigth` in the optimizer's `groups` fits no parameter of the network; did you mean `weight`?";
    assert_eq!(message, wanted);
}

#[test]
fn sparing_norms_and_biases_decays_weights_only() {
    let spec =
        optimizer(json!({ "name": "adamw", "lr": 0.1, "weight_decay": 0.5, "no_decay_norm_bias": true }));
    let mut vars = Vars::new("model", 1, Kind::Double, Device::Cpu);
    let _ = vars.root().parameter("weight", &[1, 1], Init::Constant(1.0)).unwrap();
    let _ = vars.root().parameter("bias", &[1], Init::Constant(1.0)).unwrap();
    let mut optimizer = Optimizer::new(&spec, &vars).unwrap();
    let zero = |shape: &[i64]| Tensor::zeros(shape, (Kind::Double, Device::Cpu));
    let gradients = [("weight".to_owned(), zero(&[1, 1])), ("bias".to_owned(), zero(&[1]))];
    optimizer.step(&vars, &gradients, 0.1, 0).unwrap();
    assert!((vars.var("weight").unwrap().tensor.double_value(&[0, 0]) - 0.95).abs() < 1e-15);
    assert_eq!(vars.var("bias").unwrap().tensor.double_value(&[0]), 1.0);
}

#[test]
fn optimizer_state_of_another_network_is_refused_by_name() {
    let mut vars = Vars::new("model", 1, Kind::Double, Device::Cpu);
    let _ = vars.root().parameter("weight", &[2], Init::Constant(0.0)).unwrap();
    let mut optimizer = Optimizer::new(&common::sgd(0.1), &vars).unwrap();
    let mut state = optimizer.state();
    let tensor = state.remove("momentum_buffer.weight").unwrap();
    state.insert("momentum_buffer.other".to_owned(), tensor);
    let message = optimizer.load_state(&state).unwrap_err().to_string();
    assert!(message.contains("`momentum_buffer.weight` is missing"), "{message}");
    assert!(message.contains("`momentum_buffer.other` is unknown"), "{message}");
}
