//! Reads an architecture's own keys of a job file.

use super::{ModelInfo, OptionInfo};
use crate::error::NnError;
use crate::layers::NormSpec;
use lockstep_common::job::ModelSpec;
use lockstep_common::suggest::did_you_mean;
use serde_json::Value;

/// The logits of a network for ImageNet.
pub(super) const CLASSES: OptionInfo = OptionInfo { name: "classes", default: "1000", meaning: "logits" };
/// [`CLASSES`]'s default.
pub(super) const IMAGENET_CLASSES: i64 = 1000;
pub(super) const IN_CHANNELS: OptionInfo =
    OptionInfo { name: "in_channels", default: "3", meaning: "channels of the images" };
pub(super) const BN_EPS: OptionInfo =
    OptionInfo { name: "bn_eps", default: "0.001", meaning: "added to the variance by batch norm" };
pub(super) const BN_MOMENTUM: OptionInfo = OptionInfo {
    name: "bn_momentum",
    default: "0.1",
    meaning: "share of a new batch in the running statistics (1 - TensorFlow's decay)",
};

/// Refuses a key that `info` does not list.
pub(super) fn check_names(info: &ModelInfo, spec: &ModelSpec) -> Result<(), NnError> {
    let known = || info.options.iter().map(|o| o.name);
    match spec.options.keys().find(|key| !known().any(|name| name == key.as_str())) {
        Some(key) => Err(fault(spec, key, format!("is unknown{}", did_you_mean(key, known())))),
        None => Ok(()),
    }
}

/// A whole number from 1 to a million, or `default`.
pub(super) fn count(spec: &ModelSpec, name: &str, default: i64) -> Result<i64, NnError> {
    let valid = |value: &Value| value.as_i64().filter(|n| (1..=1_000_000).contains(n));
    read(spec, name, default, valid, "is not a whole number from 1 to 1000000")
}

/// The channels of the images: `in_channels`, or what a job is checked for without it.
pub(super) fn channels(spec: &ModelSpec) -> Result<i64, NnError> {
    match spec.channels() {
        Some(own) => count(spec, "in_channels", own.into()),
        None => Err(fault(spec, "in_channels", "is unknown".to_owned())),
    }
}

/// The numbers of an image of a network that takes or makes images as plain numbers, in the same way.
pub(super) fn numbers(spec: &ModelSpec) -> Result<i64, NnError> {
    match spec.numbers() {
        Some((option, own)) => count(spec, option, own.into()),
        None => Err(fault(spec, "inputs", "is unknown".to_owned())),
    }
}

/// A probability to drop, in [0, 1), or `default`.
pub(super) fn drop_rate(spec: &ModelSpec, name: &str, default: f64) -> Result<f64, NnError> {
    let valid = |value: &Value| value.as_f64().filter(|p| (0.0..1.0).contains(p));
    read(spec, name, default, valid, "is not a number from 0 to below 1")
}

/// A number from `range`'s ends, or `default`.
pub(super) fn number(
    spec: &ModelSpec,
    name: &str,
    default: f64,
    range: std::ops::RangeInclusive<f64>,
) -> Result<f64, NnError> {
    let valid = |value: &Value| value.as_f64().filter(|x| range.contains(x));
    let problem = format!("is not a number from {} to {}", range.start(), range.end());
    read(spec, name, default, valid, &problem)
}

/// The constants of the network's batch norms: `bn_eps` or the reference's `eps`, and `bn_momentum` or PyTorch's.
pub(super) fn norm(spec: &ModelSpec, eps: f64) -> Result<NormSpec, NnError> {
    Ok(NormSpec {
        eps: number(spec, "bn_eps", eps, 0.0..=1.0)?,
        momentum: number(spec, "bn_momentum", NormSpec::default().momentum, 0.0..=1.0)?,
    })
}

/// True, false or `default`.
pub(super) fn switch(spec: &ModelSpec, name: &str, default: bool) -> Result<bool, NnError> {
    read(spec, name, default, Value::as_bool, "is neither true nor false")
}

/// One of `choices` by its name, the first by default.
pub(super) fn choice<T: Copy>(spec: &ModelSpec, name: &str, choices: &[(&str, T)]) -> Result<T, NnError> {
    let valid = |value: &Value| {
        let text = value.as_str()?;
        choices.iter().find(|(choice, _)| *choice == text).map(|(_, value)| *value)
    };
    let names: Vec<_> = choices.iter().map(|(choice, _)| format!("`{choice}`")).collect();
    read(spec, name, choices[0].1, valid, &format!("is not one of {}", names.join(", ")))
}

fn read<T>(
    spec: &ModelSpec,
    name: &str,
    default: T,
    valid: impl Fn(&Value) -> Option<T>,
    problem: &str,
) -> Result<T, NnError> {
    match spec.options.get(name) {
        None => Ok(default),
        Some(value) => valid(value).ok_or_else(|| fault(spec, name, format!("= {value} {problem}"))),
    }
}

fn fault(spec: &ModelSpec, option: &str, problem: String) -> NnError {
    NnError::Option { model: spec.name.clone(), option: option.to_owned(), problem }
}
