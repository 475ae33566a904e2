//! `worker models`.

use anyhow::Result;
use lockstep_common::job::ModelSpec;
use lockstep_common::output::output;
use lockstep_nn::models::{ModelInfo, registry, validate};
use std::io::Write;

/// Prints the registry of architectures, each with the parameters that it has by default.
pub(crate) fn list(json: bool) -> Result<()> {
    let mut out = output();
    if json {
        let rows =
            registry().iter().map(|info| Ok(row(info, parameters(info)?))).collect::<Result<Vec<_>>>()?;
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
        return Ok(());
    }
    writeln!(out, "{:<19} {:>11}  REFERENCE", "NAME", "PARAMETERS")?;
    for info in registry() {
        writeln!(out, "{:<19} {:>11}  {}", info.name, parameters(info)?, info.reference)?;
        writeln!(out, "    {}", info.summary)?;
        writeln!(out, "    input {}", info.input)?;
        for option in info.options {
            writeln!(out, "    {:<14} default {:<15} {}", option.name, option.default, option.meaning)?;
        }
    }
    Ok(())
}

fn parameters(info: &ModelInfo) -> Result<u64> {
    let spec = ModelSpec { name: info.name.to_owned(), ..ModelSpec::default() };
    Ok(validate(&spec)?.parameters)
}

fn row(info: &ModelInfo, parameters: u64) -> serde_json::Value {
    let options: Vec<_> = info
        .options
        .iter()
        .map(|o| serde_json::json!({ "name": o.name, "default": o.default, "meaning": o.meaning }))
        .collect();
    serde_json::json!({
        "name": info.name, "summary": info.summary, "parameters": parameters,
        "input": info.input, "reference": info.reference, "options": options,
    })
}
