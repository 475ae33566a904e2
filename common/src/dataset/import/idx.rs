//! Pairs of IDX files: images and their labels.

use super::shards::ShardWriter;
use super::statistics::Statistics;
use super::{Finished, ImportProgress, Progress, Staged, stage};
use crate::dataset::idx::{IdxProblem, IdxReader};
use crate::dataset::manifest::{Encoding, SampleShape};
use crate::dataset::{DatasetError, DatasetName, Store};
use crate::durable::{FileError, TemporaryDir};
use std::path::{Path, PathBuf};

/// The splits that a folder may hold: the files' prefix and the segment added to the dataset's name.
const SPLITS: [(&str, &str); 3] = [("train", "train"), ("t10k", "test"), ("test", "test")];

/// Imports every pair of files at `source`.
pub(super) fn import(
    store: &Store,
    name: &DatasetName,
    source: &Path,
    progress: Progress<'_>,
) -> Result<Vec<Staged>, DatasetError> {
    find_pairs(name, source)?.iter().map(|pair| import_pair(store, pair, progress)).collect()
}

fn import_pair(store: &Store, pair: &Pair, progress: Progress<'_>) -> Result<Staged, DatasetError> {
    let mut images = IdxReader::open(&pair.images, 3)?;
    let mut labels = IdxReader::open(&pair.labels, 1)?;
    if labels.records() != images.records() {
        return Err(labels.error(IdxProblem::CountMismatch {
            labels: labels.records(),
            images: images.records(),
            images_path: pair.images.clone(),
        }));
    }
    let samples = u64::from(images.records());
    let &[height, width] = images.sizes() else {
        return Err(images.error(IdxProblem::Size(images.sizes().to_vec())));
    };

    let mut shards = ShardWriter::new(TemporaryDir::new_in(store.shards_dir())?);
    let mut statistics = Statistics::new(1);
    let mut classes = 0;
    let (mut pixels, mut label) = (vec![0; images.record_bytes()], [0]);
    for done in 1..=samples {
        images.next(&mut pixels)?;
        labels.next(&mut label)?;
        statistics.add_planes(&pixels);
        classes = classes.max(u32::from(label[0]) + 1);
        if shards.push(u32::from(label[0]), &pixels)? || done == samples {
            progress(ImportProgress { dataset: &pair.name, done, total: Some(samples) });
        }
    }
    images.finish()?;
    labels.finish()?;
    let finished = Finished {
        name: pair.name.clone(),
        shape: SampleShape { channels: 1, height, width },
        smallest: None,
        encoding: Encoding::RawU8,
        classes,
        class_names: None,
        statistics,
        left_out: Vec::new(),
    };
    stage(store, shards, finished)
}

/// Images and their labels.
#[derive(Debug)]
struct Pair {
    name: DatasetName,
    images: PathBuf,
    labels: PathBuf,
}

fn find_pairs(name: &DatasetName, source: &Path) -> Result<Vec<Pair>, DatasetError> {
    let mut pairs: Vec<Pair> = Vec::new();
    if source.is_dir() {
        for (prefix, segment) in SPLITS {
            let name = name.join(segment)?;
            if pairs.iter().all(|p| p.name != name)
                && let Some(pair) = find_pair(name, &source.join(prefix))?
            {
                pairs.push(pair);
            }
        }
    } else {
        pairs.extend(find_pair(name.clone(), source)?);
    }
    if pairs.is_empty() {
        return Err(DatasetError::NoSource { path: source.to_path_buf() });
    }
    Ok(pairs)
}

/// The pair that begins with `prefix`, or `None` if there are no such images. Images without labels are an error.
fn find_pair(name: DatasetName, prefix: &Path) -> Result<Option<Pair>, DatasetError> {
    let candidates = |stem: &str| {
        [format!("{stem}-ubyte"), format!("{stem}-ubyte.gz")].map(|suffix| {
            let mut path = prefix.as_os_str().to_owned();
            path.push(suffix);
            PathBuf::from(path)
        })
    };
    let Some(images) = candidates("-images-idx3").into_iter().find(|p| p.exists()) else {
        return Ok(None);
    };
    let labels = candidates("-labels-idx1");
    match labels.iter().find(|path| path.exists()) {
        Some(found) => Ok(Some(Pair { name, images, labels: found.clone() })),
        None => {
            let [plain, _] = labels;
            let missing = std::io::Error::new(
                std::io::ErrorKind::NotFound,
                format!("it is not there, nor with `.gz`, and `{}` needs its labels", images.display()),
            );
            Err(FileError::new("read", plain, missing).into())
        }
    }
}
