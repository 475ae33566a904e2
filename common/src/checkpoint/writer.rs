//! Writing a checkpoint.

use super::manifest::{CheckpointInfo, CheckpointManifest, FileEntry, ManifestProblem, check_file_name};
use super::store::CheckpointStore;
use super::tensors::decode_tensors;
use super::{CheckpointError, MANIFEST_FILE, WEIGHTS_FILE};
use crate::digest::{blake3_hex, weights_digest};
use crate::durable::AtomicDir;
use std::path::PathBuf;

/// A checkpoint being written. It becomes visible with [`CheckpointWriter::finish`]; dropped before, it never was.
#[derive(Debug)]
pub struct CheckpointWriter<'a> {
    store: &'a CheckpointStore,
    dir: AtomicDir,
    info: CheckpointInfo,
    files: Vec<FileEntry>,
    weights_digest: String,
}

impl<'a> CheckpointWriter<'a> {
    /// Begins the checkpoint that `info` describes in `store`.
    pub fn new(store: &'a CheckpointStore, info: CheckpointInfo) -> Result<Self, CheckpointError> {
        let dir = AtomicDir::new(&store.step_dir(info.step))?;
        Ok(Self { store, dir, info, files: Vec::new(), weights_digest: String::new() })
    }

    /// Writes the file `name` and flushes it to the disk.
    pub fn add(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        check_file_name(name)?;
        if name == WEIGHTS_FILE {
            let tensors = decode_tensors(bytes)
                .map_err(|problem| CheckpointError::Tensors { path: self.path(name), problem })?;
            self.weights_digest = weights_digest(tensors);
        }
        self.dir.write(name, bytes)?;
        self.files.push(FileEntry {
            name: name.to_owned(),
            bytes: bytes.len() as u64,
            blake3: blake3_hex(bytes),
        });
        Ok(())
    }

    /// [`weights_digest`] of what has been added as [`WEIGHTS_FILE`]; empty before.
    pub fn weights_digest(&self) -> &str {
        &self.weights_digest
    }

    /// Makes the checkpoint visible. Both [`WEIGHTS_FILE`] and [`super::OPTIMIZER_FILE`] must have been added.
    ///
    /// A good checkpoint of the same step with the same files stays as it is; any other is replaced.
    pub fn finish(self) -> Result<CheckpointManifest, CheckpointError> {
        let (path, step) = (self.path(MANIFEST_FILE), self.info.step);
        let refused = |problem: ManifestProblem| CheckpointError::Manifest { path: path.clone(), problem };
        let manifest =
            CheckpointManifest::new(self.info, self.weights_digest, self.files).map_err(refused)?;
        if let Ok(existing) = self.store.verify(step)
            && existing.files == manifest.files
        {
            return Ok(existing);
        }
        self.dir.write(MANIFEST_FILE, &manifest.to_json().map_err(refused)?)?;
        self.dir.commit()?;
        Ok(manifest)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.store.step_dir(self.info.step).join(name)
    }
}
