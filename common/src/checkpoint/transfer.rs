//! A checkpoint on its way between two processes: its files by name, the manifest last.

use super::manifest::CheckpointManifest;
use super::store::{CheckpointFiles, check_file};
use super::{CheckpointError, MANIFEST_FILE};
use std::path::{Path, PathBuf};

impl CheckpointFiles {
    /// The checkpoint in `parts`, every byte of it checked against its manifest.
    pub fn from_parts(mut parts: Vec<(String, Vec<u8>)>) -> Result<Self, CheckpointError> {
        let position = parts.iter().position(|(name, _)| name == MANIFEST_FILE);
        let json = position.map(|at| parts.swap_remove(at).1);
        let json = json.ok_or_else(|| CheckpointError::Missing(MANIFEST_FILE.into()))?;
        let manifest = CheckpointManifest::from_json(&json)
            .map_err(|problem| CheckpointError::Manifest { path: MANIFEST_FILE.into(), problem })?;
        let files = Self { manifest, files: parts };
        for entry in &files.manifest.files {
            let bytes = files
                .file(&entry.name)
                .ok_or_else(|| CheckpointError::Missing(PathBuf::from(&entry.name)))?;
            check_file(Path::new(&entry.name), entry, bytes, &files.manifest.weights_digest)?;
        }
        Ok(files)
    }
}
