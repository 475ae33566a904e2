//! The manifest of a checkpoint.

use super::{CheckpointError, MANIFEST_FILE, OPTIMIZER_FILE, WEIGHTS_FILE};
use crate::digest::json_digest;
use crate::ids::{Generation, JobId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The format of checkpoints written by this release.
const FORMAT: u32 = 1;

/// Where a job was when the checkpoint was taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// The job.
    pub job_id: JobId,
    /// The job's name.
    pub job_name: String,
    /// The whole job file.
    pub job_text: String,
    /// The task, such as `classify`.
    pub task: String,
    /// The job's seed, the root of every random stream.
    pub seed: u64,
    /// Steps done over all epochs: the step that comes next, counted from 0.
    pub step: u64,
    /// The epoch of the step that comes next.
    pub epoch: u64,
    /// That step's place in its epoch, which is the sampler's position.
    pub step_in_epoch: u64,
    /// Updates done so far by each network, by the network's name: a GAN's discriminator may learn more often.
    pub phase_updates: BTreeMap<String, u64>,
    /// The generation in which it was taken.
    pub generation: Generation,
    /// The latest metrics. Those that are not finite are left out when written: JSON has no such numbers.
    pub metrics: BTreeMap<String, f64>,
    /// When it was taken, in seconds since 1970.
    pub created_unix_s: u64,
}

/// What vouches for a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointManifest {
    /// The version of this structure.
    pub format: u32,
    /// BLAKE3 digest of all other fields.
    pub digest: String,
    /// [`crate::digest::weights_digest`] of the tensors in [`WEIGHTS_FILE`].
    pub weights_digest: String,
    /// Where the job was.
    pub info: CheckpointInfo,
    /// Every other file.
    pub files: Vec<FileEntry>,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// The file's name in the checkpoint's folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of its bytes, in hex.
    pub blake3: String,
}

/// What makes a manifest unusable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestProblem {
    /// It is not JSON of the right structure.
    #[error("it does not parse ({0})")]
    Syntax(String),
    /// It was written by another release.
    #[error("it has format {0} and this release reads format {FORMAT}")]
    Format(u32),
    /// It was changed after it was written.
    #[error("its content does not match its digest, so it was changed or damaged")]
    Digest,
    /// It names a file that no checkpoint has, or one twice, or not the weights and the optimizers.
    #[error("its list of files is not that of a checkpoint")]
    Files,
    /// It is the manifest of another step.
    #[error("it is of step {0}, not of the step its folder is named after")]
    Step(u64),
}

impl CheckpointManifest {
    pub(super) fn new(
        mut info: CheckpointInfo,
        weights_digest: String,
        files: Vec<FileEntry>,
    ) -> Result<Self, ManifestProblem> {
        info.metrics.retain(|_, value| value.is_finite());
        let mut manifest = Self { format: FORMAT, digest: String::new(), weights_digest, info, files };
        manifest.digest = manifest.computed_digest()?;
        manifest.validate()?;
        Ok(manifest)
    }

    pub(super) fn to_json(&self) -> Result<Vec<u8>, ManifestProblem> {
        serde_json::to_vec_pretty(self).map_err(|e| ManifestProblem::Syntax(e.to_string()))
    }

    pub(super) fn from_json(json: &[u8]) -> Result<Self, ManifestProblem> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let syntax = |e: serde_json::Error| ManifestProblem::Syntax(e.to_string());
        let Format { format } = serde_json::from_slice(json).map_err(syntax)?;
        if format != FORMAT {
            return Err(ManifestProblem::Format(format));
        }
        let manifest: Self = serde_json::from_slice(json).map_err(syntax)?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// Checks a manifest that came from a file or a peer.
    pub fn validate(&self) -> Result<(), ManifestProblem> {
        if self.format != FORMAT {
            return Err(ManifestProblem::Format(self.format));
        }
        if self.digest != self.computed_digest()? {
            return Err(ManifestProblem::Digest);
        }
        let names: BTreeSet<_> = self.files.iter().map(|f| f.name.as_str()).collect();
        let complete = names.contains(WEIGHTS_FILE) && names.contains(OPTIMIZER_FILE);
        let plain = names.iter().all(|name| check_file_name(name).is_ok());
        if !complete || !plain || names.len() != self.files.len() {
            return Err(ManifestProblem::Files);
        }
        Ok(())
    }

    fn computed_digest(&self) -> Result<String, ManifestProblem> {
        let without = Self { digest: String::new(), ..self.clone() };
        json_digest(&without).map_err(|e| ManifestProblem::Syntax(e.to_string()))
    }
}

/// Checks that `name` is a plain file name beside the manifest.
pub(super) fn check_file_name(name: &str) -> Result<(), CheckpointError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let plain = (1..=100).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(allowed);
    if plain && name != MANIFEST_FILE {
        Ok(())
    } else {
        Err(CheckpointError::FileName(name.chars().take(100).collect()))
    }
}
