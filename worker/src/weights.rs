//! Files of weights to begin with: a job's, and `worker weights`, which says what to write in a job file for one.

use crate::tasks::NetworkPlan;
use crate::train::error::TrainError;
use anyhow::{Context, Result};
use lockstep_common::checkpoint::decode_tensors;
use lockstep_common::digest::blake3_hex;
use lockstep_common::job::{BatchNorm, ModelSpec};
use lockstep_common::output::output;
use lockstep_nn::vars::Vars;
use lockstep_nn::weights;
use std::io::Write;
use std::path::Path;
use tch::{Device, Kind};

/// The variables of a network whose section names a file of weights.
///
/// Fails with one line that names the file: it is not there, not the one that the job was written for, or does not fit.
pub(crate) fn load(plan: &NetworkPlan, kind: Kind, device: Device) -> Result<Option<Vars>, TrainError> {
    let (Some(path), Some(expected)) = (&plan.model.weights, &plan.model.weights_blake3) else {
        return Ok(None);
    };
    let refused = |what: String| TrainError::Fatal(format!("weights `{path}`: {what}"));
    let file = std::fs::read(path).map_err(|e| {
        refused(format!("{e}; every worker reads the file by this path, from where the worker was started"))
    })?;
    let found = blake3_hex(&file);
    if found != *expected {
        return Err(refused(format!("its BLAKE3 is {found}, and the job is for a file with {expected}")));
    }
    let tensors = decode_tensors(&file).map_err(|e| refused(e.to_string()))?;
    let loaded = weights::load(plan.name, &plan.model, &tensors, kind, device);
    loaded.map(Some).map_err(|e| refused(e.to_string()))
}

/// Prints the section of a job file that begins with the weights in `path`.
pub(crate) fn describe(path: &Path) -> Result<()> {
    let shown = path.display();
    let file = std::fs::read(path).with_context(|| format!("cannot read `{shown}`"))?;
    let tensors = decode_tensors(&file).with_context(|| format!("`{shown}` cannot be read"))?;
    let spec = weights::identify(&tensors).with_context(|| format!("weights `{shown}`"))?;
    let mut out = output();
    writeln!(out, "[model]")?;
    for (key, value) in section(&spec) {
        writeln!(out, "{key} = {value}")?;
    }
    writeln!(out, "weights = {}", serde_json::Value::from(path.to_string_lossy()))?;
    writeln!(out, "weights_blake3 = \"{}\"", blake3_hex(&file))?;
    Ok(())
}

/// Keys and values of a network's section. A JSON string, number or truth value is one of TOML as well.
fn section(spec: &ModelSpec) -> Vec<(String, serde_json::Value)> {
    let mut keys = vec![("name".to_owned(), spec.name.as_str().into())];
    if spec.batch_norm == BatchNorm::None {
        keys.push(("batch_norm".to_owned(), "none".into()));
    }
    keys.extend(spec.options.iter().map(|(key, value)| (key.clone(), value.clone())));
    keys
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::checkpoint::encode_tensors;
    use lockstep_common::digest::TensorBytes;
    use lockstep_common::job::OptimizerSpec;
    use lockstep_nn::bytes::RawTensor;
    use lockstep_nn::models;

    fn plan(path: &Path, blake3: &str, classes: u64) -> NetworkPlan {
        let options = serde_json::json!({ "inputs": 4, "hidden": 2, "classes": classes });
        let model = ModelSpec {
            name: "mlp".to_owned(),
            batch_norm: BatchNorm::None,
            weights: Some(path.display().to_string()),
            weights_blake3: Some(blake3.to_owned()),
            options: options.as_object().cloned().unwrap(),
            ..ModelSpec::default()
        };
        let optimizer: OptimizerSpec =
            serde_json::from_value(serde_json::json!({ "name": "sgd", "lr": 0.1 })).unwrap();
        NetworkPlan { name: "model", model, optimizer }
    }

    #[test]
    fn a_job_begins_with_the_bytes_that_it_names_or_says_why_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let mut vars = Vars::new("model", 9, Kind::Float, Device::Cpu);
        models::build(&plan(&path, "", 3).model, &mut vars.root()).unwrap();
        let raw: Vec<_> =
            vars.iter().map(|(n, v)| (n.to_owned(), RawTensor::copy_from(&v.tensor).unwrap())).collect();
        let file = encode_tensors(raw.iter().map(|(name, raw)| TensorBytes {
            name: name.as_str().into(),
            dtype: raw.dtype.into(),
            shape: raw.shape.as_slice().into(),
            bytes: raw.bytes.as_slice().into(),
        }))
        .unwrap();
        std::fs::write(&path, &file).unwrap();
        let blake3 = blake3_hex(&file);

        let loaded = load(&plan(&path, &blake3, 3), Kind::Float, Device::Cpu).unwrap().unwrap();
        assert_eq!(loaded.snapshot().unwrap(), vars.snapshot().unwrap());

        let message = |plan: &NetworkPlan| match load(plan, Kind::Float, Device::Cpu) {
            Err(TrainError::Fatal(line)) => line,
            other => panic!("{other:?}"),
        };
        let named = format!("weights `{}`: ", path.display());
        let checks = [
            (plan(&path, &blake3, 2), "`fc3.bias` has shape [3] instead of [2] (and 1 more"),
            (
                plan(&path, &blake3.replace(|c: char| c.is_ascii_digit(), "a"), 3),
                "the job is for a file with",
            ),
        ];
        for (plan, part) in checks {
            let line = message(&plan);
            assert!(line.starts_with(&named) && line.contains(part) && !line.contains('\n'), "{line}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(message(&plan(&path, &blake3, 3)).contains("every worker reads the file by this path"));
    }
}
