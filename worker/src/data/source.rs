//! Where a job's samples come from: a store on this host, the cache, or the coordinator.

use crate::control::Control;
use crate::train::error::TrainError;
use lockstep_common::dataset::{DatasetReader, FetchError, Manifest, ShardCache, ShardFetch};
use lockstep_common::wire::DatasetBrief;
use std::path::{Path, PathBuf};
use std::sync::Arc;

struct FromCoordinator(Control);

impl ShardFetch for FromCoordinator {
    fn fetch(&self, dataset: &str, hash: &str) -> Result<Vec<u8>, FetchError> {
        self.0.shard(dataset, hash).map_err(|e| FetchError(e.to_string()))
    }
}

/// The worker's shard cache, in `home`, over stores on this host and the coordinator.
pub(crate) fn cache(
    home: &Path,
    max_bytes: u64,
    stores: &[PathBuf],
    control: Control,
) -> Result<Arc<ShardCache>, TrainError> {
    let cache =
        ShardCache::new(&home.join("shards"), max_bytes).map_err(|e| TrainError::Fatal(e.to_string()))?;
    let folders = stores.iter().map(|store| store.join("shards"));
    Ok(Arc::new(cache.with_local(folders).with_fetch(Arc::new(FromCoordinator(control)))))
}

/// A reader of the dataset `name`, whose manifest must be the one that the job started with.
pub(crate) fn open(
    name: &str,
    briefs: &[DatasetBrief],
    cache: &Arc<ShardCache>,
    control: &Control,
) -> Result<DatasetReader, TrainError> {
    let json = control.manifest(name)?;
    let refused = |what: String| TrainError::Fatal(format!("dataset `{name}`: {what}"));
    let manifest = Manifest::from_json(json.as_bytes()).map_err(|e| refused(e.to_string()))?;
    if let Some(brief) = briefs.iter().find(|b| b.name == name)
        && brief.digest != manifest.id
    {
        return Err(refused("it was replaced since the job started; submit the job again".to_owned()));
    }
    DatasetReader::new(Arc::new(manifest), cache.clone()).map_err(|e| refused(e.to_string()))
}
