//! The trained networks that somebody names on the command line.

use super::args::CommonArgs;
use crate::evaluation::candidate::{Candidate, Recipe};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// Reads the checkpoints and files of weights at `paths`, to compute as `common` says; `dataset` is the test set, if one is
/// named. Fails with one line that names the path.
pub(super) fn read(paths: &[PathBuf], common: &CommonArgs, dataset: Option<&str>) -> Result<Vec<Candidate>> {
    let job = common.weights.job()?;
    let data = common.weights.data(dataset)?;
    let recipe = job.as_ref().map_or(Recipe::Data(&data), Recipe::Job);
    let read = |path: &Path| -> Result<Candidate> {
        let mut candidate = Candidate::read(path, &recipe)?;
        if let Some(precision) = common.precision {
            candidate.set_precision(precision.into())?;
        }
        Ok(candidate)
    };
    let candidates: Vec<_> =
        paths.iter().map(|path| read(path).with_context(|| shown(path))).collect::<Result<_>>()?;
    if common.weights.prepares() && !candidates.iter().any(Candidate::is_weights) {
        bail!("--resize, --mean and their like are for .safetensors files; a job's checkpoint knows its own");
    }
    Ok(candidates)
}

/// How errors name the checkpoint at `path`.
pub(super) fn shown(path: &Path) -> String {
    format!("checkpoint `{}`", path.display())
}
