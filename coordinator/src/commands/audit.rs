//! `coordinator audit`: proves that every sample counted exactly once per epoch.

use crate::data_dir::DataDir;
use crate::output::{hint, note, say, say_json};
use anyhow::{Context, Result, bail};
use lockstep_common::audit::{AuditLine, Checker, Proof, Violation};
use lockstep_common::dataset;
use lockstep_common::ids::JobId;
use lockstep_common::job::JobSpec;
use serde_json::json;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::ExitCode;

pub(super) fn run(dir: &DataDir, id: JobId, samples: bool, json: bool) -> Result<ExitCode> {
    let folder = dir.job(id);
    if !folder.root().is_dir() {
        bail!("there is no job {id} in `{}`; `coordinator jobs` lists them", dir.root().display());
    }
    let path = folder.root().join("job.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let job = JobSpec::parse(&path.to_string_lossy(), &text)?;
    let manifest = dataset::Store::open(&dir.datasets())?.manifest(&job.data.train)?;
    let path = folder.audit();
    let file = match File::open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            bail!("{id} has not started yet: there is no `{}`", path.display())
        }
        file => file.with_context(|| format!("cannot read `{}`", path.display()))?,
    };

    let mut checker = Checker::new(&job, manifest.samples)?;
    let mut violation = None;
    let (mut reader, mut line) = (BufReader::new(file), Vec::new());
    loop {
        line.clear();
        reader.read_until(b'\n', &mut line).with_context(|| format!("cannot read `{}`", path.display()))?;
        // A last line without an end is being written.
        if line.pop() != Some(b'\n') {
            break;
        }
        if let Ok(AuditLine::Start(start)) = AuditLine::from_json(&line)
            && start.dataset != manifest.id
        {
            bail!(
                "{id} was trained on another `{}` than the one in the store: it was replaced since",
                job.data.train
            );
        }
        if let Err(found) = checker.handle_line(&line) {
            violation = Some(found);
            break;
        }
    }
    match violation.map_or_else(|| checker.finish(), Err) {
        Ok(proof) => {
            if samples {
                list_samples(&checker, &proof);
            }
            tell_proof(id, &proof, json);
        }
        Err(violation) => {
            tell_violation(id, &violation, json);
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The samples of each proven step: of each of its minibatches, of each logical shard, by their number in the dataset.
fn list_samples(checker: &Checker, proof: &Proof) {
    for step in 1..=proof.steps {
        let (epoch, samples) = checker.samples(step);
        say_json(&json!({ "step": step, "epoch": epoch, "samples": samples }));
    }
}

fn tell_proof(id: JobId, proof: &Proof, json: bool) {
    if json {
        say_json(&json!({
            "job": id.to_string(),
            "ok": true,
            "complete": proof.is_complete(),
            "steps": proof.steps,
            "total_steps": proof.total_steps,
            "epochs": proof.epochs,
            "samples": proof.samples,
            "generations": proof.generations,
            "undone": proof.undone,
        }));
        return;
    }
    if proof.total_steps == 0 {
        say(format_args!("{id}: it only evaluates, and no step of it was trained"));
        return;
    }
    say(format_args!(
        "{id}: steps 1 to {} of {} counted exactly once, and every sample once in each of {} whole epochs: {} samples, \
         {} generations, {} steps undone and done again",
        proof.steps, proof.total_steps, proof.epochs, proof.samples, proof.generations, proof.undone
    ));
    if !proof.is_complete() {
        hint("the job is not at its end, or its last reports were lost; run this again when it has finished");
    }
}

fn tell_violation(id: JobId, violation: &Violation, json: bool) {
    if json {
        say_json(&json!({ "job": id.to_string(), "ok": false, "violation": violation.to_string() }));
    }
    note(format_args!("error: {id}: {violation}"));
}
