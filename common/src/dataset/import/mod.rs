//! Import: from source files to shards and a manifest.

mod cifar;
mod folder;
mod idx;
mod images;
mod shards;
mod statistics;
mod tar;

pub(super) use shards::ShardWriter;

pub use images::{Corrupt, ImageFacts, InspectImage};
pub use statistics::ChannelSums;

use super::manifest::{DType, Encoding, Manifest, SampleShape, SampleSize};
use super::{DatasetError, DatasetName, Store};
use crate::durable::{FileError, TemporaryDir};
use crate::shown::shown;
use statistics::Statistics;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// What the source files of an import are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceFormat {
    /// IDX files of images and labels, also gzipped.
    Idx,
    /// The binary version of CIFAR-10.
    Cifar10,
    /// The binary version of CIFAR-100, with its fine labels.
    Cifar100,
    /// A folder of JPEG and PNG files with a sub-folder per class.
    Folder,
    /// Tar files whose members belong together by their names, as WebDataset writes them.
    WebDataset,
}

/// How images are looked at while they are imported, what follows when one is corrupt, and which classes they have.
#[derive(Clone, Copy)]
pub struct ImageImport<'a> {
    /// Decodes every image.
    pub inspect: &'a dyn InspectImage,
    /// Leaves corrupt images out instead of refusing the whole.
    pub skip_corrupt: bool,
    /// The dataset of the store whose classes these images have, so that labels mean the same in both.
    pub classes_of: Option<&'a str>,
}

/// How far an import is.
#[derive(Clone, Copy, Debug)]
pub struct ImportProgress<'a> {
    /// The dataset being imported.
    pub dataset: &'a DatasetName,
    /// Samples written so far.
    pub done: u64,
    /// Samples in the source, where that is known before the end.
    pub total: Option<u64>,
}

/// What an import did.
#[derive(Clone, Debug, PartialEq)]
pub enum ImportOutcome {
    /// The dataset is new.
    Added(Manifest),
    /// The dataset was there already with the same content; missing or damaged shards have been replaced.
    Unchanged(Manifest),
}

impl ImportOutcome {
    /// The dataset's manifest.
    pub fn manifest(&self) -> &Manifest {
        match self {
            Self::Added(manifest) | Self::Unchanged(manifest) => manifest,
        }
    }
}

/// One imported dataset.
#[derive(Clone, Debug, PartialEq)]
pub struct Imported {
    /// The dataset.
    pub outcome: ImportOutcome,
    /// The corrupt images that were left out, in the order of the source.
    pub left_out: Vec<Corrupt>,
}

/// Names of classes, in the order of their labels, and where they come from.
#[derive(Clone, Debug)]
struct Classes {
    names: Vec<String>,
    /// As it is said in errors.
    origin: String,
}

/// Called from time to time while an import goes on.
type Progress<'a> = &'a mut dyn FnMut(ImportProgress<'_>);

impl Store {
    /// Imports `source` under `name`.
    ///
    /// A source with splits gives one dataset per split: `NAME/train` and `NAME/test`. They become visible when all of
    /// them are complete: an error leaves the store as it was. `images` is for sources of encoded images.
    pub fn import(
        &self,
        name: &str,
        format: SourceFormat,
        source: &Path,
        images: ImageImport<'_>,
        mut progress: impl FnMut(ImportProgress<'_>),
    ) -> Result<Vec<Imported>, DatasetError> {
        let name: DatasetName = name.parse()?;
        let classes = images.classes_of.map(|other| classes_of(self, other)).transpose()?;
        if classes.is_some() && !matches!(format, SourceFormat::Folder | SourceFormat::WebDataset) {
            return Err(source_error(source, "its format numbers the classes; leave `--classes-of` out"));
        }
        let staged = match format {
            SourceFormat::Idx => idx::import(self, &name, source, &mut progress),
            SourceFormat::Cifar10 => cifar::import(self, &name, &cifar::TEN, source, &mut progress),
            SourceFormat::Cifar100 => cifar::import(self, &name, &cifar::HUNDRED, source, &mut progress),
            SourceFormat::Folder => folder::import(self, &name, source, images, classes, &mut progress),
            SourceFormat::WebDataset => tar::import(self, &name, source, images, classes, &mut progress),
        };
        publish(self, staged?)
    }

    /// Imports IDX files from `source` under `name`.
    ///
    /// A folder gives one dataset per split that it holds: `NAME/train` from `train-*`, `NAME/test` from
    /// `t10k-*` or `test-*`. The path of one pair of files up to `-images` gives the dataset `NAME`.
    pub fn import_idx(
        &self,
        name: &str,
        source: &Path,
        mut progress: impl FnMut(ImportProgress<'_>),
    ) -> Result<Vec<ImportOutcome>, DatasetError> {
        let staged = idx::import(self, &name.parse()?, source, &mut progress)?;
        Ok(publish(self, staged)?.into_iter().map(|imported| imported.outcome).collect())
    }
}

/// What a finished import knows of its samples besides the samples.
struct Finished {
    name: DatasetName,
    shape: SampleShape,
    smallest: Option<SampleSize>,
    encoding: Encoding,
    classes: u32,
    class_names: Option<Vec<String>>,
    statistics: Statistics,
    left_out: Vec<Corrupt>,
}

/// A complete dataset that nobody sees yet.
struct Staged {
    manifest: Manifest,
    shards: TemporaryDir,
    left_out: Vec<Corrupt>,
}

/// Completes the manifest.
fn stage(store: &Store, shards: ShardWriter, finished: Finished) -> Result<Staged, DatasetError> {
    let (staging, entries) = shards.finish()?;
    let manifest = Manifest {
        format: 0,
        id: String::new(),
        name: finished.name.clone(),
        samples: entries.iter().map(|e| e.samples).sum(),
        shape: finished.shape,
        smallest: finished.smallest,
        dtype: DType::U8,
        classes: finished.classes,
        class_names: finished.class_names,
        encoding: finished.encoding,
        mean: finished.statistics.mean(),
        std: finished.statistics.std(),
        skipped: finished.left_out.len() as u64,
        shards: entries,
        whitening: None,
    };
    let manifest = manifest.with_id().map_err(|problem| store.manifest_error(&finished.name, problem))?;
    Ok(Staged { manifest, shards: staging, left_out: finished.left_out })
}

/// Makes all of them visible, or none if one is refused.
fn publish(store: &Store, staged: Vec<Staged>) -> Result<Vec<Imported>, DatasetError> {
    let (datasets, left_out): (Vec<_>, Vec<_>) =
        staged.into_iter().map(|staged| ((staged.manifest, staged.shards), staged.left_out)).unzip();
    let outcomes = store.publish(datasets)?;
    Ok(outcomes.into_iter().zip(left_out).map(|(outcome, left_out)| Imported { outcome, left_out }).collect())
}

/// The classes of a dataset in the store.
fn classes_of(store: &Store, other: &str) -> Result<Classes, DatasetError> {
    let manifest = store.manifest(other)?;
    let origin = format!("dataset `{}`", manifest.name);
    match manifest.class_names {
        Some(names) => Ok(Classes { names, origin }),
        None => Err(DatasetError::NoClassNames { name: manifest.name }),
    }
}

/// The splits of a source: a folder's name, or the beginning of a file's, and the segment added to the dataset's name.
const SPLITS: [(&str, &str); 4] =
    [("train", "train"), ("test", "test"), ("val", "test"), ("validation", "test")];

/// The error of two parts of a source that would become the same dataset.
fn same_name(path: &Path, other: &Path, whole: &DatasetName, both: &DatasetName) -> DatasetError {
    let problem = format!(
        "both it and `{}` would become `{both}`; add each folder by itself under a name of your own, the others with the \
         classes of the training set: `coordinator dataset add {whole}/val ... --classes-of {whole}/train`",
        other.display()
    );
    source_error(path, problem)
}

/// The entries of a folder, by name.
fn sorted_entries(folder: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let entries = std::fs::read_dir(folder).map_err(FileError::on("list", folder))?;
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(FileError::on("list", folder))?.path());
    }
    paths.sort();
    Ok(paths)
}

/// The error of a source file.
fn source_error(path: &Path, problem: impl Into<String>) -> DatasetError {
    DatasetError::Source { path: path.to_path_buf(), problem: problem.into() }
}

/// A file with one class name a line, by the line its label. Lines at the end that are empty do not count; one between names, or a
/// name that is there twice, is refused, as nobody can tell which labels are meant.
fn read_class_names(path: &Path) -> Result<Vec<String>, DatasetError> {
    let text = String::from_utf8(crate::durable::read(path)?)
        .map_err(|_| source_error(path, "it is not a text of class names, one a line"))?;
    let mut lines = HashMap::new();
    let mut names = Vec::new();
    for (number, name) in (1..).zip(text.trim_end().lines().map(str::trim)) {
        if name.is_empty() {
            let problem =
                format!("its line {number} is empty, and each is the name of a class; remove or fill it");
            return Err(source_error(path, problem));
        }
        if let Some(first) = lines.insert(name, number) {
            let problem = format!(
                "its lines {first} and {number} are both `{}`; each class needs a name of its own",
                shown(name)
            );
            return Err(source_error(path, problem));
        }
        names.push(name.to_owned());
    }
    Ok(names)
}
