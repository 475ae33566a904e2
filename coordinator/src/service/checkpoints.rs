//! Checkpoints from and to workers.

use super::assembly::{MAX_CHECKPOINT_BYTES, Part, Parts, Place, too_large, verdict};
use super::requests::{Call, Stop};
use super::shards::blocking;
use super::{Shared, refuse};
use lockstep_common::checkpoint::{CheckpointError, CheckpointWriter, OpenFile, join};
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{CheckpointPart, FileHead, NOT_STORED, PartFile, Refusal, Response};
use std::sync::Arc;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};

/// How much of a checkpoint's file is read at a time.
const READ_BYTES: usize = 1 << 20;

/// Refuses what comes from a membership that is over.
const OLD_GENERATION: &str = "old_generation";

/// Weights, optimizers, manifest, and room for some more.
const MAX_FILES: usize = 16;

/// Takes a worker's part of a checkpoint. Where it is the last one, stores the checkpoint; answers when it is stored.
pub(super) async fn put(call: &mut Call, worker: WorkerId, head: CheckpointPart) -> Result<(), Stop> {
    let started = Instant::now();
    let shared = call.shared.clone();
    let place = place(&shared, worker, &head).await?;
    let bytes = head.files.iter().try_fold(0u64, |sum, f| sum.checked_add(f.bytes));
    if head.files.len() > MAX_FILES || bytes.is_none_or(|b| b > MAX_CHECKPOINT_BYTES) {
        return Err(too_large().into());
    }
    if is_stored(&shared, place).await? {
        // This worker has not heard of it.
        call.answer(&Response::Done).await?;
        return Ok(());
    }
    let mut files = Vec::with_capacity(head.files.len());
    for PartFile { name, bytes, blake3 } in head.files {
        let bytes = read_exactly(call, bytes).await?;
        if blake3::hash(&bytes).to_hex().as_str() != blake3 {
            return Err(bad(format_args!("`{name}` did not arrive as it was sent")).into());
        }
        files.push((name, bytes));
    }
    must_be_current(&shared, worker, place.job, place.generation).await?;
    let part = Part { info: head.info, weights_digest: head.weights_digest, files };
    let taken = shared.assemblies.add(place, part)?;
    if let Some(parts) = taken.complete {
        // On its own: the others wait for it too, so it does not end with this worker's connection.
        tokio::spawn(async move {
            let result = store(&shared, place, parts, started).await;
            if let Err(e) = &result {
                let (job, step, error) = (place.job, place.step, e.message.clone());
                // The end of a generation is no failure of its checkpoint, which nobody waits for any more.
                let is_over = e.reason == OLD_GENERATION;
                shared.hub.post(move |hub| match is_over {
                    true => hub.log(job, &format!("the checkpoint of step {step} is not stored: {error}")),
                    false => hub.checkpoint_failed(job, step, &error),
                });
            }
            shared.assemblies.finish(place, result);
        });
    }
    verdict(taken.verdict).await?;
    call.answer(&Response::Done).await?;
    Ok(())
}

/// Where a worker's part belongs.
async fn place(shared: &Shared, worker: WorkerId, head: &CheckpointPart) -> Result<Place, Refusal> {
    let (job, generation, step) = (head.job, head.generation, head.step);
    must_be_current(shared, worker, job, generation).await?;
    let members = shared.hub.look(move |hub| hub.core.job(job).map(|j| j.members.clone())).await?;
    let members = members.unwrap_or_default();
    let rank = members.iter().position(|member| *member == worker);
    let rank = rank.ok_or_else(|| bad(format_args!("{worker} has no part in {job}")))?;
    Ok(Place { job, generation, step, rank, ranks: members.len() })
}

/// Whether this very checkpoint has been stored.
async fn is_stored(shared: &Shared, place: Place) -> Result<bool, Refusal> {
    let dir = shared.dir.job(place.job);
    let info = blocking(move || dir.checkpoint_store().and_then(|store| store.info(place.step))).await?;
    Ok(info.is_ok_and(|info| info.generation == place.generation))
}

/// Stores the checkpoint that `parts` are.
async fn store(shared: &Arc<Shared>, place: Place, parts: Parts, started: Instant) -> Result<(), Refusal> {
    let (job, step) = (place.job, place.step);
    // Whoever resumes from it does not do its steps again, so they must have been taken down.
    shared.hub.settle(move |hub| hub.sync_audit(job)).await?.map_err(not_stored)?;
    let own = shared.clone();
    let runtime = tokio::runtime::Handle::current();
    let store = move || {
        // Whoever looks for the newest checkpoint, for the next membership, looks before this one or after it is there.
        let turn = own.assemblies.turn(job);
        let _turn = turn.lock();
        let generation = place.generation;
        let current = runtime.block_on(own.hub.look(move |hub| hub.core.is_running(job, generation)))?;
        if !current {
            return Err(refuse(OLD_GENERATION, format_args!("{generation} of {job} is over")));
        }
        write(&own, place, &parts)
    };
    blocking(store).await??;
    shared.metrics.checkpoint_stored(started.elapsed().as_secs_f64());
    shared.hub.settle(move |hub| hub.checkpoint_stored(job, step)).await?;
    prune(shared, job, step).await
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
    Err(refuse(OLD_GENERATION, format_args!("{worker} has no part in {generation} of {job} any longer")))
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

fn write(shared: &Shared, place: Place, parts: &Parts) -> Result<(), Refusal> {
    let info = parts.iter().find_map(|part| part.info.as_deref());
    let info = info.ok_or_else(|| bad("rank 0 did not say where the job was"))?;
    if info.step != place.step || info.job_id != place.job || info.generation != place.generation {
        return Err(bad(format_args!(
            "it says that it is of {} {} step {}, not of {} {} step {}",
            info.job_id, info.generation, info.step, place.job, place.generation, place.step
        )));
    }
    let digest = &parts[0].weights_digest;
    if parts.iter().any(|part| part.weights_digest != *digest) {
        return Err(bad("the ranks do not agree on the digest of its weights"));
    }
    let store = shared.dir.job(place.job).checkpoint_store().map_err(not_stored)?;
    let mut writer = CheckpointWriter::new(&store, info.clone()).map_err(not_stored)?;
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in parts.iter().flat_map(|part| &part.files) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    for name in names {
        let own: Vec<_> = parts.iter().filter_map(|part| part.file(name)).collect();
        let file = join(&own).map_err(|e| bad(format_args!("`{name}`: {e}")))?;
        writer.add(name, &file).map_err(failure)?;
    }
    if writer.weights_digest() != digest {
        let found = writer.weights_digest();
        return Err(bad(format_args!("the digest of its weights is {found} and the ranks said {digest}")));
    }
    writer.finish().map_err(failure)?;
    Ok(())
}

fn bad(what: impl ToString) -> Refusal {
    refuse("checkpoint", what)
}

/// This coordinator's disk is to blame, and not what was sent.
fn not_stored(what: impl ToString) -> Refusal {
    refuse(NOT_STORED, what)
}

fn failure(error: CheckpointError) -> Refusal {
    match error {
        CheckpointError::File(e) => not_stored(e),
        other => bad(other),
    }
}

/// Removes checkpoints beyond the number that the job keeps; the one of `step` has just been stored.
async fn prune(shared: &Shared, job: JobId, step: u64) -> Result<(), Refusal> {
    let keep = shared.hub.look(move |hub| hub.core.job(job).map(|j| j.keep_checkpoints as usize)).await?;
    let Some(keep) = keep else { return Ok(()) };
    let dir = shared.dir.job(job);
    let pruned =
        blocking(move || dir.checkpoint_store().and_then(|store| store.prune(keep, Some(step)))).await?;
    if let Err(e) = pruned {
        tracing::error!("{job}: old checkpoints could not be removed: {e}");
    }
    Ok(())
}
