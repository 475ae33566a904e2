//! Dataset manifests and shards for workers on other hosts.

use super::refuse;
use super::requests::{Call, Stop};
use lockstep_common::dataset::DatasetError;
use lockstep_common::wire::{FileHead, Refusal, Response};
use tokio::io::AsyncWriteExt;

fn refused(e: impl ToString) -> Refusal {
    refuse("dataset", e)
}

/// Answers with a dataset's manifest.
pub(super) async fn manifest(call: &mut Call, dataset: String) -> Result<(), Stop> {
    let shared = call.shared.clone();
    let read = move || {
        let manifest = shared.datasets.manifest(&dataset)?;
        manifest.to_json().map_err(|problem| DatasetError::Manifest { path: dataset.into(), problem })
    };
    let json = blocking(read).await?.map_err(refused)?;
    let json = String::from_utf8(json).map_err(refused)?;
    call.answer(&Response::Manifest { json }).await?;
    Ok(())
}

/// Answers with a shard, after checking its bytes: a damaged one must not travel.
pub(super) async fn shard(call: &mut Call, dataset: String, hash: String) -> Result<(), Stop> {
    let shared = call.shared.clone();
    let read = move || -> Result<(String, Vec<u8>), Refusal> {
        let path = shared.datasets.shard_path(&hash).map_err(refused)?;
        let again =
            format!("`coordinator dataset verify {dataset}` tells more; add the dataset again to repair it");
        let bytes = std::fs::read(&path)
            .map_err(|e| refused(format_args!("shard `{}` cannot be read: {e}; {again}", path.display())))?;
        if blake3::hash(&bytes).to_hex().as_str() != hash {
            shared.metrics.shard_refused();
            let message = format!("shard `{}` of `{dataset}` has flipped bytes; {again}", path.display());
            return Err(refuse("shard_damaged", message));
        }
        Ok((hash, bytes))
    };
    let (name, bytes) = blocking(read).await??;
    call.answer(&Response::Files(vec![FileHead { name, bytes: bytes.len() as u64 }])).await?;
    call.send.write_all(&bytes).await.map_err(std::io::Error::from)?;
    call.send.flush().await?;
    Ok(())
}

/// Runs file work off the async threads.
pub(super) async fn blocking<R: Send + 'static>(
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| refuse("internal", format_args!("internal error: {e}")))
}
