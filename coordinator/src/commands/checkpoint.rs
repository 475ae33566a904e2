//! `coordinator checkpoint`: works on the data directory, whether a coordinator runs or not.

use crate::cli::CheckpointCommand;
use crate::data_dir::DataDir;
use crate::output::{hint, note, say, say_json, table};
use anyhow::{Context, Result, bail};
use lockstep_common::checkpoint::{CheckpointEntry, CheckpointStore};
use lockstep_common::ids::JobId;
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;

pub(super) fn run(dir: &DataDir, command: CheckpointCommand) -> Result<ExitCode> {
    match command {
        CheckpointCommand::Ls { job, json } => ls(&open(dir, job)?, job, json.json),
        CheckpointCommand::Verify { job } => verify(&open(dir, job)?, job),
        CheckpointCommand::Export { job, step, average, file } => {
            export(&open(dir, job)?, job, step, average, &file)
        }
    }
}

fn open(dir: &DataDir, job: JobId) -> Result<CheckpointStore> {
    let folder = dir.job(job);
    if !folder.root().is_dir() {
        bail!("there is no job {job} in `{}`; `coordinator jobs` lists them", dir.root().display());
    }
    Ok(folder.checkpoint_store()?)
}

fn ls(store: &CheckpointStore, job: JobId, json: bool) -> Result<ExitCode> {
    let entries = store.list()?;
    if json {
        let object = |e: &CheckpointEntry| json!({ "job": job.to_string(), "step": e.step, "path": e.path });
        say_json(&entries.iter().map(object).collect::<Vec<_>>());
        return Ok(ExitCode::SUCCESS);
    }
    let head = ["STEP", "FOLDER"].map(str::to_owned).to_vec();
    let row = |e: &CheckpointEntry| vec![e.step.to_string(), e.path.display().to_string()];
    table(&std::iter::once(head).chain(entries.iter().map(row)).collect::<Vec<_>>());
    hint(format_args!(
        "`coordinator checkpoint export {job} FILE.safetensors` writes the newest for other programs"
    ));
    Ok(ExitCode::SUCCESS)
}

fn verify(store: &CheckpointStore, job: JobId) -> Result<ExitCode> {
    let mut bad = 0;
    for entry in store.list()? {
        match store.verify(entry.step) {
            Ok(manifest) => {
                say(format_args!("step {} is good: weights {}", entry.step, manifest.weights_digest))
            }
            Err(e) => {
                bad += 1;
                note(format_args!("error: step {}: {e}", entry.step));
            }
        }
    }
    if bad > 0 {
        hint(format_args!("{job} resumes from the newest good one; the others can be removed"));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn export(
    store: &CheckpointStore,
    job: JobId,
    step: Option<u64>,
    average: bool,
    file: &Path,
) -> Result<ExitCode> {
    let step = match step {
        Some(step) => step,
        None => {
            let latest = store.latest_good()?;
            latest.refused.iter().for_each(|refused| note(format_args!("warning: {refused}")));
            let good = latest.good.with_context(|| format!("{job} has no good checkpoint"))?;
            good.info.step
        }
    };
    let weights_digest = store.export(step, average, file)?;
    let what = if average { "the average at step" } else { "step" };
    say(format_args!("wrote {what} {step} of {job} to `{}`, weights {weights_digest}", file.display()));
    hint("safetensors.torch.load_file reads it in Python");
    Ok(ExitCode::SUCCESS)
}
