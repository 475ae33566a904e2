//! The binary version of CIFAR-10 and CIFAR-100: labels of one byte each, then 3 × 32 × 32 bytes, record by record.
//!
//! A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009; the layout is that of its web page.

use super::shards::ShardWriter;
use super::statistics::Statistics;
use super::{Finished, ImportProgress, Progress, Staged, source_error, stage};
use crate::dataset::manifest::{Encoding, SampleShape};
use crate::dataset::{DatasetError, DatasetName, Store};
use crate::durable::{self, TemporaryDir};
use std::path::{Path, PathBuf};

const SHAPE: SampleShape = SampleShape { channels: 3, height: 32, width: 32 };
/// 3 × 32 × 32.
const IMAGE_BYTES: usize = 3072;

/// How the two sets differ.
pub(super) struct Layout {
    title: &'static str,
    splits: [(&'static str, &'static [&'static str]); 2],
    /// Labels before each image; the last is the class.
    label_bytes: usize,
    classes: u32,
    names_file: &'static str,
}

pub(super) const TEN: Layout = Layout {
    title: "CIFAR-10",
    splits: [
        (
            "train",
            &[
                "data_batch_1.bin",
                "data_batch_2.bin",
                "data_batch_3.bin",
                "data_batch_4.bin",
                "data_batch_5.bin",
            ],
        ),
        ("test", &["test_batch.bin"]),
    ],
    label_bytes: 1,
    classes: 10,
    names_file: "batches.meta.txt",
};

/// The class is the fine label, the second of two.
pub(super) const HUNDRED: Layout = Layout {
    title: "CIFAR-100",
    splits: [("train", &["train.bin"]), ("test", &["test.bin"])],
    label_bytes: 2,
    classes: 100,
    names_file: "fine_label_names.txt",
};

/// Imports the splits in the folder `source`.
pub(super) fn import(
    store: &Store,
    name: &DatasetName,
    layout: &Layout,
    source: &Path,
    progress: Progress<'_>,
) -> Result<Vec<Staged>, DatasetError> {
    let class_names = class_names(layout, source)?;
    let mut staged = Vec::new();
    for (split, files) in layout.splits {
        let paths: Vec<PathBuf> = files.iter().map(|file| source.join(file)).collect();
        if paths.iter().all(|path| !path.exists()) {
            continue;
        }
        let name = name.join(split)?;
        staged.push(import_split(store, name, layout, &paths, class_names.clone(), progress)?);
    }
    if staged.is_empty() {
        let files: Vec<_> =
            layout.splits.iter().flat_map(|(_, files)| files.iter().map(|f| format!("`{f}`"))).collect();
        let problem = format!("no files of {}: expected a folder with {}", layout.title, files.join(", "));
        return Err(source_error(source, problem));
    }
    Ok(staged)
}

fn import_split(
    store: &Store,
    name: DatasetName,
    layout: &Layout,
    files: &[PathBuf],
    class_names: Option<Vec<String>>,
    progress: Progress<'_>,
) -> Result<Staged, DatasetError> {
    let record_bytes = layout.label_bytes + IMAGE_BYTES;
    let mut shards = ShardWriter::new(TemporaryDir::new_in(store.shards_dir())?);
    let mut statistics = Statistics::new(3);
    let mut done = 0;
    for path in files {
        let bytes = durable::read(path)?;
        if bytes.is_empty() || bytes.len() % record_bytes != 0 {
            let problem = format!(
                "it has {} bytes, not a multiple of the {record_bytes} of one record of {}; it is truncated or another file",
                bytes.len(),
                layout.title
            );
            return Err(source_error(path, problem));
        }
        for (record, bytes) in bytes.chunks_exact(record_bytes).enumerate() {
            let (labels, pixels) = bytes.split_at(layout.label_bytes);
            let label = labels.last().copied().map_or(0, u32::from);
            if label >= layout.classes {
                let problem = format!(
                    "record {record} has label {label} and {} has the labels 0 to {}; the file is damaged or of another set",
                    layout.title,
                    layout.classes - 1
                );
                return Err(source_error(path, problem));
            }
            statistics.add_planes(pixels);
            done += 1;
            if shards.push(label, pixels)? {
                progress(ImportProgress { dataset: &name, done, total: None });
            }
        }
    }
    progress(ImportProgress { dataset: &name, done, total: Some(done) });
    let finished = Finished {
        name,
        shape: SHAPE,
        smallest: None,
        encoding: Encoding::RawU8,
        classes: layout.classes,
        class_names,
        statistics,
        left_out: Vec::new(),
    };
    stage(store, shards, finished)
}

/// The classes' names, if their file is there.
fn class_names(layout: &Layout, source: &Path) -> Result<Option<Vec<String>>, DatasetError> {
    let path = source.join(layout.names_file);
    if !path.exists() {
        return Ok(None);
    }
    super::read_class_names(&path).and_then(|names| {
        if names.len() == layout.classes as usize {
            return Ok(Some(names));
        }
        let problem =
            format!("it has {} names and {} has {} classes", names.len(), layout.title, layout.classes);
        Err(source_error(&path, problem))
    })
}
