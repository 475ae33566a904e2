//! What operators ask for: the queue, lists, logs, tokens.

use super::hub::Hub;
use super::requests::{Call, Stop};
use super::shards::blocking;
use super::{Shared, enroll, refuse};
use crate::jobs_dir::LogReader;
use lockstep_common::dataset::{DatasetError, Manifest, SampleShape};
use lockstep_common::ids::JobId;
use lockstep_common::job::{JobSpec, WireFormat};
use lockstep_common::wire::{DatasetBrief, Refusal, Request, Response, encode};
use lockstep_core::{CommandError, NewJob};
use serde::Serialize;
use std::path::Path;

/// A job file is some hundred lines.
const MAX_JOB_FILE_BYTES: usize = 1 << 20;

/// How much of a list or a log goes into one message, with room for one more item below the limit of a frame.
const PART_BYTES: usize = 1 << 20;

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
            let jobs = shared.hub.look(move |hub| hub.job_summaries(&dir)).await?;
            return list(call, jobs, Response::Jobs).await;
        }
        Request::Status { job } => {
            let dir = shared.dir.clone();
            let known = move |hub: &Hub| hub.core.job(job).map(|record| hub.job_status(&dir, record));
            Response::Jobs(vec![shared.hub.look(known).await?.ok_or_else(|| unknown(job))?])
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
        Request::Resume { job } => {
            command(&shared, move |hub| {
                let now_ms = hub.now_ms();
                hub.core.resume(job, now_ms)
            })
            .await?
        }
        Request::Workers => {
            let workers = shared.hub.look(Hub::worker_summaries).await?;
            return list(call, workers, Response::Workers).await;
        }
        Request::NewToken { purpose, ttl_s, uses } => {
            if !(1..=MAX_TTL_S).contains(&ttl_s) || uses == 0 {
                let message = "a token must be good for 1 second to 366 days and for at least 1 use";
                return Err(refuse("malformed", message).into());
            }
            Response::Token { token: enroll::new_token(&shared, purpose, ttl_s, uses).await? }
        }
        Request::Enroll { .. }
        | Request::Session(_)
        | Request::Ping
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

/// Sends a list in as many messages as its size asks for, at least one.
async fn list<T: Serialize>(
    call: &mut Call,
    items: Vec<T>,
    message: impl Fn(Vec<T>) -> Response,
) -> Result<(), Stop> {
    let (mut part, mut bytes) = (Vec::new(), 0);
    for item in items {
        bytes += encode(&item)?.len();
        part.push(item);
        if bytes >= PART_BYTES {
            call.answer(&message(std::mem::take(&mut part))).await?;
            bytes = 0;
        }
    }
    // An empty part at the end of a long list does no harm, and an empty list needs one.
    call.answer(&message(part)).await?;
    Ok(())
}

/// Parses a job file and checks what only the coordinator can: that its datasets are there and fit the network.
pub(crate) fn check_job(shared: &Shared, file: &str, toml: &str) -> Result<NewJob, Refusal> {
    if toml.len() > MAX_JOB_FILE_BYTES {
        return Err(refuse(
            "job_file",
            format_args!("{file}: a job file may have {MAX_JOB_FILE_BYTES} bytes"),
        ));
    }
    let spec = JobSpec::parse(file, toml).map_err(|e| refuse("job_file", e))?;
    let mut datasets = Vec::new();
    let mut whitened = None;
    let named = [("train", Some(&spec.data.train)), ("test", spec.data.test.as_ref())];
    for (key, name) in named.into_iter().filter_map(|(key, name)| Some((key, name?))) {
        let manifest = shared.datasets.manifest(name).map_err(|e| {
            let what = match e {
                DatasetError::Unknown { name, hint, .. } => format!("unknown dataset `{name}`{hint}"),
                other => other.to_string(),
            };
            refuse("job_file", JobSpec::fault(file, toml, &["data", key], what))
        })?;
        let refuse_key =
            |section, key, what| refuse("job_file", JobSpec::fault(file, toml, &[section, key], what));
        let shape = match key {
            "train" => spec.data.training_shape(&manifest),
            _ => spec.data.test_shape(&manifest, spec.evaluation.crops),
        };
        let shape = shape.map_err(|(key, what)| refuse_key("data", key, what))?;
        if let Some(trained) = whitened.filter(|trained| *trained != shape) {
            let what = format!(
                "the images of `{name}` are of {shape}, and those that its whitening fits of {trained}"
            );
            return Err(refuse_key("data", key, what));
        }
        whitened = spec.data.whiten.and(Some(shape));
        let misfit = too_few_classes(&spec, &manifest)
            .or_else(|| other_images(&spec, &manifest, shape))
            .or_else(|| too_small(&spec, key == "train", &manifest, shape));
        if let Some(Misfit { section, option, what }) = misfit {
            return Err(refuse_key(section, option, what));
        }
        datasets.push(DatasetBrief { name: name.clone(), digest: manifest.id });
    }
    let file = Path::new(file).file_name().map_or_else(|| "job.toml".into(), |n| n.to_string_lossy());
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
        // What int8 and PowerSGD keep belongs to shards, not to replicas: only a checkpoint brings it together.
        state_in_memory: !matches!(spec.collective.wire, WireFormat::Int8 | WireFormat::PowerSgd),
        orphan_timeout_ms: spec.workers.orphan_timeout_s * 1000,
    })
}

/// Where a network does not fit a dataset, and what is wrong there.
struct Misfit {
    section: &'static str,
    option: &'static str,
    what: String,
}

fn too_few_classes(spec: &JobSpec, data: &Manifest) -> Option<Misfit> {
    let given = spec.model.as_ref()?.options.get("classes")?.as_u64()?;
    let Manifest { name, classes, .. } = data;
    (given < u64::from(*classes)).then(|| Misfit {
        section: "model",
        option: "classes",
        what: format!("`classes` is {given} and dataset `{name}` has {classes}; make it at least {classes}"),
    })
}

/// A network that takes images of other channels, or of another number of pixels, than it gets.
fn other_images(spec: &JobSpec, data: &Manifest, shape: SampleShape) -> Option<Misfit> {
    spec.networks().into_iter().find_map(|(section, model)| {
        let (network, name, channels) = (&model.name, &data.name, shape.channels);
        let named = |option: &'static str| if model.options.contains_key(option) { option } else { "name" };
        if let Some(own) = model.channels()
            && own != channels
        {
            let what = format!(
                "`in_channels` is {own} and the images of dataset `{name}` have {channels}; make it {channels}, or set \
                 `channels = {own}` in `[data]`"
            );
            return Some(Misfit { section, option: named("in_channels"), what });
        }
        let (option, own) = model.numbers()?;
        let found = u64::from(channels) * u64::from(shape.height) * u64::from(shape.width);
        (u64::from(own) != found).then(|| Misfit {
            section,
            option: named(option),
            what: format!(
                "`{option}` of `{network}` is {own} and the images of dataset `{name}`, as `[data]` prepares them, have {found} \
                 numbers ({shape}); make it {found}"
            ),
        })
    })
}

/// A classifier that needs larger images than it gets of the training set or the test set.
fn too_small(spec: &JobSpec, is_train: bool, data: &Manifest, shape: SampleShape) -> Option<Misfit> {
    let model = spec.model.as_ref()?;
    // Of the training set such a job takes the statistics only.
    if is_train && spec.only_evaluates() {
        return None;
    }
    let (least, key) = match is_train {
        true => (model.least_side_in_training(), "augment"),
        false => (model.least_side(), "evaluate"),
    };
    let SampleShape { height, width, .. } = shape;
    let side = height.min(width);
    if side >= least {
        return None;
    }
    // Some are large enough for all but an auxiliary head.
    let (option, to_train, remedy) = match side >= model.least_side() {
        true => ("aux", " to train with `aux`", "set `aux = false`, or "),
        false => ("name", "", ""),
    };
    let (model, name) = (&model.name, &data.name);
    let what = format!(
        "`{model}` takes images of at least {least} x {least} pixels{to_train}, and gets those of dataset `{name}` as {height} x \
         {width}; {remedy}enlarge them in `{key}` of `[data]`"
    );
    Some(Misfit { section: "model", option, what })
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
            hub.look(move |hub| hub.core.job(job).map(|j| j.state)).await?.ok_or_else(|| unknown(job))?;
        changes.mark_unchanged();
        loop {
            let (read, lines) = blocking(move || {
                let lines = reader.read(PART_BYTES);
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
