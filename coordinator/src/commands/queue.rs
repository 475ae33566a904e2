//! Commands on a running coordinator's queue.

use super::flight;
use crate::client::Client;
use crate::data_dir::DataDir;
use crate::output::{duration, hint, say, say_json, table};
use anyhow::{Context, Result, bail};
use lockstep_common::ids::{JobId, WorkerId};
use lockstep_common::net::NetError;
use lockstep_common::wire::{
    CheckpointFailure, FrameError, JobState, JobSummary, Request, Response, Straggler, WorkerSummary,
};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The object that `status --json` and `run` end with.
#[derive(Serialize)]
pub(crate) struct JobReport<'a> {
    job: String,
    name: &'a str,
    state: String,
    reason: &'a str,
    step: u64,
    total_steps: u64,
    epoch: u64,
    metrics: &'a BTreeMap<String, f64>,
    weights_digest: Option<&'a str>,
    checkpoint: Option<&'a str>,
    generation: u64,
    workers: Vec<String>,
    age_s: u64,
    eta_s: Option<u64>,
    flight: Option<Value>,
    stragglers: Vec<Value>,
    checkpoint_failure: Option<Value>,
}

impl<'a> JobReport<'a> {
    pub(crate) fn new(job: &'a JobSummary) -> Self {
        Self {
            job: job.id.to_string(),
            name: &job.name,
            state: job.state.to_string(),
            reason: &job.reason,
            step: job.step,
            total_steps: job.total_steps,
            epoch: job.epoch,
            metrics: &job.metrics,
            weights_digest: job.weights_digest.as_deref(),
            checkpoint: job.checkpoint.as_deref(),
            generation: job.generation.0,
            workers: job.workers.iter().map(WorkerId::to_string).collect(),
            age_s: job.age_s,
            eta_s: job.eta_s,
            flight: job.flight.as_ref().map(flight::json),
            stragglers: job.stragglers.iter().map(straggler_json).collect(),
            checkpoint_failure: job.checkpoint_failure.as_ref().map(failure_json),
        }
    }
}

fn straggler_json(straggler: &Straggler) -> Value {
    let pace = &straggler.pace;
    json!({
        "rank": straggler.rank.0,
        "worker": straggler.worker.to_string(),
        "host": straggler.host,
        "times": straggler.times,
        "seconds": { "data": pace.data, "forward": pace.forward, "backward": pace.backward, "comm": pace.comm, "optimizer": pace.optimizer },
    })
}

fn straggler_line(straggler: &Straggler) -> String {
    let Straggler { rank, worker, host, times, pace } = straggler;
    format!(
        "{rank} ({worker} on {host}): a shard takes it {times:.1} times as long as the others; of a step it spends {:.3} s on \
         data, {:.3} s forward, {:.3} s backward",
        pace.data, pace.forward, pace.backward
    )
}

fn failure_json(failure: &CheckpointFailure) -> Value {
    json!({
        "step": failure.step,
        "error": failure.error,
        "checkpoints": failure.checkpoints,
        "first_step": failure.first_step,
        "stored_step": failure.stored,
    })
}

/// What a job's checkpoints suffer from.
fn failure_line(failure: &CheckpointFailure, state: JobState) -> String {
    let CheckpointFailure { step, error, checkpoints, first_step, stored } = failure;
    let which = match checkpoints {
        1 => format!("the checkpoint of step {step}"),
        _ => format!("{checkpoints} checkpoints of steps {first_step} to {step}"),
    };
    let goes_on = if state == JobState::Running { "training goes on; " } else { "" };
    let newest =
        stored.map_or_else(|| "there is none".to_owned(), |step| format!("the newest is of step {step}"));
    format!("{which} could not be stored: {error}; {goes_on}{newest}")
}

pub(super) async fn submit(dir: &DataDir, path: &Path, json: bool) -> Result<()> {
    let toml = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let file = path.display().to_string();
    let client = Client::connect(dir).await?;
    let Response::Submitted { job } = client.ask(&Request::Submit { file, toml }).await? else {
        return unexpected();
    };
    if json {
        say_json(&json!({ "job": job.to_string() }));
        return Ok(());
    }
    say(format_args!("submitted {job}"));
    hint(format_args!("`coordinator logs {job} -f` follows it, `coordinator status {job}` shows it"));
    Ok(())
}

pub(super) async fn jobs(dir: &DataDir, json: bool) -> Result<()> {
    let client = Client::connect(dir).await?;
    let jobs = client.jobs().await?;
    if json {
        say_json(&jobs.iter().map(JobReport::new).collect::<Vec<_>>());
        return Ok(());
    }
    let head = ["JOB", "NAME", "STATE", "STEP", "WORKERS", "AGE", "REASON"].map(str::to_owned).to_vec();
    let row = |j: &JobSummary| {
        vec![
            j.id.to_string(),
            j.name.clone(),
            j.state.to_string(),
            progress(j),
            j.workers.len().to_string(),
            duration(j.age_s),
            match &j.checkpoint_failure {
                Some(failure) => format!("{}; {}", j.reason, failure_line(failure, j.state)),
                None => j.reason.clone(),
            },
        ]
    };
    table(&std::iter::once(head).chain(jobs.iter().map(row)).collect::<Vec<_>>());
    hint(match jobs.last() {
        Some(job) => format!("`coordinator status {}` shows one of them", job.id),
        None => "`coordinator submit JOB.toml` puts a job in the queue".to_owned(),
    });
    Ok(())
}

pub(super) async fn status(dir: &DataDir, job: JobId, json: bool) -> Result<()> {
    let client = Client::connect(dir).await?;
    let Response::Jobs(jobs) = client.ask(&Request::Status { job }).await? else { return unexpected() };
    let Some(job) = jobs.first() else { return unexpected() };
    if json {
        say_json(&JobReport::new(job));
        return Ok(());
    }
    say(format_args!("{} `{}`", job.id, job.name));
    let workers: Vec<_> = job.workers.iter().map(WorkerId::to_string).collect();
    let metrics: Vec<_> = job.metrics.iter().map(|(name, value)| format!("{name} {value:.5}")).collect();
    let mut rows = vec![
        ("state", job.state.to_string()),
        ("reason", job.reason.clone()),
        ("step", progress(job)),
        ("epoch", job.epoch.to_string()),
        ("generation", job.generation.to_string()),
        ("workers", workers.join(" ")),
        ("metrics", metrics.join(", ")),
        ("checkpoint", job.checkpoint.clone().unwrap_or_default()),
        ("weights", job.weights_digest.clone().unwrap_or_default()),
        ("age", duration(job.age_s)),
        ("left", job.eta_s.map(duration).unwrap_or_default()),
    ];
    rows.extend(job.checkpoint_failure.iter().map(|f| ("unstored", failure_line(f, job.state))));
    rows.extend(job.stragglers.iter().map(|s| ("straggler", straggler_line(s))));
    if let Some(flight) = &job.flight {
        rows.extend(flight::rows(flight));
    }
    rows.retain(|(_, value)| !value.is_empty());
    table(&rows.into_iter().map(|(name, value)| vec![format!("  {name}"), value]).collect::<Vec<_>>());
    if let Some(flight) = job.flight.as_ref().filter(|f| !f.waiting.is_empty()) {
        table(&flight::table(flight));
    }
    hint(match job.state {
        JobState::Failed => format!(
            "`coordinator logs {0}` shows its log, `coordinator resume {0}` tries it again from its newest checkpoint",
            job.id
        ),
        _ => format!("`coordinator logs {}` shows its log", job.id),
    });
    Ok(())
}

pub(super) async fn logs(dir: &DataDir, job: JobId, follow: bool, json: bool) -> Result<()> {
    let client = Client::connect(dir).await?;
    let mut exchange = client.open(&Request::Logs { job, follow, from: 0 }).await?;
    let mut next = exchange.answer().await;
    loop {
        match next {
            Ok(Response::Lines(lines)) if json => {
                lines.iter().for_each(|line| say_json(&json!({ "number": line.number, "text": line.text })));
            }
            Ok(Response::Lines(lines)) => lines.iter().for_each(|line| say(&line.text)),
            Ok(_) => return unexpected(),
            Err(NetError::Frame(FrameError::Closed)) => break,
            Err(e) => return Err(e.into()),
        }
        next = exchange.next_answer().await;
    }
    if !json {
        hint(format_args!("`coordinator status {job}` shows where it is"));
    }
    Ok(())
}

pub(super) async fn cancel(dir: &DataDir, job: JobId, json: bool) -> Result<()> {
    command(dir, job, Request::Cancel { job }, json, "is being cancelled").await
}

pub(super) async fn pause(dir: &DataDir, job: JobId, json: bool) -> Result<()> {
    command(dir, job, Request::Pause { job }, json, "is being paused").await
}

pub(super) async fn resume(dir: &DataDir, job: JobId, json: bool) -> Result<()> {
    command(dir, job, Request::Resume { job }, json, "is back in the queue").await
}

async fn command(dir: &DataDir, job: JobId, request: Request, json: bool, done: &str) -> Result<()> {
    let client = Client::connect(dir).await?;
    let Response::Done = client.ask(&request).await? else { return unexpected() };
    if json {
        say_json(&json!({ "job": job.to_string() }));
        return Ok(());
    }
    say(format_args!("{job} {done}"));
    hint(format_args!("`coordinator status {job}` shows where it is"));
    Ok(())
}

pub(super) async fn workers(dir: &DataDir, json: bool) -> Result<()> {
    let client = Client::connect(dir).await?;
    let workers = client.workers().await?;
    if json {
        let object = |w: &WorkerSummary| {
            json!({
                "worker": w.id.to_string(),
                "host": w.host,
                "device": w.device,
                "state": w.state,
                "job": w.job.map(|j| j.to_string()),
                "addresses": w.addresses,
                "metrics": w.metrics,
                "watched": w.watched,
                "silent_s": w.silent_s,
            })
        };
        say_json(&workers.iter().map(object).collect::<Vec<_>>());
        return Ok(());
    }
    let head = ["WORKER", "HOST", "DEVICE", "STATE", "JOB", "HEARD"].map(str::to_owned).to_vec();
    let row = |w: &WorkerSummary| {
        vec![
            w.id.to_string(),
            w.host.clone(),
            w.device.clone(),
            w.state.clone(),
            w.job.map(|j| j.to_string()).unwrap_or_default(),
            if w.state == "away" { format!("{} ago", duration(w.silent_s)) } else { "now".to_owned() },
        ]
    };
    table(&std::iter::once(head).chain(workers.iter().map(row)).collect::<Vec<_>>());
    hint(if workers.is_empty() {
        "`coordinator token new` prints how workers join"
    } else {
        "`coordinator submit JOB.toml` puts a job in the queue"
    });
    Ok(())
}

fn progress(job: &JobSummary) -> String {
    match job.total_steps {
        0 => job.step.to_string(),
        total => format!("{}/{total}", job.step),
    }
}

fn unexpected() -> Result<()> {
    bail!("the coordinator gave an answer that does not fit the question")
}
