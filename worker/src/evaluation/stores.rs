//! The datasets on this host.

use anyhow::{Result, bail};
use lockstep_common::dataset::{DatasetError, DatasetReader, Manifest, ShardCache, Store};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Stores of datasets, read in place.
pub(crate) struct Stores {
    folders: Vec<PathBuf>,
    shards: Arc<ShardCache>,
}

impl Stores {
    /// Those in `given` folders; without any, those of the data directories that `checkpoints` lie in, and the user's own.
    pub(crate) fn find(given: &[PathBuf], checkpoints: &[PathBuf]) -> Self {
        let mut folders = given.to_vec();
        if folders.is_empty() {
            let beside = checkpoints.iter().filter_map(|path| beside(path));
            let named = std::env::var_os("LOCKSTEP_DATA_DIR").map(|dir| PathBuf::from(dir).join("datasets"));
            let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".lockstep/datasets"));
            for folder in beside.chain(named).chain(home) {
                if !folders.contains(&folder) {
                    folders.push(folder);
                }
            }
        }
        let shards = folders.iter().map(|folder| Store::at(folder).shards_dir().to_owned());
        Self { shards: Arc::new(ShardCache::in_place().with_local(shards)), folders }
    }

    /// The manifest of the dataset `name`.
    pub(crate) fn manifest(&self, name: &str) -> Result<Manifest> {
        let mut meant = String::new();
        for folder in self.folders.iter().filter(|folder| folder.join("manifests").is_dir()) {
            match Store::at(folder).manifest(name) {
                Err(DatasetError::Unknown { hint, .. }) if hint.contains("did you mean") => meant = hint,
                Err(DatasetError::Unknown { .. }) => {}
                other => return Ok(other?),
            }
        }
        let folders: Vec<_> = self.folders.iter().map(|folder| format!("`{}`", folder.display())).collect();
        bail!(
            "no dataset `{name}` in {}{meant}; --datasets DIR names the folder of another store",
            folders.join(", ")
        )
    }

    /// A reader of the dataset `name`.
    pub(crate) fn reader(&self, name: &str) -> Result<DatasetReader> {
        Ok(DatasetReader::new(Arc::new(self.manifest(name)?), self.shards.clone())?)
    }
}

/// The store of the data directory in which a checkpoint lies, as `jobs/j1/checkpoints/step-…`.
fn beside(checkpoint: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(checkpoint).ok()?;
    let stores = path.ancestors().map(|folder| folder.join("datasets"));
    stores.skip(1).find(|folder| folder.join("manifests").is_dir())
}
