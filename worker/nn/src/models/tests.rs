use super::*;
use lockstep_common::job::{BatchNorm, catalogue};
use serde_json::json;

fn spec(name: &str, batch_norm: BatchNorm, options: serde_json::Value) -> ModelSpec {
    let options = options.as_object().cloned().unwrap();
    ModelSpec { name: name.to_owned(), batch_norm, optimizer: None, options }
}

fn parameters(name: &str, options: serde_json::Value) -> u64 {
    validate(&spec(name, BatchNorm::None, options)).unwrap().parameters
}

#[test]
fn parameter_counts_are_those_of_the_references() {
    assert_eq!(parameters("nin", json!({})), 966_986);
    assert_eq!(parameters("nin", json!({ "classes": 100 })), 984_356);
    assert_eq!(parameters("nin", json!({ "widths": "mnist" })), 349_674);
    assert_eq!(parameters("gan-generator", json!({})), 2_503_984);
    assert_eq!(parameters("gan-discriminator", json!({})), 1_231_441);
}

#[test]
fn the_registry_is_the_catalogue_that_job_files_are_checked_against() {
    let ours: Vec<_> =
        registry().iter().map(|m| (m.name, m.role, m.options.iter().map(|o| o.name).collect())).collect();
    let theirs: Vec<(_, _, Vec<_>)> =
        catalogue().iter().map(|m| (m.name, m.role, m.options.iter().map(|o| o.name).collect())).collect();
    assert_eq!(ours, theirs);
}

#[test]
fn outputs_have_the_documented_shapes_also_for_no_samples() {
    let cases = [
        ("nin", json!({ "widths": "mnist" }), vec![1, 28, 28], vec![10]),
        ("nin", json!({ "classes": 7 }), vec![3, 32, 32], vec![7]),
        ("small-cnn", json!({ "width": 4 }), vec![1, 8, 8], vec![10]),
        ("mlp", json!({ "inputs": 12, "dropout": 0.5 }), vec![3, 4], vec![10]),
        ("gan-generator", json!({ "outputs": 16 }), vec![100], vec![16]),
        ("gan-discriminator", json!({ "inputs": 16 }), vec![4, 4], vec![]),
    ];
    for (name, options, input, output) in cases {
        for (batch_norm, rows) in [(BatchNorm::None, 2), (BatchNorm::Local, 2), (BatchNorm::Local, 0)] {
            let spec = spec(name, batch_norm, options.clone());
            let mut vars = Vars::new("model", 1, Kind::Float, Device::Cpu);
            build(&spec, &mut vars.root()).unwrap();
            let mut replica = vars.replica().unwrap();
            let model = build(&spec, &mut replica.root()).unwrap();
            let mut fwd = Forward::evaluation();
            fwd.train = true;
            fwd.samples = (0..rows as u64).collect();
            let x = Tensor::ones([vec![rows], input.clone()].concat(), (Kind::Float, Device::Cpu));
            let y = model.forward(&x, &mut fwd).unwrap();
            assert_eq!(y.size(), [vec![rows], output.clone()].concat(), "{name} {batch_norm:?}");
            crate::shim::backward(&y.sum(None)).unwrap();
            let gradient_is_finite =
                |v: &crate::vars::Var| v.tensor.grad().isfinite().all().int64_value(&[]) == 1;
            assert!(replica.parameters().all(|(_, v)| gradient_is_finite(v)), "{name} {batch_norm:?} {rows}");
        }
    }
}

#[test]
fn bad_options_are_refused_with_the_nearest_name_or_the_valid_values() {
    let message = |name, options| validate(&spec(name, BatchNorm::Sync, options)).unwrap_err().to_string();
    assert!(message("nim", json!({})).contains("did you mean `nin`?"));
    assert!(
        message("nin", json!({ "class": 3 })).contains("option `class` is unknown; did you mean `classes`?")
    );
    assert!(message("nin", json!({ "widths": "tiny" })).contains("`cifar`, `mnist`"));
    assert!(message("nin", json!({ "classes": 0 })).contains("`classes` = 0 is not a whole number"));
    assert!(message("mlp", json!({ "dropout": 1.0 })).contains("from 0 to below 1"));
    assert!(message("nin", json!({ "final_relu": 1 })).contains("neither true nor false"));
}

#[test]
fn latent_rows_depend_on_their_sample_and_not_on_the_batch() {
    let rows = |samples: &[u64]| gan::latent(1, 2, 0, samples, 5, Kind::Double).unwrap();
    assert_eq!(rows(&[3, 4, 5]).narrow(0, 1, 1), rows(&[4]));
    assert_ne!(rows(&[3]), rows(&[4]));
}
