//! Checkpoints from and to workers.

use super::requests::{Call, Stop};
use super::shards::blocking;
use super::{Shared, refuse};
use lockstep_common::checkpoint::{CheckpointFiles, CheckpointManifest, MANIFEST_FILE, OpenFile};
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{CheckpointHead, FileHead, Refusal, Response};
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};

/// A checkpoint is held in memory while it is checked; one of more than this is no model that this release can train.
const MAX_CHECKPOINT_BYTES: u64 = 16 << 30;

/// How much of a checkpoint's file is read at a time.
const READ_BYTES: usize = 1 << 20;

/// Weights, optimizers, manifest, and room for some more.
const MAX_FILES: usize = 16;

/// Takes a checkpoint from a worker of the job's present generation and stores it.
pub(super) async fn put(call: &mut Call, worker: WorkerId, head: CheckpointHead) -> Result<(), Stop> {
    let started = Instant::now();
    let shared = call.shared.clone();
    must_be_current(&shared, worker, head.job, head.generation).await?;
    let bytes = head.files.iter().try_fold(0u64, |sum, f| sum.checked_add(f.bytes));
    if head.files.len() > MAX_FILES || bytes.is_none_or(|b| b > MAX_CHECKPOINT_BYTES) {
        let limit = MAX_CHECKPOINT_BYTES >> 30;
        let message = format!("a checkpoint may have {MAX_FILES} files and {limit} GiB; this one has more");
        return Err(refuse("too_large", message).into());
    }
    let mut files = Vec::with_capacity(head.files.len());
    for file in &head.files {
        files.push((file.name.clone(), read_exactly(call, file.bytes).await?));
    }
    must_be_current(&shared, worker, head.job, head.generation).await?;
    let (job, step) = (head.job, head.step);
    // Whoever resumes from it does not do its steps again, so they must have been taken down.
    let synced = call.shared.hub.settle(move |hub| hub.sync_audit(job)).await?;
    synced.map_err(|e| refuse("audit", e))?;
    if let Err(e) = blocking(move || install(&shared, &head, files)).await? {
        // The job goes on without this checkpoint; the log says so.
        let line = format!("the checkpoint of step {step} was not stored: {}", e.message);
        call.shared.hub.post(move |hub| hub.log(job, &line));
        return Err(e.into());
    }
    call.shared.metrics.checkpoint_stored(started.elapsed().as_secs_f64());
    call.shared.hub.settle(move |hub| hub.core.handle_checkpoint_stored(job, step)).await?;
    call.answer(&Response::Done).await?;
    prune(call, job, step).await
}

/// Sends a checkpoint to a worker of the job's present generation.
pub(super) async fn get(
    call: &mut Call,
    worker: WorkerId,
    job: JobId,
    generation: Generation,
    step: u64,
) -> Result<(), Stop> {
    let shared = call.shared.clone();
    must_be_current(&shared, worker, job, generation).await?;
    let open = move || shared.dir.job(job).checkpoint_store().and_then(|store| store.open_files(step));
    let files = blocking(open).await?.map_err(|e| refuse("checkpoint", e))?;
    let heads = files.iter().map(|f| FileHead { name: f.name.clone(), bytes: f.bytes });
    call.answer(&Response::Files(heads.collect())).await?;
    for OpenFile { file, bytes, .. } in files {
        let mut file = tokio::fs::File::from_std(file).take(bytes);
        tokio::io::copy_buf(&mut BufReader::with_capacity(READ_BYTES, &mut file), &mut call.send).await?;
        if file.limit() > 0 {
            // It was shortened after it was checked; the receiver sees the stream end early.
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
    }
    call.send.flush().await?;
    Ok(())
}

/// Refuses what comes from a membership that is over.
pub(super) async fn must_be_current(
    shared: &Shared,
    worker: WorkerId,
    job: JobId,
    generation: Generation,
) -> Result<(), Refusal> {
    if shared.hub.look(move |hub| hub.core.is_current(worker, job, generation)).await? {
        return Ok(());
    }
    Err(refuse("old_generation", format_args!("{worker} has no part in {generation} of {job} any longer")))
}

/// Reads the announced number of bytes; memory grows with what has arrived.
pub(super) async fn read_exactly(call: &mut Call, bytes: u64) -> Result<Vec<u8>, Stop> {
    let mut buffer = Vec::new();
    (&mut call.recv).take(bytes).read_to_end(&mut buffer).await?;
    if (buffer.len() as u64) < bytes {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    Ok(buffer)
}

fn install(shared: &Shared, head: &CheckpointHead, mut files: Vec<(String, Vec<u8>)>) -> Result<(), Refusal> {
    let bad = |what: String| refuse("checkpoint", what);
    let manifest = match files.pop() {
        Some((name, bytes)) if name == MANIFEST_FILE => bytes,
        _ => return Err(bad(format!("a checkpoint must end with `{MANIFEST_FILE}`"))),
    };
    let manifest: CheckpointManifest =
        serde_json::from_slice(&manifest).map_err(|e| bad(format!("its manifest does not parse: {e}")))?;
    if manifest.info.step != head.step || manifest.info.job_id != head.job {
        let (job, step) = (manifest.info.job_id, manifest.info.step);
        return Err(bad(format!(
            "its manifest is of {job} step {step}, not of {} step {}",
            head.job, head.step
        )));
    }
    let store = shared.dir.job(head.job).checkpoint_store().map_err(|e| bad(e.to_string()))?;
    store.install(&CheckpointFiles { manifest, files }).map_err(|e| bad(e.to_string()))
}

/// Removes checkpoints beyond the number that the job keeps; the one of `step` has just been stored.
async fn prune(call: &mut Call, job: JobId, step: u64) -> Result<(), Stop> {
    let keep =
        call.shared.hub.look(move |hub| hub.core.job(job).map(|j| j.keep_checkpoints as usize)).await?;
    let Some(keep) = keep else { return Ok(()) };
    let dir = call.shared.dir.job(job);
    let pruned =
        blocking(move || dir.checkpoint_store().and_then(|store| store.prune(keep, Some(step)))).await?;
    if let Err(e) = pruned {
        tracing::error!("{job}: old checkpoints could not be removed: {e}");
    }
    Ok(())
}
