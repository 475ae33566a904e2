//! The folder of a job's checkpoints.

use super::manifest::{CheckpointInfo, CheckpointManifest, FileEntry, ManifestProblem};
use super::tensors::{TensorsError, decode_tensors, encode_for_others};
use super::{AVERAGE_PREFIX, CheckpointError, MANIFEST_FILE, OPTIMIZER_FILE, WEIGHTS_FILE};
use crate::digest::{blake3_hex, weights_digest};
use crate::durable::{self, FileError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};

/// Begins the name of every checkpoint's folder.
const STEP_PREFIX: &str = "step-";
/// Digits of the step in a folder's name: enough for any run, and names sort as steps do.
const STEP_DIGITS: usize = 12;

/// The checkpoints in one folder. What is there is found by looking, never from memory.
#[derive(Clone, Debug)]
pub struct CheckpointStore {
    dir: PathBuf,
}

/// A checkpoint's folder; nothing is known about its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointEntry {
    /// The step that comes next after it.
    pub step: u64,
    /// The folder.
    pub path: PathBuf,
}

/// A whole checkpoint in memory, to be resumed from or sent to a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointFiles {
    /// The manifest.
    pub manifest: CheckpointManifest,
    /// Every other file by name, in the manifest's order.
    pub files: Vec<(String, Vec<u8>)>,
}

impl CheckpointFiles {
    /// The checkpoint in the folder `dir`, every byte of it checked.
    pub fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let mut files = Vec::new();
        let manifest = read(dir, |name, bytes| files.push((name.to_owned(), bytes)))?;
        Ok(Self { manifest, files })
    }

    /// The bytes of the file `name`.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.as_slice())
    }
}

/// A file of a checkpoint, open for reading.
#[derive(Debug)]
pub struct OpenFile {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// The file.
    pub file: File,
}

/// The newest checkpoint that can be used, and the newer ones that cannot.
#[derive(Debug)]
pub struct LatestGood {
    /// The newest good one, if there is any.
    pub good: Option<CheckpointManifest>,
    /// Newer ones that were refused, the newest first.
    pub refused: Vec<Refused>,
}

/// A checkpoint that cannot be used.
#[derive(Debug)]
pub struct Refused {
    /// The checkpoint.
    pub entry: CheckpointEntry,
    /// Why, with the name of the file.
    pub reason: CheckpointError,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "checkpoint of step {} refused: {}", self.entry.step, self.reason)
    }
}

impl CheckpointStore {
    /// Opens the checkpoints in `dir`, creating it if missing and removing what dead writers left.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        durable::create_dir_all(dir)?;
        durable::sweep_temporary(dir)?;
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// The folder of the checkpoint of `step`, whether it exists or not.
    pub fn step_dir(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{STEP_PREFIX}{step:0STEP_DIGITS$}"))
    }

    /// Every checkpoint, good or not, the newest first.
    pub fn list(&self) -> Result<Vec<CheckpointEntry>, CheckpointError> {
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(FileError::on("list", &self.dir))? {
            let entry = entry.map_err(FileError::on("list", &self.dir))?;
            let step = entry
                .file_name()
                .to_str()
                .and_then(|name| name.strip_prefix(STEP_PREFIX))
                .filter(|digits| digits.len() >= STEP_DIGITS && digits.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok());
            if let Some(step) = step {
                entries.push(CheckpointEntry { step, path: entry.path() });
            }
        }
        entries.sort_by_key(|e| std::cmp::Reverse(e.step));
        Ok(entries)
    }

    /// Checks every file of the checkpoint of `step`.
    pub fn verify(&self, step: u64) -> Result<CheckpointManifest, CheckpointError> {
        self.manifest(step)?;
        read(&self.step_dir(step), |_, _| ())
    }

    /// The checkpoint of `step` in memory, every byte of it checked.
    pub fn load(&self, step: u64) -> Result<CheckpointFiles, CheckpointError> {
        self.manifest(step)?;
        CheckpointFiles::read(&self.step_dir(step))
    }

    /// The newest checkpoint that is whole, with the reasons for which newer ones were passed over.
    pub fn latest_good(&self) -> Result<LatestGood, CheckpointError> {
        let mut refused = Vec::new();
        for entry in self.list()? {
            match self.verify(entry.step) {
                Ok(good) => {
                    return Ok(LatestGood { good: Some(good), refused });
                }
                Err(reason) => refused.push(Refused { entry, reason }),
            }
        }
        Ok(LatestGood { good: None, refused })
    }

    /// The files of the checkpoint of `step`, open at their beginnings after every byte of them has been checked; the
    /// manifest is the last. They can be read to the end even if the checkpoint is removed meanwhile.
    pub fn open_files(&self, step: u64) -> Result<Vec<OpenFile>, CheckpointError> {
        let (manifest, path) = self.manifest(step)?;
        let mut files = Vec::with_capacity(manifest.files.len() + 1);
        for entry in &manifest.files {
            let path = self.step_dir(step).join(&entry.name);
            let mut file = open_file(&path)?;
            let failed = || FileError::on("read", &path);
            let mut hasher = blake3::Hasher::new();
            let bytes = io::copy(&mut file, &mut hasher).map_err(failed())?;
            if bytes != entry.bytes {
                return Err(CheckpointError::Size { path, expected: entry.bytes, found: bytes });
            }
            if hasher.finalize().to_hex().as_str() != entry.blake3 {
                return Err(CheckpointError::Flipped(path));
            }
            file.rewind().map_err(failed())?;
            files.push(OpenFile { name: entry.name.clone(), bytes, file });
        }
        let file = open_file(&path)?;
        let bytes = file.metadata().map_err(FileError::on("read", &path))?.len();
        files.push(OpenFile { name: MANIFEST_FILE.to_owned(), bytes, file });
        Ok(files)
    }

    /// What the manifest of the checkpoint of `step` says of the job; nothing else of it is read.
    pub fn info(&self, step: u64) -> Result<CheckpointInfo, CheckpointError> {
        Ok(self.manifest(step)?.0.info)
    }

    /// Removes all but the `keep` newest checkpoints (at least one) and returns the steps removed.
    ///
    /// If none of those to be kept is good, the newest good one among the others is kept too. `good` is one that has just
    /// been checked, and need not be again.
    pub fn prune(&self, keep: usize, good: Option<u64>) -> Result<Vec<u64>, CheckpointError> {
        let entries = self.list()?;
        let (kept, mut old) = match entries.split_at_checked(keep.max(1)) {
            Some((kept, old)) if !old.is_empty() => (kept, old.to_vec()),
            _ => return Ok(Vec::new()),
        };
        let is_good = |entry: &CheckpointEntry| self.verify(entry.step).is_ok();
        let known_good = kept.iter().any(|entry| Some(entry.step) == good);
        if !known_good
            && !kept.iter().any(is_good)
            && let Some(only) = old.iter().position(is_good)
        {
            old.remove(only);
        }
        for entry in &old {
            durable::remove_dir(&entry.path)?;
        }
        Ok(old.into_iter().map(|e| e.step).collect())
    }

    /// Writes the weights and buffers of the checkpoint of `step`, or their averages, to one safetensors file that other
    /// programs read; an existing file is left alone. Returns the digest of what it has written.
    pub fn export(&self, step: u64, average: bool, path: &Path) -> Result<String, CheckpointError> {
        let checkpoint = self.load(step)?;
        let tensors = |name: &str| {
            let source = self.step_dir(step).join(name);
            let bytes = checkpoint.file(name).ok_or_else(|| CheckpointError::Missing(source.clone()))?;
            decode_tensors(bytes).map_err(|problem| CheckpointError::Tensors { path: source, problem })
        };
        let mut weights = tensors(WEIGHTS_FILE)?;
        if average {
            let mut averages: BTreeMap<_, _> = tensors(OPTIMIZER_FILE)?
                .into_iter()
                .map(|tensor| (tensor.name.to_string(), tensor))
                .collect();
            for weight in &mut weights {
                // A job that keeps averages has one network.
                let average = averages.remove(&format!("{AVERAGE_PREFIX}{}", weight.name));
                weight.bytes = average.ok_or(CheckpointError::NoAverage(step))?.bytes;
            }
        }
        let digest = weights_digest(weights.iter().cloned());
        let file = encode_for_others(weights, step)
            .map_err(|problem| CheckpointError::Tensors { path: path.to_path_buf(), problem })?;
        durable::create_atomic(path, &file).map_err(|e| match e.source.kind() {
            io::ErrorKind::AlreadyExists => CheckpointError::Exists(path.to_path_buf()),
            _ => e.into(),
        })?;
        Ok(digest)
    }

    /// The manifest of the checkpoint of `step` and its path.
    fn manifest(&self, step: u64) -> Result<(CheckpointManifest, PathBuf), CheckpointError> {
        let dir = self.step_dir(step);
        if !dir.is_dir() {
            return Err(self.no_such_step(step)?);
        }
        let (manifest, path) = manifest(&dir)?;
        if manifest.info.step != step {
            return Err(CheckpointError::Manifest {
                path,
                problem: ManifestProblem::Step(manifest.info.step),
            });
        }
        Ok((manifest, path))
    }

    fn no_such_step(&self, step: u64) -> Result<CheckpointError, CheckpointError> {
        let steps: Vec<_> = self.list()?.iter().map(|e| e.step.to_string()).collect();
        let hint = match steps.as_slice() {
            [] => "; there are none".to_owned(),
            steps => format!("; there are those of steps {}", steps.join(", ")),
        };
        Ok(CheckpointError::NoSuchStep { step, dir: self.dir.clone(), hint })
    }
}

/// Reads the checkpoint in `dir` file by file, handing on what has been checked.
fn read(dir: &Path, mut checked: impl FnMut(&str, Vec<u8>)) -> Result<CheckpointManifest, CheckpointError> {
    let (manifest, _) = manifest(dir)?;
    for entry in &manifest.files {
        let path = dir.join(&entry.name);
        let bytes = read_file(&path)?;
        check_file(&path, entry, &bytes, &manifest.weights_digest)?;
        checked(&entry.name, bytes);
    }
    Ok(manifest)
}

/// The manifest of the checkpoint in `dir`, and its path.
fn manifest(dir: &Path) -> Result<(CheckpointManifest, PathBuf), CheckpointError> {
    let path = dir.join(MANIFEST_FILE);
    let manifest = CheckpointManifest::from_json(&read_file(&path)?)
        .map_err(|problem| CheckpointError::Manifest { path: path.clone(), problem })?;
    Ok((manifest, path))
}

fn read_file(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    durable::read(path).map_err(missing_or)
}

fn open_file(path: &Path) -> Result<File, CheckpointError> {
    File::open(path).map_err(FileError::on("read", path)).map_err(missing_or)
}

fn missing_or(e: FileError) -> CheckpointError {
    if e.is_not_found() { CheckpointError::Missing(e.path) } else { e.into() }
}

/// Checks one file against the manifest. The weights must also have the digest by which runs are compared.
pub(super) fn check_file(
    path: &Path,
    entry: &FileEntry,
    bytes: &[u8],
    expected_weights: &str,
) -> Result<(), CheckpointError> {
    if bytes.len() as u64 != entry.bytes {
        let found = bytes.len() as u64;
        return Err(CheckpointError::Size { path: path.to_path_buf(), expected: entry.bytes, found });
    }
    if blake3_hex(bytes) != entry.blake3 {
        return Err(CheckpointError::Flipped(path.to_path_buf()));
    }
    if entry.name.ends_with(".safetensors") {
        let refused = |problem| CheckpointError::Tensors { path: path.to_path_buf(), problem };
        let tensors = decode_tensors(bytes).map_err(refused)?;
        if entry.name == WEIGHTS_FILE {
            let found = weights_digest(tensors);
            if found != expected_weights {
                return Err(refused(TensorsError::Digest { expected: expected_weights.to_owned(), found }));
            }
        }
    }
    Ok(())
}
