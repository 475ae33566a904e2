//! Weights that another program may have written: whose they are, and whether a network can take them.
//!
//! A file holds what a PyTorch state dict holds. `num_batches_tracked`, which PyTorch's batch norms count and nothing
//! here needs, is passed over; every other name must be one of the network's, and the reverse.

mod nearest;

use crate::bytes::RawTensor;
use crate::error::NnError;
use crate::models::{self, ModelInfo, registry};
use crate::vars::Vars;
use lockstep_common::checkpoint::BATCH_COUNT;
use lockstep_common::digest::TensorBytes;
use lockstep_common::job::{BatchNorm, ModelSpec};
use lockstep_common::shown::shown;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// Shapes by name.
type Shapes<'a> = BTreeMap<&'a str, &'a [usize]>;

/// The variables of the network `network`, described by `spec`, with the values in `tensors`, rounded to `kind`.
///
/// Fails with one line that says what does not fit: another architecture, other options, or the first tensor that is
/// missing, unknown, or of another shape or type.
pub fn load(
    network: &str,
    spec: &ModelSpec,
    tensors: &[TensorBytes<'_>],
    kind: Kind,
    device: Device,
) -> Result<Vars, NnError> {
    let mut outline = Vars::outline(network);
    models::build(spec, &mut outline.root())?;
    let shapes = shapes(tensors);
    if let Some(problem) = misfit(&outline, &shapes) {
        let whose = identify_shapes(&shapes).map(|found| difference(spec, &found));
        return Err(NnError::Weights(whose.unwrap_or(problem)));
    }
    let mut values = BTreeMap::new();
    for tensor in tensors.iter().filter(|t| shapes.contains_key(&*t.name)) {
        if !is_of_weights(&tensor.dtype) {
            let (name, dtype) = (&tensor.name, &tensor.dtype);
            return Err(NnError::Weights(format!("`{name}` has type {dtype}, which is none of weights")));
        }
        let stored = RawTensor::tensor_of(&tensor.dtype, &tensor.shape, &tensor.bytes)?;
        if let Some(problem) = unsound(&tensor.name, &stored)? {
            return Err(NnError::Weights(problem));
        }
        values.insert(tensor.name.to_string(), stored.f_to_kind(kind)?);
    }
    outline.filled(kind, device, &values)
}

/// The classifier or other network whose weights these are, with the options that its shapes tell.
///
/// Fails saying what keeps them from being those of the network that has most of their names: in several lines, as there is
/// much to say.
pub fn identify(tensors: &[TensorBytes<'_>]) -> Result<ModelSpec, NnError> {
    let shapes = shapes(tensors);
    match identify_shapes(&shapes) {
        Some(spec) if tensors.iter().all(|t| !shapes.contains_key(&*t.name) || is_of_weights(&t.dtype)) => {
            for tensor in tensors.iter().filter(|t| shapes.contains_key(&*t.name)) {
                let values = RawTensor::tensor_of(&tensor.dtype, &tensor.shape, &tensor.bytes)?;
                if let Some(problem) = unsound(&tensor.name, &values)? {
                    return Err(NnError::Weights(problem));
                }
            }
            Ok(spec)
        }
        _ => Err(NnError::Weights(nearest::differences(tensors, &shapes))),
    }
}

/// What makes `values` of no use as the tensor `name` of a network.
fn unsound(name: &str, values: &Tensor) -> Result<Option<String>, NnError> {
    let count = |what: Tensor| what.f_sum(Kind::Int64)?.f_int64_value(&[]);
    let of = values.numel();
    match count(values.f_isfinite()?.f_logical_not()?)? {
        0 => {}
        n => return Ok(Some(format!("{n} of the {of} values of `{}` are not finite numbers", shown(name)))),
    }
    let negative = if name.ends_with("running_var") { count(values.f_lt(0.0)?)? } else { 0 };
    Ok((negative > 0).then(|| format!("{negative} of the {of} variances in `{}` are negative", shown(name))))
}

/// Whether weights can have the element type `dtype`, as safetensors names it.
fn is_of_weights(dtype: &str) -> bool {
    matches!(dtype, "F64" | "F32" | "F16" | "BF16")
}

fn shapes<'a>(tensors: &'a [TensorBytes<'_>]) -> Shapes<'a> {
    let is_count = |name: &str| name.rsplit('.').next() == Some(BATCH_COUNT);
    tensors.iter().filter(|t| !is_count(&t.name)).map(|t| (&*t.name, &*t.shape)).collect()
}

fn size(tensor: &Tensor) -> Vec<usize> {
    tensor.size().into_iter().map(|side| side as usize).collect()
}

/// The first thing that keeps `shapes` from being those of `outline`, and how many more there are.
fn misfit(outline: &Vars, shapes: &Shapes<'_>) -> Option<String> {
    let unknown =
        shapes.keys().filter(|name| outline.var(name).is_err()).map(|n| format!("`{n}` is unknown"));
    let wrong = outline.iter().filter_map(|(name, var)| match shapes.get(name) {
        None => Some(format!("`{name}` is missing")),
        Some(shape) if size(&var.tensor) != *shape => {
            Some(format!("`{name}` has shape {shape:?} instead of {:?}", var.tensor.size()))
        }
        Some(_) => None,
    });
    let mut problems = wrong.chain(unknown);
    let first = problems.next()?;
    Some(match problems.count() {
        0 => first,
        more => format!("{first} (and {more} more that do not fit)"),
    })
}

fn identify_shapes(shapes: &Shapes<'_>) -> Option<ModelSpec> {
    registry().iter().flat_map(forms).find_map(|spec| {
        let outline = models::outline(&spec).ok()?;
        if outline.iter().count() != shapes.len() {
            return None;
        }
        let spec = adapted(spec, &outline, shapes)?;
        let outline = models::outline(&spec).ok()?;
        misfit(&outline, shapes).is_none().then_some(spec)
    })
}

/// `spec` with the classes and channels that `shapes` have where those of `outline` are others.
fn adapted(mut spec: ModelSpec, outline: &Vars, shapes: &Shapes<'_>) -> Option<ModelSpec> {
    for (name, var) in outline.iter() {
        let (mine, theirs) = (size(&var.tensor), *shapes.get(name)?);
        let differ: Vec<_> = (0..mine.len()).filter(|&i| theirs.get(i) != Some(&mine[i])).collect();
        let option = match differ[..] {
            [] => continue,
            [0] => ("classes", theirs.first()?),
            [1] => ("in_channels", theirs.get(1)?),
            _ => return None,
        };
        spec.options.insert(option.0.to_owned(), (*option.1).into());
    }
    Some(spec)
}

/// The forms of an architecture that have other names or shapes than its default one.
fn forms(info: &ModelInfo) -> Vec<ModelSpec> {
    let base = |batch_norm| ModelSpec { name: info.name.to_owned(), batch_norm, ..ModelSpec::default() };
    let mut forms = vec![base(BatchNorm::Sync), base(BatchNorm::None)];
    let alternatives = [
        ("variant", "paper".into()),
        ("widths", "mnist".into()),
        ("widths", "imagenet".into()),
        ("aux", false.into()),
    ];
    for (option, value) in alternatives {
        if info.options.iter().any(|o| o.name == option) {
            let others: Vec<_> = forms.iter().cloned().map(|form| with(form, option, &value)).collect();
            forms.extend(others);
        }
    }
    forms
}

fn with(mut spec: ModelSpec, option: &str, value: &serde_json::Value) -> ModelSpec {
    spec.options.insert(option.to_owned(), value.clone());
    spec
}

/// What tells `found` from the network that was wanted.
fn difference(wanted: &ModelSpec, found: &ModelSpec) -> String {
    if wanted.name != found.name {
        return format!("these are the weights of `{}`, not of `{}`", found.name, wanted.name);
    }
    let mut options: Vec<_> = found
        .options
        .iter()
        .filter(|(name, value)| wanted.options.get(*name) != Some(value))
        .map(|(name, value)| format!("`{name} = {value}`"))
        .collect();
    // What is said of the network that was wanted and is the default of the one that was found.
    let defaults = wanted.options.keys().filter(|name| !found.options.contains_key(*name));
    let info = registry().iter().find(|info| info.name == wanted.name);
    for name in defaults.filter(|name| SHAPING.contains(&name.as_str())) {
        let default = info.and_then(|info| info.options.iter().find(|o| o.name == name));
        let differs =
            default.filter(|option| wanted.options.get(name).is_some_and(|v| !is(v, option.default)));
        options.extend(differs.map(|option| format!("`{name}` = {}", option.default)));
    }
    if (wanted.batch_norm == BatchNorm::None) != (found.batch_norm == BatchNorm::None) {
        let norm = if found.batch_norm == BatchNorm::None { "none" } else { "sync" };
        options.push(format!("`batch_norm = \"{norm}\"`"));
    }
    format!("these are the weights of a `{}` with {}", found.name, options.join(", "))
}

/// Whether `value` is written so in the registry.
fn is(value: &serde_json::Value, text: &str) -> bool {
    let written = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    written == text
}

/// The options that decide about names and shapes.
const SHAPING: [&str; 5] = ["classes", "in_channels", "variant", "widths", "aux"];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(name: &str, options: serde_json::Value) -> ModelSpec {
        let options = options.as_object().cloned().unwrap();
        ModelSpec { name: name.to_owned(), options, ..ModelSpec::default() }
    }

    /// A file's tensors: zeros in the shapes of the network, each with a count where there is a mean.
    fn stored(spec: &ModelSpec) -> Vec<TensorBytes<'static>> {
        let outline = models::outline(spec).unwrap();
        let tensor = |name: String, dtype: &'static str, shape: Vec<usize>| {
            let bytes = vec![0; shape.iter().product::<usize>() * if dtype == "I64" { 8 } else { 4 }];
            TensorBytes { name: name.into(), dtype: dtype.into(), shape: shape.into(), bytes: bytes.into() }
        };
        let mut tensors = Vec::new();
        for (name, var) in outline.iter() {
            tensors.push(tensor(name.to_owned(), "F32", size(&var.tensor)));
            if let Some(layer) = name.strip_suffix("running_mean") {
                tensors.push(tensor(format!("{layer}{BATCH_COUNT}"), "I64", vec![]));
            }
        }
        tensors
    }

    fn refusal(spec: &ModelSpec, tensors: &[TensorBytes<'_>]) -> String {
        let error = load("model", spec, tensors, Kind::Float, Device::Cpu).unwrap_err().to_string();
        assert_eq!(error.lines().count(), 1, "{error}");
        error
    }

    #[test]
    fn a_file_is_rounded_to_the_jobs_type_and_its_counts_passed_over() {
        let spec = spec("small-cnn", json!({ "width": 4 }));
        let vars = load("model", &spec, &stored(&spec), Kind::Double, Device::Cpu).unwrap();
        assert!(vars.iter().all(|(_, var)| var.tensor.kind() == Kind::Double));
        assert_eq!(vars.iter().count(), models::outline(&spec).unwrap().iter().count());
    }

    #[test]
    fn weights_of_another_network_are_refused_with_its_name() {
        let files = [
            ("googlenet", json!({ "classes": 10 })),
            ("inception-v3", json!({})),
            ("inception-v4", json!({ "in_channels": 1 })),
            ("inception-resnet-v2", json!({ "variant": "paper" })),
            ("nin", json!({ "widths": "mnist" })),
            ("nin", json!({ "widths": "imagenet" })),
        ];
        let wanted = spec("bn-inception", json!({}));
        for (name, options) in files {
            let error = refusal(&wanted, &stored(&spec(name, options)));
            assert_eq!(error, format!("these are the weights of `{name}`, not of `bn-inception`"));
        }
    }

    #[test]
    fn weights_of_other_options_are_refused_with_those_options() {
        let file = stored(&spec("googlenet", json!({ "aux": false })));
        assert_eq!(
            refusal(&spec("googlenet", json!({ "classes": 10 })), &file),
            "these are the weights of a `googlenet` with `aux = false`, `classes` = 1000"
        );
        let file = stored(&spec("nin", json!({})));
        assert_eq!(
            refusal(&spec("nin", json!({ "widths": "mnist", "classes": 10 })), &file),
            "these are the weights of a `nin` with `widths` = cifar"
        );
        let file = stored(&spec("inception-v4", json!({ "classes": 5 })));
        assert_eq!(
            refusal(&spec("inception-v4", json!({})), &file),
            "these are the weights of a `inception-v4` with `classes = 5`"
        );
    }

    #[test]
    fn a_missing_an_unknown_a_misshapen_and_a_mistyped_tensor_are_named() {
        let spec = spec("googlenet", json!({ "classes": 10 }));
        let mut file = stored(&spec);
        let missing = file.remove(0);
        assert_eq!(refusal(&spec, &file), format!("`{}` is missing", missing.name));
        file.push(TensorBytes { name: "extra".into(), ..missing.clone() });
        let error = refusal(&spec, &file);
        assert_eq!(error, format!("`{}` is missing (and 1 more that do not fit)", missing.name));
        file.push(missing.clone());
        assert_eq!(refusal(&spec, &file), "`extra` is unknown");
        file.pop();
        file.pop();
        let wrong: Vec<usize> = missing.shape.iter().map(|side| side + 1).collect();
        file.push(TensorBytes { shape: wrong.into(), ..missing.clone() });
        assert!(refusal(&spec, &file).starts_with(&format!("`{}` has shape ", missing.name)));
        file.pop();
        file.push(TensorBytes { dtype: "I32".into(), ..missing.clone() });
        assert!(refusal(&spec, &file).contains("has type I32"));
    }

    fn unknown(tensors: &[TensorBytes<'_>]) -> String {
        match identify(tensors) {
            Err(NnError::Weights(told)) => told,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn weights_of_no_network_are_held_against_the_one_that_has_most_of_their_names() {
        let spec = spec("googlenet", json!({ "classes": 10 }));
        let whole = stored(&spec);
        assert_eq!(identify(&whole).unwrap().options["classes"], 10);
        let count = models::outline(&spec).unwrap().iter().count();
        let place = |name: &str| whole.iter().position(|t| t.name == name).unwrap();
        let (conv, fc) = (place("conv1.conv.weight"), place("fc.bias"));
        let head = |count: usize, common: usize| {
            format!(
                "its {count} tensors are those of no network of `worker models`; nearest is `googlenet` with `classes = 10`, which has \
                 {common} of their names\n"
            )
        };

        let mut file = whole.clone();
        file.remove(fc);
        assert_eq!(unknown(&file), head(count - 1, count - 1) + "  missing: `fc.bias`");

        let mut file = whole.clone();
        file.extend(
            (0..5).map(|i| TensorBytes { name: format!("more.{i}\u{1b}").into(), ..whole[fc].clone() }),
        );
        let extra = r"  too much: `more.0\u{1b}`, `more.1\u{1b}`, `more.2\u{1b}` and 2 more";
        assert_eq!(unknown(&file), head(count + 5, count) + extra);

        let mut file = whole.clone();
        file[conv].shape = vec![64, 3, 5, 7].into();
        file[fc].shape = vec![7].into();
        let shapes = "  other shape: `conv1.conv.weight` is [64, 3, 5, 7] instead of [64, 3, 7, 7], `fc.bias` is [7] instead of [10]";
        assert_eq!(unknown(&file), head(count, count) + shapes);

        let mut file = whole.clone();
        file[fc].dtype = "I32".into();
        let dtype = "  not of type F64, F32, F16 or BF16: `fc.bias` is I32";
        assert_eq!(unknown(&file), head(count, count) + dtype);

        let within =
            |t: &TensorBytes<'static>| TensorBytes { name: format!("module.{}", t.name).into(), ..t.clone() };
        let told = unknown(&whole.iter().map(within).collect::<Vec<_>>());
        assert!(
            told.contains("begin with `module.`, and without that they are those of `googlenet` with"),
            "{told}"
        );
        let none = TensorBytes { name: "none".into(), ..whole[fc].clone() };
        assert_eq!(unknown(&[none]), "of its 1 tensor none has a name of a network of `worker models`");
    }

    #[test]
    fn weights_that_are_not_finite_and_negative_variances_are_refused_by_name() {
        let spec = spec("small-cnn", json!({ "classes": 10 }));
        let whole = stored(&spec);
        let spoilt = |name: &str, value: f32| {
            let mut file = whole.clone();
            let tensor = file.iter_mut().find(|t| t.name.ends_with(name)).unwrap();
            assert_eq!(tensor.dtype, "F32");
            tensor.bytes.to_mut()[..4].copy_from_slice(&value.to_le_bytes());
            (tensor.name.to_string(), file)
        };
        for (name, value, what) in [
            ("weight", f32::NAN, "not finite"),
            ("bias", f32::INFINITY, "not finite"),
            ("running_var", -1.0, "negative"),
        ] {
            let (name, file) = spoilt(name, value);
            for told in [refusal(&spec, &file), unknown(&file)] {
                assert!(told.contains(&name) && told.contains(what) && told.contains("1 of the"), "{told}");
            }
        }
    }
}
