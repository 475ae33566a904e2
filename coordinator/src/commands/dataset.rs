//! `coordinator dataset`: works on the data directory, whether a coordinator runs or not.

use crate::cli::{DatasetCommand, DatasetFormat};
use crate::data_dir::DataDir;
use crate::output::{hint, note, say, say_json, table};
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use lockstep_common::dataset::{
    ImageImport, ImportOutcome, Imported, Manifest, SampleShape, SampleSize, SourceFormat, Store,
};
use lockstep_common::shown::counted;
use lockstep_images::Inspector;
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;

/// How many of the corrupt images that were left out are named.
const NAMED: usize = 20;

pub(super) fn run(dir: &DataDir, command: DatasetCommand) -> Result<ExitCode> {
    let store = Store::open(&dir.datasets())?;
    match command {
        DatasetCommand::Add { name, format, path, skip_corrupt, classes_of } => {
            let classes_of = classes_of.as_deref();
            let images = ImageImport { inspect: &Inspector, skip_corrupt, classes_of };
            add(&store, &name, source_format(format), &path, images)
        }
        DatasetCommand::Whiten { name, new } => whiten(&store, &name, &new),
        DatasetCommand::Ls { json } => ls(&store, json.json),
        DatasetCommand::Verify { name } => verify(&store, name.as_deref()),
    }
}

fn source_format(format: DatasetFormat) -> SourceFormat {
    match format {
        DatasetFormat::Idx => SourceFormat::Idx,
        DatasetFormat::Cifar10 => SourceFormat::Cifar10,
        DatasetFormat::Cifar100 => SourceFormat::Cifar100,
        DatasetFormat::Folder => SourceFormat::Folder,
        DatasetFormat::Webdataset => SourceFormat::WebDataset,
    }
}

fn add(
    store: &Store,
    name: &str,
    format: SourceFormat,
    path: &Path,
    images: ImageImport<'_>,
) -> Result<ExitCode> {
    let bar = progress_bar();
    let imported = store.import(name, format, path, images, |progress| {
        bar.set_message(progress.dataset.to_string());
        progress.total.map_or_else(|| bar.unset_length(), |total| bar.set_length(total));
        bar.set_position(progress.done);
    });
    bar.finish_and_clear();
    let imported = imported?;
    for Imported { outcome, left_out } in &imported {
        let manifest = outcome.manifest();
        let what = match outcome {
            ImportOutcome::Added(_) => "added",
            ImportOutcome::Unchanged(_) => "is there already:",
        };
        let samples = counted(manifest.samples, "sample");
        let shards = counted(manifest.shards.len() as u64, "shard");
        let skipped = match left_out.len() as u64 {
            0 => String::new(),
            n => format!(", {} left out", counted(n, "corrupt image")),
        };
        say(format_args!("{what} `{}`, {samples} in {shards}{skipped}", manifest.name));
        for corrupt in left_out.iter().take(NAMED) {
            note(format_args!("left out: `{}`: {}", corrupt.name, corrupt.why));
        }
        if left_out.len() > NAMED {
            note(format_args!("left out: {} more", left_out.len() - NAMED));
        }
    }
    if let Some(first) = imported.first() {
        let name = &first.outcome.manifest().name;
        hint(format_args!("name it in a job file: train = \"{name}\"; `coordinator dataset ls` lists all"));
    }
    Ok(ExitCode::SUCCESS)
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::no_length();
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}") {
        bar.set_style(style);
    }
    bar
}

fn whiten(store: &Store, name: &str, new: &str) -> Result<ExitCode> {
    let bar = progress_bar();
    let outcome = store.whiten(name, new, |progress| {
        bar.set_message(progress.part);
        bar.set_length(progress.total);
        bar.set_position(progress.done);
    });
    bar.finish_and_clear();
    let outcome = outcome?;
    let what = match outcome {
        ImportOutcome::Added(_) => "added",
        ImportOutcome::Unchanged(_) => "is there already:",
    };
    let Manifest { name: new, samples, .. } = outcome.manifest();
    let samples = counted(*samples, "sample");
    say(format_args!("{what} `{new}`, the {samples} of `{name}` and their whitening"));
    hint(format_args!("name it in a job file: train = \"{new}\", scale = \"gcn\", whiten = \"zca\""));
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
                "same_size": m.fixed_size().is_some(),
                "class_names": m.class_names,
                "skipped": m.skipped,
                "shards": m.shards.len(),
                "whitening": m.whitening.is_some(),
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
            shape(m),
            m.classes.to_string(),
            m.shards.len().to_string(),
            format!("{:.1}", m.bytes() as f64 / 1e6),
        ]
    };
    table(&std::iter::once(head).chain(datasets.iter().map(row)).collect::<Vec<_>>());
    hint(if datasets.is_empty() {
        "`coordinator dataset add NAME --format FORMAT FOLDER` imports one"
    } else {
        "`coordinator dataset verify` checks every byte"
    });
    Ok(ExitCode::SUCCESS)
}

/// Channels, height and width; from the smallest to the largest where they differ.
fn shape(m: &Manifest) -> String {
    let SampleShape { channels, height, width } = m.shape;
    let side =
        |least: u32, most: u32| if least == most { most.to_string() } else { format!("{least}-{most}") };
    let smallest = m.smallest.unwrap_or(SampleSize { height, width });
    format!("{channels}x{}x{}", side(smallest.height, height), side(smallest.width, width))
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
            say(format_args!("`{name}` is good: {}", counted(report.shards.len() as u64, "shard")));
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
