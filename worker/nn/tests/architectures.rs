//! Every architecture against the library or paper that it follows: `parity/architectures.py` has written what those
//! compute from the same weights.
#![allow(clippy::unwrap_used)]

mod common;

use common::{formula, relative_error, spec};
use lockstep_common::ids::LogicalShard;
use lockstep_common::job::{BatchNorm, ModelSpec};
use lockstep_nn::bytes::RawTensor;
use lockstep_nn::forward::{Forward, LocalOnly};
use lockstep_nn::moments::apply_running_stats;
use lockstep_nn::vars::{Role, Vars};
use lockstep_nn::{loss, models, shim};
use safetensors::SafeTensors;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

const CLASSES: i64 = 10;

struct Case {
    name: &'static str,
    model: &'static str,
    batch_norm: BatchNorm,
    options: serde_json::Value,
    batch: i64,
    side: i64,
}

impl Case {
    fn spec(&self, classes: i64) -> ModelSpec {
        let mut options = self.options.clone();
        options["classes"] = json!(classes);
        spec(self.model, self.batch_norm, options)
    }

    fn expected(&self) -> BTreeMap<String, Tensor> {
        let file = SafeTensors::deserialize(include_bytes!("fixtures/architectures.safetensors")).unwrap();
        let own = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let name = name.strip_prefix(&format!("{}/", self.name))?.to_owned();
            Some((name, RawTensor::tensor_of(&view.dtype().to_string(), view.shape(), view.data()).unwrap()))
        };
        file.tensors().into_iter().filter_map(own).collect()
    }

    fn images(&self, kind: Kind) -> Tensor {
        let shape = [self.batch, 3, self.side, self.side];
        let count = shape.iter().product::<i64>() as usize;
        Tensor::from_slice(&formula::numbers("images", count)).reshape(shape).to_kind(kind)
    }
}

/// The weights of the formula for all variables of the network.
fn weights(spec: &ModelSpec) -> BTreeMap<String, Tensor> {
    let outline = models::outline(spec).unwrap();
    outline.iter().map(|(name, var)| (name.to_owned(), formula::tensor(name, &var.tensor.size()))).collect()
}

/// The network with these weights.
fn weighted(spec: &ModelSpec, kind: Kind, weights: &BTreeMap<String, Tensor>) -> Vars {
    let weights = weights.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(kind))).collect();
    models::outline(spec).unwrap().filled(kind, Device::Cpu, &weights).unwrap()
}

/// Names, shapes and how many parameters there are.
fn check_outline(case: &Case, expected: &BTreeMap<String, Tensor>) {
    let outline = models::outline(&case.spec(1000)).unwrap();
    let theirs = Vec::<i64>::try_from(&expected["keys"]).unwrap();
    let strange: Vec<_> = outline
        .iter()
        .filter(|(name, var)| !theirs.contains(&formula::key(name, &var.tensor.size())))
        .map(|(name, var)| format!("{name} {:?}", var.tensor.size()))
        .collect();
    assert!(strange.is_empty(), "{}: the reference has no such tensors: {strange:?}", case.name);
    assert_eq!(outline.iter().count(), theirs.len(), "{}: the reference has more tensors", case.name);
    assert_eq!(outline.parameter_count() as i64, expected["parameters"].int64_value(&[0]), "{}", case.name);
}

/// A gradient that a batch norm cancels is 0, computed as a sum of some 10,000 terms whose rounding, 1e4 · 2⁻⁵³ of the
/// network's largest gradient, is all that is left.
const CANCELLED: f64 = 1e-12;

/// Fingerprints of many tensors against the reference's, each relative to its norm; those that are 0 but for rounding,
/// relative to the largest.
fn check_fingerprints(what: &str, ours: &[(String, [f64; 2])], expected: &Tensor, tolerance: f64) {
    assert_eq!(expected.size(), [ours.len() as i64, 2], "{what}");
    let all_norms = expected.narrow(1, 0, 1).max().double_value(&[]);
    for (i, (name, got)) in ours.iter().enumerate() {
        let norm = expected.double_value(&[i as i64, 0]);
        let bound = if norm > CANCELLED * all_norms { tolerance * norm } else { CANCELLED * all_norms };
        for (part, got) in got.iter().enumerate() {
            let error = (got - expected.double_value(&[i as i64, part as i64])).abs();
            assert!(error <= bound, "{what} of `{name}`, part {part}: off by {error:e}, norm {norm:e}");
        }
    }
}

/// One pass in f64: outputs, loss, gradients, and the running statistics after it.
fn check_pass(case: &Case, expected: &BTreeMap<String, Tensor>, vars: &Vars, train: bool) {
    let spec = case.spec(CLASSES);
    let mut replica = vars.replica().unwrap();
    let model = models::build(&spec, &mut replica.root()).unwrap();
    let samples = (0..case.batch as u64).collect();
    let mut fwd = Forward::training(1, 0, LogicalShard(0), samples, Arc::new(LocalOnly));
    (fwd.train, fwd.update_stats) = (train, train);
    let output = model.forward(&case.images(Kind::Double), &mut fwd).unwrap();
    let labels: Vec<i64> = (0..case.batch).map(|i| i * 7 % CLASSES).collect();
    let labels = Tensor::from_slice(&labels);
    let loss_of = |logits: &Tensor| loss::cross_entropy(logits, &labels, 0.0, case.batch as f64).unwrap();
    let mut loss = loss_of(&output.main);

    let mode = if train { "train" } else { "eval" };
    let theirs = |what: &str| &expected[&format!("{mode}.{what}")];
    let close = |what: &str, got: &Tensor| {
        let error = relative_error(got, theirs(what));
        assert!(error < 1e-12, "{} {mode} {what}: {error:e}", case.name);
    };
    close("logits", &output.main);
    let heads = expected.keys().filter(|name| name.starts_with(&format!("{mode}.aux."))).count();
    assert_eq!(output.auxiliary.len(), heads, "{} {mode}", case.name);
    for head in &output.auxiliary {
        close(&format!("aux.{}", head.name), &head.output);
        loss += loss_of(&head.output) * head.weight;
    }
    close("loss", &loss.reshape([1]));

    shim::backward(&loss).unwrap();
    let gradient = |(name, var): (&str, &lockstep_nn::vars::Var)| {
        let gradient = var.tensor.grad();
        // A head that did not run has no gradient.
        let print = if gradient.defined() { formula::fingerprint(name, &gradient) } else { [0.0; 2] };
        (name.to_owned(), print)
    };
    let gradients: Vec<_> = replica.parameters().map(gradient).collect();
    let what = format!("{} {mode} gradient", case.name);
    check_fingerprints(&what, &gradients, theirs("gradients"), 1e-10);

    if train && case.batch_norm != BatchNorm::None {
        apply_running_stats(vars, &fwd.take_records().unwrap()).unwrap();
        let buffers = vars.iter().filter(|(_, var)| var.role == Role::Buffer);
        let statistics: Vec<_> =
            buffers.map(|(name, var)| (name.to_owned(), formula::fingerprint(name, &var.tensor))).collect();
        check_fingerprints(&format!("{} statistic", case.name), &statistics, &expected["statistics"], 1e-10);
    }
}

/// Outputs in f32 against the reference's in f64.
fn check_single(case: &Case, expected: &BTreeMap<String, Tensor>, vars: &Vars) {
    let spec = case.spec(CLASSES);
    let model = models::build(&spec, &mut vars.frozen().unwrap().root()).unwrap();
    let images = case.images(Kind::Float);
    let logits = model.forward(&images, &mut Forward::evaluation()).unwrap().main;
    let error = relative_error(&logits.to_kind(Kind::Double), &expected["eval.logits"]);
    assert!(error < 1e-5, "{} in f32: {error:e}", case.name);
}

fn check(case: &Case) {
    tch::set_num_threads(1);
    let expected = case.expected();
    check_outline(case, &expected);
    let spec = case.spec(CLASSES);
    let weights = weights(&spec);
    check_single(case, &expected, &weighted(&spec, Kind::Float, &weights));
    let vars = weighted(&spec, Kind::Double, &weights);
    drop(weights);
    check_pass(case, &expected, &vars, false);
    check_pass(case, &expected, &vars, true);
}

#[test]
fn googlenet_is_torchvisions() {
    check(&Case {
        name: "googlenet",
        model: "googlenet",
        batch_norm: BatchNorm::Sync,
        options: json!({ "dropout": 0.0, "aux_dropout": 0.0 }),
        batch: 4,
        side: 64,
    });
}

#[test]
fn googlenet_of_the_paper_is_caffes() {
    check(&Case {
        name: "googlenet-paper",
        model: "googlenet",
        batch_norm: BatchNorm::None,
        options: json!({ "variant": "paper", "dropout": 0.0, "aux_dropout": 0.0 }),
        batch: 2,
        side: 224,
    });
}

#[test]
fn bn_inception_is_that_of_pretrainedmodels() {
    check(&Case {
        name: "bn-inception",
        model: "bn-inception",
        batch_norm: BatchNorm::Sync,
        options: json!({ "dropout": 0.0 }),
        batch: 4,
        side: 64,
    });
}

#[test]
fn inception_v3_is_torchvisions() {
    check(&Case {
        name: "inception-v3",
        model: "inception-v3",
        batch_norm: BatchNorm::Sync,
        options: json!({ "dropout": 0.0 }),
        batch: 2,
        side: 299,
    });
}

fn check_at_107(name: &'static str, model: &'static str, options: serde_json::Value, batch: i64) {
    check(&Case { name, model, batch_norm: BatchNorm::Sync, options, batch, side: 107 });
}

#[test]
fn inception_v4_is_timms() {
    check_at_107("inception-v4", "inception-v4", json!({ "dropout": 0.0 }), 3);
}

#[test]
fn inception_resnet_v1_is_the_papers_with_the_trunk_of_facenet_pytorch() {
    check_at_107("inception-resnet-v1", "inception-resnet-v1", json!({ "dropout": 0.0 }), 2);
}

#[test]
fn inception_resnet_v2_is_timms() {
    check_at_107("inception-resnet-v2", "inception-resnet-v2", json!({ "dropout": 0.0 }), 2);
}

#[test]
fn inception_resnet_v2_of_the_paper_is_the_papers() {
    let options = json!({ "variant": "paper", "dropout": 0.0 });
    check_at_107("inception-resnet-v2-paper", "inception-resnet-v2", options, 2);
}
