//! A checkpoint on its way between two processes: its files by name, the manifest last.

use super::manifest::{CheckpointInfo, CheckpointManifest, FileEntry, check_file_name};
use super::store::{CheckpointFiles, check_file};
use super::tensors::decode_tensors;
use super::{CheckpointError, MANIFEST_FILE, WEIGHTS_FILE};
use crate::digest::{blake3_hex, weights_digest};
use std::path::{Path, PathBuf};

impl CheckpointFiles {
    /// The checkpoint that `info` describes, made of `files` by name.
    pub fn new(info: CheckpointInfo, files: Vec<(String, Vec<u8>)>) -> Result<Self, CheckpointError> {
        let mut entries = Vec::with_capacity(files.len());
        let mut digest = String::new();
        for (name, bytes) in &files {
            check_file_name(name)?;
            if name == WEIGHTS_FILE {
                let tensors = decode_tensors(bytes);
                digest = weights_digest(
                    tensors.map_err(|problem| CheckpointError::Tensors { path: name.into(), problem })?,
                );
            }
            entries.push(FileEntry {
                name: name.clone(),
                bytes: bytes.len() as u64,
                blake3: blake3_hex(bytes),
            });
        }
        let manifest = CheckpointManifest::new(info, digest, entries)
            .map_err(|problem| CheckpointError::Manifest { path: MANIFEST_FILE.into(), problem })?;
        Ok(Self { manifest, files })
    }

    /// All files as they travel, the manifest last.
    pub fn into_parts(self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        let mut parts = self.files;
        let manifest = self.manifest.to_json();
        let refused = |problem| CheckpointError::Manifest { path: MANIFEST_FILE.into(), problem };
        parts.push((MANIFEST_FILE.to_owned(), manifest.map_err(refused)?));
        Ok(parts)
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{OPTIMIZER_FILE, encode_tensors};
    use crate::digest::TensorBytes;

    fn parts() -> Vec<(String, Vec<u8>)> {
        let tensor = TensorBytes {
            name: "w".into(),
            dtype: "F32".into(),
            shape: vec![1].into(),
            bytes: 1f32.to_le_bytes().to_vec().into(),
        };
        let bytes = encode_tensors([tensor]).unwrap();
        let files = vec![(WEIGHTS_FILE.to_owned(), bytes.clone()), (OPTIMIZER_FILE.to_owned(), bytes)];
        CheckpointFiles::new(CheckpointInfo { step: 7, ..Default::default() }, files)
            .unwrap()
            .into_parts()
            .unwrap()
    }

    #[test]
    fn a_checkpoint_survives_the_journey_and_any_flipped_byte_is_noticed() {
        assert_eq!(CheckpointFiles::from_parts(parts()).unwrap().manifest.info.step, 7);
        for file in 0..parts().len() {
            let mut flipped = parts();
            let middle = flipped[file].1.len() / 2;
            flipped[file].1[middle] ^= 1;
            assert!(CheckpointFiles::from_parts(flipped).is_err(), "{}", parts()[file].0);
            let mut missing = parts();
            missing.remove(file);
            assert!(CheckpointFiles::from_parts(missing).is_err(), "{}", parts()[file].0);
        }
    }
}
