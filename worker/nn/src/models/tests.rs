use super::*;
use lockstep_common::job::{BatchNorm, catalogue};
use serde_json::json;
use tch::{Device, Kind};

fn spec(name: &str, batch_norm: BatchNorm, options: serde_json::Value) -> ModelSpec {
    let options = options.as_object().cloned().unwrap();
    ModelSpec { name: name.to_owned(), batch_norm, options, ..ModelSpec::default() }
}

fn parameters(name: &str, options: serde_json::Value) -> u64 {
    let norm =
        if name.starts_with("gan") || name == "nin" || options["variant"] == "paper" && name == "googlenet" {
            BatchNorm::None
        } else {
            BatchNorm::Sync
        };
    validate(&spec(name, norm, options)).unwrap().parameters
}

#[test]
fn parameter_counts_are_those_of_the_references() {
    assert_eq!(parameters("nin", json!({})), 966_986);
    assert_eq!(parameters("nin", json!({ "classes": 100 })), 984_356);
    assert_eq!(parameters("nin", json!({ "widths": "mnist" })), 349_674);
    assert_eq!(parameters("nin", json!({ "widths": "imagenet", "classes": 1000 })), 7_595_176);
    assert_eq!(parameters("googlenet", json!({})), 13_004_888);
    assert_eq!(parameters("googlenet", json!({ "aux": false })), 6_624_904);
    assert_eq!(parameters("googlenet", json!({ "variant": "paper" })), 13_378_280);
    assert_eq!(parameters("googlenet", json!({ "variant": "paper", "aux": false })), 6_998_552);
    assert_eq!(parameters("bn-inception", json!({})), 11_295_240);
    assert_eq!(parameters("inception-v3", json!({})), 27_161_264);
    assert_eq!(parameters("inception-v3", json!({ "aux": false })), 23_834_568);
    assert_eq!(parameters("inception-v4", json!({})), 42_679_816);
    assert_eq!(parameters("inception-resnet-v1", json!({})), 22_756_328);
    assert_eq!(parameters("inception-resnet-v2", json!({})), 55_843_464);
    assert_eq!(parameters("inception-resnet-v2", json!({ "variant": "paper" })), 32_433_928);
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
            let y = model.forward(&x, &mut fwd).unwrap().main;
            assert_eq!(y.size(), [vec![rows], output.clone()].concat(), "{name} {batch_norm:?}");
            crate::shim::backward(&y.sum(None)).unwrap();
            let gradient_is_finite =
                |v: &crate::vars::Var| v.tensor.grad().isfinite().all().int64_value(&[]) == 1;
            assert!(replica.parameters().all(|(_, v)| gradient_is_finite(v)), "{name} {batch_norm:?} {rows}");
        }
    }
}

/// A network over variables that are all zero and take no memory, and what its training needs.
fn outlined(spec: &ModelSpec) -> (Vars, Box<dyn Model>) {
    let mut vars = outline(spec).unwrap().replica().unwrap();
    let model = build(spec, &mut vars.root()).unwrap();
    (vars, model)
}

#[test]
fn images_down_to_the_documented_size_are_taken_and_smaller_ones_refused_in_one_line() {
    let cases = [
        ("nin", json!({}), 4),
        ("nin", json!({ "widths": "imagenet" }), 39),
        ("googlenet", json!({}), 15),
        ("googlenet", json!({ "variant": "paper" }), 31),
        ("bn-inception", json!({}), 7),
        ("inception-v3", json!({}), 75),
        ("inception-v4", json!({}), 75),
        ("inception-resnet-v1", json!({}), 75),
        ("inception-resnet-v2", json!({}), 75),
        ("inception-resnet-v2", json!({ "variant": "paper" }), 75),
    ];
    tch::set_num_threads(1);
    for (name, options, least) in cases {
        let is_plain = name == "googlenet" && options["variant"] == "paper";
        let spec = spec(name, if is_plain { BatchNorm::None } else { BatchNorm::Local }, options);
        assert_eq!(i64::from(spec.least_side()), least, "{name}");
        let (_, model) = outlined(&spec);
        let forward = |shape: [i64; 4]| {
            let x = Tensor::ones(shape, (Kind::Float, Device::Cpu));
            model.forward(&x, &mut Forward::evaluation())
        };
        for [height, width] in [[least, least], [least, least + 1]] {
            let output =
                forward([1, 3, height, width]).unwrap_or_else(|e| panic!("{name} {height}x{width}: {e}"));
            assert_eq!(output.main.size(), [1, classes(&spec).unwrap()], "{name}");
            assert!(output.auxiliary.is_empty(), "{name}");
        }
        let message = |shape| forward(shape).unwrap_err().to_string();
        let small = message([1, 3, least, least - 1]);
        let expected = format!(
            "model `{name}`: expected images of at least {least}x{least} pixels, got images of {least}x{}",
            least - 1
        );
        assert_eq!(small, expected);
        assert!(message([1, 1, least, least]).contains("images of 3 channels (option `in_channels`)"));
    }
}

#[test]
fn a_shard_without_samples_trains_every_network() {
    let cases = [
        ("googlenet", json!({}), 32, vec!["aux1", "aux2"]),
        ("bn-inception", json!({}), 33, vec![]),
        ("inception-v3", json!({}), 299, vec!["AuxLogits"]),
        ("inception-v4", json!({}), 75, vec![]),
        ("inception-resnet-v1", json!({}), 75, vec![]),
        ("inception-resnet-v2", json!({}), 75, vec![]),
        ("inception-resnet-v2", json!({ "variant": "paper" }), 75, vec![]),
    ];
    tch::set_num_threads(1);
    for (name, options, side, heads) in cases {
        let (vars, model) = outlined(&spec(name, BatchNorm::Sync, options));
        let mut fwd = Forward::evaluation();
        fwd.train = true;
        let x = Tensor::ones([0, 3, side, side], (Kind::Float, Device::Cpu));
        let output = model.forward(&x, &mut fwd).unwrap();
        assert_eq!(output.main.size(), [0, 1000], "{name}");
        assert_eq!(output.auxiliary.iter().map(|a| a.name).collect::<Vec<_>>(), heads, "{name}");
        let all = output.auxiliary.iter().fold(output.main.sum(None), |sum, a| sum + a.output.sum(None));
        crate::shim::backward(&all).unwrap();
        for (parameter, var) in vars.parameters() {
            assert_eq!(var.tensor.grad().abs().max().double_value(&[]), 0.0, "{name} {parameter}");
        }
    }
}

#[test]
fn networks_take_the_images_that_a_job_is_checked_for() {
    tch::set_num_threads(1);
    let forward = |spec: &ModelSpec, shape: &[i64]| {
        let (_, model) = outlined(spec);
        model.forward(&Tensor::ones(shape, (Kind::Float, Device::Cpu)), &mut Forward::evaluation())
    };
    let with_channels = [
        ("small-cnn", json!({}), 1),
        ("small-cnn", json!({ "in_channels": 2 }), 2),
        ("nin", json!({}), 3),
        ("nin", json!({ "widths": "mnist" }), 1),
        ("googlenet", json!({}), 3),
        ("bn-inception", json!({}), 3),
        ("inception-v3", json!({}), 3),
        ("inception-v4", json!({ "in_channels": 1 }), 1),
        ("inception-resnet-v1", json!({}), 3),
        ("inception-resnet-v2", json!({}), 3),
    ];
    for (name, options, channels) in with_channels {
        let spec = spec(name, BatchNorm::Local, options);
        assert_eq!((spec.channels(), spec.numbers()), (Some(channels), None), "{name}");
        let side = spec.least_side().max(8).into();
        assert!(forward(&spec, &[1, channels.into(), side, side]).is_ok(), "{name}");
        assert!(forward(&spec, &[1, i64::from(channels) + 1, side, side]).is_err(), "{name}");
    }
    for (options, inputs) in [(json!({}), 784), (json!({ "inputs": 12 }), 12)] {
        let spec = spec("mlp", BatchNorm::Local, options);
        assert_eq!((spec.channels(), spec.numbers()), (None, Some(("inputs", inputs))));
        assert!(
            forward(&spec, &[1, inputs.into()]).is_ok()
                && forward(&spec, &[1, i64::from(inputs) + 1]).is_err()
        );
    }
    for (name, option) in [("gan-generator", "outputs"), ("gan-discriminator", "inputs")] {
        assert_eq!(spec(name, BatchNorm::None, json!({})).numbers(), Some((option, 784)));
        assert_eq!(spec(name, BatchNorm::None, json!({ option: 16 })).numbers(), Some((option, 16)));
    }
}

#[test]
fn an_auxiliary_head_says_which_images_it_needs_and_can_be_left_out() {
    tch::set_num_threads(1);
    let forward = |options| {
        let (_, model) = outlined(&spec("inception-v3", BatchNorm::Local, options));
        let mut fwd = Forward::evaluation();
        fwd.train = true;
        fwd.samples = vec![0, 1];
        model.forward(&Tensor::ones([2, 3, 75, 75], (Kind::Float, Device::Cpu)), &mut fwd)
    };
    let message = forward(json!({})).unwrap_err().to_string();
    assert!(message.contains("at least 299x299 pixels to train with `aux`, or `aux = false`"), "{message}");
    assert!(forward(json!({ "aux": false })).unwrap().auxiliary.is_empty());
    let least = |options| spec("inception-v3", BatchNorm::Local, options).least_side_in_training();
    assert_eq!((least(json!({})), least(json!({ "aux": false }))), (299, 75));
}

#[test]
fn weights_of_heads_and_scales_of_residuals_are_those_of_the_options() {
    tch::set_num_threads(1);
    let head_weights = |name, side, options| {
        let (_, model) = outlined(&spec(name, BatchNorm::Local, options));
        let mut fwd = Forward::evaluation();
        fwd.train = true;
        fwd.samples = vec![0, 1];
        let x = Tensor::ones([2, 3, side, side], (Kind::Float, Device::Cpu));
        model.forward(&x, &mut fwd).unwrap().auxiliary.iter().map(|a| a.weight).collect::<Vec<_>>()
    };
    assert_eq!(head_weights("googlenet", 32, json!({})), [0.3, 0.3]);
    assert_eq!(head_weights("googlenet", 32, json!({ "aux_weight": 0.5 })), [0.5, 0.5]);
    assert_eq!(head_weights("inception-v3", 299, json!({})), [0.4]);
    let scales = |options| inception_resnet::scales(&spec("inception-resnet-v1", BatchNorm::Sync, options));
    assert_eq!(scales(json!({})).unwrap(), [0.17, 0.10, 0.20]);
    assert_eq!(scales(json!({ "residual_scale": 0.3 })).unwrap(), [0.3; 3]);
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
    assert!(message("googlenet", json!({ "aux_weight": -1 })).contains("`aux_weight` = -1 is not a number"));
    assert!(message("googlenet", json!({ "variant": "paper" })).contains("set `batch_norm = \"none\"`"));
    assert!(message("nin", json!({ "final_relu": 1 })).contains("neither true nor false"));
}

#[test]
fn latent_rows_depend_on_their_sample_and_not_on_the_batch() {
    let rows = |samples: &[u64]| gan::latent(1, 2, 0, samples, 5, Kind::Double).unwrap();
    assert_eq!(rows(&[3, 4, 5]).narrow(0, 1, 1), rows(&[4]));
    assert_ne!(rows(&[3]), rows(&[4]));
}
