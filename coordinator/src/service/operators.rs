//! What operators ask for: the queue, lists, logs, tokens.

use super::hub::Hub;
use super::requests::{Call, Stop};
use super::shards::blocking;
use super::{Shared, enroll, refuse};
use crate::jobs_dir::LogReader;
use lockstep_common::dataset::DatasetError;
use lockstep_common::ids::JobId;
use lockstep_common::job::JobSpec;
use lockstep_common::wire::{DatasetBrief, Refusal, Request, Response};
use lockstep_core::{CommandError, NewJob};
use std::path::Path;

/// A job file is some hundred lines.
const MAX_JOB_FILE_BYTES: usize = 1 << 20;

/// Lines of a log in one message.
const LINES_PER_MESSAGE: usize = 500;

/// Longest life of a token.
const MAX_TTL_S: u64 = 366 * 86_400;

/// Answers an operator.
pub(super) async fn answer(call: &mut Call, request: Request) -> Result<(), Stop> {
    let shared = call.shared.clone();
    let response = match request {
        Request::Submit { file, toml } => {
            let checked = shared.clone();
            let job = blocking(move || check_job(&checked, &file, &toml)).await??;
            Response::Submitted { job: submit(&shared, job).await? }
        }
        Request::Jobs => {
            let dir = shared.dir.clone();
            Response::Jobs(shared.hub.call(move |hub| hub.job_summaries(&dir)).await?)
        }
        Request::Status { job } => {
            let dir = shared.dir.clone();
            let known = move |hub: &mut Hub| hub.core.job(job).map(|record| hub.job_summary(&dir, record));
            Response::Jobs(vec![shared.hub.call(known).await?.ok_or_else(|| unknown(job))?])
        }
        Request::Logs { job, follow, from } => return logs(call, job, follow, from).await,
        Request::Cancel { job } => {
            command(&shared, move |hub| {
                let now_ms = hub.now_ms();
                hub.core.cancel(job, now_ms)
            })
            .await?
        }
        Request::Pause { job } => {
            command(&shared, move |hub| {
                let now_ms = hub.now_ms();
                hub.core.pause(job, now_ms)
            })
            .await?
        }
        Request::Resume { job } => command(&shared, move |hub| hub.core.resume(job)).await?,
        Request::Workers => Response::Workers(shared.hub.call(|hub| hub.worker_summaries()).await?),
        Request::NewToken { purpose, ttl_s, uses } => {
            if !(1..=MAX_TTL_S).contains(&ttl_s) || uses == 0 {
                let message = "a token must be good for 1 second to 366 days and for at least 1 use";
                return Err(refuse("malformed", message).into());
            }
            Response::Token { token: enroll::new_token(&shared, purpose, ttl_s, uses).await? }
        }
        Request::Enroll { .. }
        | Request::Session(_)
        | Request::Manifest { .. }
        | Request::Shard { .. }
        | Request::PutCheckpoint(_)
        | Request::GetCheckpoint { .. }
        | Request::PutArtifact { .. } => {
            return Err(refuse("not_authorised", "only a worker may ask for this").into());
        }
    };
    call.answer(&response).await?;
    Ok(())
}

/// Parses a job file and checks what only the coordinator can: that its datasets are there.
pub(crate) fn check_job(shared: &Shared, file: &str, toml: &str) -> Result<NewJob, Refusal> {
    if toml.len() > MAX_JOB_FILE_BYTES {
        return Err(refuse(
            "job_file",
            format_args!("{file}: a job file may have {MAX_JOB_FILE_BYTES} bytes"),
        ));
    }
    let file = Path::new(file).file_name().map_or_else(|| "job.toml".into(), |n| n.to_string_lossy());
    let spec = JobSpec::parse(&file, toml).map_err(|e| refuse("job_file", e))?;
    let mut datasets = Vec::new();
    let named = [("train", Some(&spec.data.train)), ("test", spec.data.test.as_ref())];
    for (key, name) in named.into_iter().filter_map(|(key, name)| Some((key, name?))) {
        let manifest = shared.datasets.manifest(name).map_err(|e| {
            let what = match e {
                DatasetError::Unknown { name, hint, .. } => format!("unknown dataset `{name}`{hint}"),
                other => other.to_string(),
            };
            refuse("job_file", JobSpec::fault(&file, toml, &["data", key], what))
        })?;
        datasets.push(DatasetBrief { name: name.clone(), digest: manifest.id });
    }
    Ok(NewJob {
        file: file.into_owned(),
        toml: toml.to_owned(),
        name: spec.name.clone(),
        logical_shards: spec.logical_shards,
        min_workers: spec.workers.min,
        max_workers: spec.max_workers(),
        keep_checkpoints: spec.checkpoint.keep,
        datasets,
        wait_for: None,
    })
}

/// Puts a checked job in the queue; it is durable when this returns.
pub(crate) async fn submit(shared: &Shared, job: NewJob) -> Result<JobId, Refusal> {
    shared
        .hub
        .call(move |hub| {
            let now_ms = hub.now_ms();
            hub.core.submit(job, now_ms)
        })
        .await
}

async fn command(
    shared: &Shared,
    command: impl FnOnce(&mut Hub) -> Result<(), CommandError> + Send + 'static,
) -> Result<Response, Refusal> {
    shared.hub.call(command).await?.map_err(|e| refuse("command", e))?;
    Ok(Response::Done)
}

fn unknown(job: JobId) -> Refusal {
    refuse("command", CommandError::UnknownJob(job))
}

/// Sends a job's log, and with `follow` what is added until the job has ended.
async fn logs(call: &mut Call, job: JobId, follow: bool, from: u64) -> Result<(), Stop> {
    let hub = call.shared.hub.clone();
    let mut changes = hub.changes();
    let mut reader = LogReader::new(&call.shared.dir.job(job));
    loop {
        let state =
            hub.call(move |hub| hub.core.job(job).map(|j| j.state)).await?.ok_or_else(|| unknown(job))?;
        changes.mark_unchanged();
        loop {
            let (read, lines) = blocking(move || {
                let lines = reader.read(LINES_PER_MESSAGE);
                (reader, lines)
            })
            .await?;
            reader = read;
            let mut lines = lines.map_err(|e| refuse("log", e))?;
            if lines.is_empty() {
                break;
            }
            lines.retain(|line| line.number >= from);
            if !lines.is_empty() {
                call.answer(&Response::Lines(lines)).await?;
            }
        }
        if !follow || state.is_final() || changes.changed().await.is_err() {
            return Ok(());
        }
    }
}
