//! `coordinator dataset`: works on the data directory, whether a coordinator runs or not.

use crate::cli::{DatasetCommand, DatasetFormat};
use crate::data_dir::DataDir;
use crate::output::{hint, note, say, say_json, table};
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use lockstep_common::dataset::{ImportOutcome, Manifest, Store};
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;

pub(super) fn run(dir: &DataDir, command: DatasetCommand) -> Result<ExitCode> {
    let store = Store::open(&dir.datasets())?;
    match command {
        DatasetCommand::Add { name, format: DatasetFormat::Idx, path } => add(&store, &name, &path),
        DatasetCommand::Ls { json } => ls(&store, json.json),
        DatasetCommand::Verify { name } => verify(&store, name.as_deref()),
    }
}

fn add(store: &Store, name: &str, path: &Path) -> Result<ExitCode> {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}") {
        bar.set_style(style);
    }
    let outcomes = store.import_idx(name, path, |progress| {
        bar.set_message(progress.dataset.to_string());
        bar.set_length(progress.total);
        bar.set_position(progress.done);
    });
    bar.finish_and_clear();
    for outcome in outcomes? {
        let manifest = outcome.manifest();
        let what = match outcome {
            ImportOutcome::Added(_) => "added",
            ImportOutcome::Unchanged(_) => "is there already:",
        };
        let (samples, shards) = (manifest.samples, manifest.shards.len());
        say(format_args!("{what} `{}`, {samples} samples in {shards} shards", manifest.name));
    }
    hint(format_args!("name it in a job file: train = \"{name}/train\"; `coordinator dataset ls` lists all"));
    Ok(ExitCode::SUCCESS)
}

fn ls(store: &Store, json: bool) -> Result<ExitCode> {
    let datasets = store.list()?;
    if json {
        let object = |m: &Manifest| {
            json!({
                "name": m.name.to_string(),
                "id": m.id,
                "samples": m.samples,
                "classes": m.classes,
                "channels": m.shape.channels,
                "height": m.shape.height,
                "width": m.shape.width,
                "shards": m.shards.len(),
                "bytes": m.bytes(),
            })
        };
        say_json(&datasets.iter().map(object).collect::<Vec<_>>());
        return Ok(ExitCode::SUCCESS);
    }
    let head = ["DATASET", "SAMPLES", "SHAPE", "CLASSES", "SHARDS", "MB"].map(str::to_owned).to_vec();
    let row = |m: &Manifest| {
        vec![
            m.name.to_string(),
            m.samples.to_string(),
            format!("{}x{}x{}", m.shape.channels, m.shape.height, m.shape.width),
            m.classes.to_string(),
            m.shards.len().to_string(),
            format!("{:.1}", m.bytes() as f64 / 1e6),
        ]
    };
    table(&std::iter::once(head).chain(datasets.iter().map(row)).collect::<Vec<_>>());
    hint(if datasets.is_empty() {
        "`coordinator dataset add NAME --format idx FOLDER` imports one"
    } else {
        "`coordinator dataset verify` checks every byte"
    });
    Ok(ExitCode::SUCCESS)
}

fn verify(store: &Store, name: Option<&str>) -> Result<ExitCode> {
    let names = match name {
        Some(name) => vec![name.to_owned()],
        None => store.list()?.iter().map(|m| m.name.to_string()).collect(),
    };
    let mut bad = 0;
    for name in &names {
        let report = store.verify(name)?;
        if report.is_good() {
            say(format_args!("`{name}` is good: {} shards", report.shards.len()));
        }
        for shard in report.bad() {
            bad += 1;
            note(format_args!("error: `{name}`: shard {shard}"));
        }
    }
    if bad > 0 {
        hint("add the dataset again from its source; damaged shards are replaced");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
