//! A folder of datasets: `shards/HASH` and `manifests/NAME.json`.

use super::manifest::{Manifest, ManifestProblem};
use super::shard::ShardFile;
use super::{DatasetError, DatasetName, ImportOutcome};
use crate::digest::{blake3_hex, is_blake3_hex};
use crate::durable::{self, FileError, TemporaryDir};
use crate::suggest::did_you_mean;
use std::io;
use std::path::{Path, PathBuf};

/// The datasets that a coordinator has on its disk.
///
/// Several processes may use one store: what is there is found by looking, never from memory.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    shards: PathBuf,
    manifests: PathBuf,
}

/// What [`Store::verify`] found.
#[derive(Clone, Debug)]
pub struct VerifyReport {
    /// The dataset's manifest, which itself was intact.
    pub manifest: Manifest,
    /// Each shard, in order.
    pub shards: Vec<ShardReport>,
}

/// The state of one shard.
#[derive(Clone, Debug)]
pub struct ShardReport {
    /// The shard's file.
    pub path: PathBuf,
    /// What was found there.
    pub state: ShardState,
}

/// What was found where a shard should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShardState {
    /// The shard.
    Good,
    /// No file.
    Missing,
    /// A file of another size.
    WrongSize {
        /// The size in the manifest.
        expected: u64,
        /// The size of the file.
        found: u64,
    },
    /// A file of the right size with other bytes.
    Flipped,
    /// A file that cannot be read, and why.
    Unreadable(String),
}

impl VerifyReport {
    /// Whether every shard is good.
    pub fn is_good(&self) -> bool {
        self.bad().next().is_none()
    }

    /// The shards that are not good.
    pub fn bad(&self) -> impl Iterator<Item = &ShardReport> {
        self.shards.iter().filter(|s| s.state != ShardState::Good)
    }
}

impl std::fmt::Display for ShardReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.path.display();
        match &self.state {
            ShardState::Good => write!(f, "`{path}` is good"),
            ShardState::Missing => write!(f, "`{path}` is missing"),
            ShardState::WrongSize { expected, found } => {
                write!(f, "`{path}` has {found} bytes instead of {expected}")
            }
            ShardState::Flipped => write!(f, "`{path}` has flipped bytes: it does not match its hash"),
            ShardState::Unreadable(why) => write!(f, "`{path}` cannot be read: {why}"),
        }
    }
}

impl Store {
    /// Opens the store in `dir`, creating it if missing and removing what dead imports left.
    pub fn open(dir: &Path) -> Result<Self, DatasetError> {
        let store = Self::at(dir);
        for dir in [&store.shards, &store.manifests] {
            durable::create_dir_all(dir)?;
            durable::sweep_temporary(dir)?;
        }
        Ok(store)
    }

    /// The store in `dir` as it is, to be read. There may be none.
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), shards: dir.join("shards"), manifests: dir.join("manifests") }
    }

    /// The folder of the shards, for [`super::ShardCache::with_local`].
    pub fn shards_dir(&self) -> &Path {
        &self.shards
    }

    /// Every dataset, by name.
    pub fn list(&self) -> Result<Vec<Manifest>, DatasetError> {
        self.names()?.iter().map(|name| self.read_manifest(name)).collect()
    }

    /// The manifest of the dataset `name`.
    pub fn manifest(&self, name: &str) -> Result<Manifest, DatasetError> {
        let name: DatasetName = name.parse()?;
        match self.read_manifest(&name) {
            Err(DatasetError::File(e)) if e.is_not_found() => Err(self.unknown(name)?),
            other => other,
        }
    }

    /// Where the shard `hash` is, if this store has it.
    pub fn shard_path(&self, hash: &str) -> Result<PathBuf, DatasetError> {
        if is_blake3_hex(hash) {
            Ok(self.shards.join(hash))
        } else {
            Err(DatasetError::NotAHash(hash.chars().take(100).collect()))
        }
    }

    /// Reads and hashes every shard of the dataset `name`.
    pub fn verify(&self, name: &str) -> Result<VerifyReport, DatasetError> {
        let manifest = self.manifest(name)?;
        let shards = manifest
            .all_shards()
            .map(|entry| {
                let path = self.shards.join(&entry.hash);
                let state = match std::fs::read(&path) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => ShardState::Missing,
                    Err(e) => ShardState::Unreadable(e.to_string()),
                    Ok(bytes) if bytes.len() as u64 != entry.bytes => {
                        ShardState::WrongSize { expected: entry.bytes, found: bytes.len() as u64 }
                    }
                    Ok(bytes) if blake3_hex(&bytes) != entry.hash => ShardState::Flipped,
                    Ok(bytes) => match ShardFile::parse(bytes) {
                        Ok(_) => ShardState::Good,
                        Err(problem) => ShardState::Unreadable(problem.to_string()),
                    },
                };
                ShardReport { path, state }
            })
            .collect();
        Ok(VerifyReport { manifest, shards })
    }

    /// Moves the shards of all datasets in place, then makes their manifests visible. Shards first: a manifest never
    /// names a shard that is not there. Nothing is moved if one of them is refused. What a full disk or a kill between two
    /// manifests leaves out, the same import adds when it is run again.
    pub(super) fn publish(
        &self,
        datasets: Vec<(Manifest, TemporaryDir)>,
    ) -> Result<Vec<ImportOutcome>, DatasetError> {
        let existing: Vec<bool> =
            datasets.iter().map(|(manifest, _)| self.holds(manifest)).collect::<Result<_, _>>()?;
        for (manifest, staging) in &datasets {
            for hash in manifest.all_shards().map(|s| &s.hash) {
                let (from, to) = (staging.path().join(hash), self.shards.join(hash));
                match std::fs::rename(&from, &to) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound && to.exists() => {}
                    result => result.map_err(FileError::on("write", &to))?,
                }
            }
        }
        durable::sync_dir(&self.shards)?;
        let outcome = |((manifest, _), existing): ((Manifest, TemporaryDir), bool)| {
            if existing {
                return Ok(ImportOutcome::Unchanged(manifest));
            }
            let json = manifest.to_json().map_err(|problem| self.manifest_error(&manifest.name, problem))?;
            durable::write_atomic(&self.manifest_path(&manifest.name), &json)?;
            Ok(ImportOutcome::Added(manifest))
        };
        datasets.into_iter().zip(existing).map(outcome).collect()
    }

    /// Whether the dataset is here already. Another one of its name is an error.
    fn holds(&self, manifest: &Manifest) -> Result<bool, DatasetError> {
        match self.manifest(manifest.name.as_str()) {
            Ok(existing) if existing.id == manifest.id => Ok(true),
            Ok(existing) => Err(DatasetError::Conflict {
                name: manifest.name.clone(),
                existing: existing.id,
                new: manifest.id.clone(),
            }),
            Err(DatasetError::Unknown { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The error of a manifest of this store.
    pub(super) fn manifest_error(&self, name: &DatasetName, problem: ManifestProblem) -> DatasetError {
        DatasetError::Manifest { path: self.manifest_path(name), problem }
    }

    fn manifest_path(&self, name: &DatasetName) -> PathBuf {
        self.manifests.join(format!("{}.json", name.file_stem()))
    }

    fn read_manifest(&self, name: &DatasetName) -> Result<Manifest, DatasetError> {
        let json = durable::read(&self.manifest_path(name))?;
        let manifest = Manifest::from_json(&json).map_err(|problem| self.manifest_error(name, problem))?;
        if manifest.name != *name {
            let problem = ManifestProblem::Inconsistent("it is the manifest of another dataset");
            return Err(self.manifest_error(name, problem));
        }
        Ok(manifest)
    }

    fn names(&self) -> Result<Vec<DatasetName>, DatasetError> {
        let entries = std::fs::read_dir(&self.manifests).map_err(FileError::on("list", &self.manifests))?;
        let mut names = Vec::new();
        for entry in entries {
            let file = entry.map_err(FileError::on("list", &self.manifests))?.file_name();
            if let Some(stem) = file.to_str().and_then(|f| f.strip_suffix(".json"))
                && let Ok(name) = DatasetName::from_file_stem(stem)
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn unknown(&self, name: DatasetName) -> Result<DatasetError, DatasetError> {
        let known = self.names()?;
        let mut hint = did_you_mean(name.as_str(), known.iter().map(DatasetName::as_str));
        if hint.is_empty() {
            hint =
                "; `coordinator dataset ls` shows those there are, `coordinator dataset add` adds one".into();
        }
        Ok(DatasetError::Unknown { name, store: self.dir.clone(), hint })
    }
}
