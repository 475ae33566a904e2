//! `coordinator run`: a coordinator and its workers in one command, on this machine.

mod progress;
mod spawn;

use crate::cli::RunArgs;
use crate::commands::JobReport;
use crate::data_dir::DataDir;
use crate::output::{duration, hint, note, say_json};
use crate::service::{Options, Scope, Service, Shared, TakenUp, check_job, new_token, submit};
use anyhow::{Context, Result, anyhow, bail};
use lockstep_common::ids::JobId;
use lockstep_common::job::JobSpec;
use lockstep_common::wire::{JobState, JobSummary, Refusal, TokenPurpose};
use progress::Progress;
use serde::Serialize;
use spawn::{Fleet, Incident, Recipe};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Workers of a run that does not say how many.
const DEFAULT_WORKERS: u32 = 2;

/// How often the display is brought up to date.
const REFRESH: Duration = Duration::from_millis(200);

/// Local workers need their token only to enrol, which they do at once.
const TOKEN_TTL_S: u64 = 3600;

/// Trains the job in the foreground.
pub(crate) async fn run(dir: DataDir, args: RunArgs) -> Result<ExitCode> {
    let started = Instant::now();
    let mut signals = Signals::new()?;
    let path = args.job.display().to_string();
    let toml = std::fs::read_to_string(&args.job).with_context(|| format!("cannot read `{path}`"))?;
    let spec = JobSpec::parse(&path, &toml)?;
    let workers = worker_count(&args, &spec, &path)?;
    let program = spawn::worker_program()?;

    let scope = if args.fresh { Scope::New } else { Scope::Job { toml: toml.clone() } };
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let service = Service::start(Options { dir: dir.clone(), listen, http: args.http, scope }).await?;
    let mut progress = Progress::new(args.json, spec.epochs, spec.global_batch);
    let plan = Plan {
        path: &path,
        toml,
        spec: &spec,
        workers,
        devices: args.devices,
        threads: args.threads,
        program,
    };
    let outcome = train(&service, plan, &mut progress, &mut signals).await;
    progress.finish();
    service.stop().await;
    let (job, stopped) = outcome?;
    if !args.json {
        summarize(&dir, &job, started.elapsed());
    }
    say_json(&RunReport { report: JobReport::new(&job), seconds: started.elapsed().as_secs_f64() });
    match (job.state, stopped) {
        (JobState::Finished, _) => Ok(ExitCode::SUCCESS),
        (JobState::Paused, _) | (_, true) => {
            note(format_args!("stopped at step {}; type the same command to go on", job.step));
            Ok(ExitCode::FAILURE)
        }
        _ => {
            note(format_args!("error: {} {}: {}", job.id, job.state, job.reason));
            hint(format_args!("see {}", dir.job(job.id).log().display()));
            if job.state == JobState::Failed && job.checkpoint.is_some() {
                hint("the same command goes on from the newest checkpoint; with --fresh it starts anew");
            }
            Ok(ExitCode::FAILURE)
        }
    }
}

/// What is to be run.
struct Plan<'a> {
    path: &'a str,
    toml: String,
    spec: &'a JobSpec,
    workers: u32,
    devices: Vec<String>,
    threads: Option<u32>,
    program: PathBuf,
}

/// Runs the job on workers of its own; says also whether it was stopped by a signal.
async fn train(
    service: &Service,
    plan: Plan<'_>,
    progress: &mut Progress,
    signals: &mut Signals,
) -> Result<(JobSummary, bool)> {
    let Plan { path, toml, spec, workers, devices, threads, program } = plan;
    let shared = &service.shared;
    let job = prepare(service, path, toml, workers, progress).await?;
    let token = new_token(shared, TokenPurpose::Worker, TOKEN_TTL_S, 4 * workers).await.map_err(refused)?;
    let recipe = Recipe {
        program,
        coordinator: service.address(),
        token,
        datasets: shared.dir.datasets(),
        devices,
        threads: threads.unwrap_or_else(|| (cores() / workers).max(1)),
    };
    let places = (1..=workers).map(|n| (shared.dir.worker(n), shared.dir.job(job).worker_log(n))).collect();
    let mut fleet = Fleet::start(recipe, places)?;
    let watch = Watch { shared, job, min_workers: spec.workers.min };
    let outcome = watch.follow(&mut fleet, progress, signals).await;
    fleet.dismiss().await;
    outcome
}

/// The object on standard output at the end.
#[derive(Serialize)]
struct RunReport<'a> {
    #[serde(flatten)]
    report: JobReport<'a>,
    seconds: f64,
}

fn refused(refusal: Refusal) -> anyhow::Error {
    anyhow!(refusal.message)
}

fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

fn worker_count(args: &RunArgs, spec: &JobSpec, path: &str) -> Result<u32> {
    let (min, max) = (spec.workers.min, spec.max_workers());
    let named = args.devices.len() as u32;
    match args.workers {
        None if named > max => {
            bail!(
                "`{path}` takes {min} to {max} workers, and `--devices` names {named}; `--workers N` takes the first N"
            )
        }
        None if named == 0 => Ok(DEFAULT_WORKERS.clamp(min, max)),
        None => Ok(named.max(min)),
        Some(n) if (min..=max).contains(&n) => Ok(n),
        Some(n) => {
            bail!("`{path}` takes {min} to {max} workers, not {n}; see its `[workers]` and `logical_shards`")
        }
    }
}

/// Takes up an unfinished run of the same job file, or submits the job.
async fn prepare(
    service: &Service,
    path: &str,
    toml: String,
    workers: u32,
    progress: &Progress,
) -> Result<JobId> {
    let shared = &service.shared;
    let Some(TakenUp { job, failure }) = service.taken_up().cloned() else {
        let checked = check_job(shared, path, &toml).map_err(refused)?;
        let job = lockstep_core::NewJob { wait_for: Some(workers), ..checked };
        return submit(shared, job).await.map_err(refused);
    };
    let found = shared.dir.job(job).checkpoint_store()?.latest_good()?;
    for bad in &found.refused {
        progress.note(format_args!("warning: {bad}"));
    }
    let from =
        found.good.map_or_else(|| "the start".to_owned(), |manifest| format!("step {}", manifest.info.step));
    let after = failure.map(|error| format!(" after its failure: {error}")).unwrap_or_default();
    progress.note(format_args!("resuming {job} from {from}{after}"));
    let resumed = shared
        .hub
        .call(move |hub| {
            let now_ms = hub.now_ms();
            hub.core.set_wait_for(job, Some(workers), now_ms)
        })
        .await;
    resumed.map_err(refused)??;
    Ok(job)
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// A job of this process and what it needs.
struct Watch<'a> {
    shared: &'a Arc<Shared>,
    job: JobId,
    min_workers: u32,
}

impl Watch<'_> {
    /// Follows the job to its end, or until a second signal; says whether it was stopped by one.
    async fn follow(
        &self,
        fleet: &mut Fleet,
        progress: &mut Progress,
        signals: &mut Signals,
    ) -> Result<(JobSummary, bool)> {
        let mut stopping = false;
        let mut refresh = tokio::time::interval(REFRESH);
        loop {
            tokio::select! {
                _ = refresh.tick() => {}
                () = signals.next() => {
                    if stopping {
                        return Ok((self.summary().await?, true));
                    }
                    stopping = true;
                    progress.note("stopping after a checkpoint, or after the evaluation in progress; once more to leave at once");
                    self.pause().await?;
                }
            }
            let job = self.summary().await?;
            progress.show(&job);
            if job.state.is_final() || job.state == JobState::Paused {
                return Ok((job, stopping));
            }
            for incident in fleet.tend()? {
                match incident {
                    Incident::Died(what) => progress.note(format_args!("warning: {what}")),
                    Incident::Unusable(what) => bail!(what),
                    Incident::GivenUp(what) => {
                        progress.note(format_args!("warning: {what}"));
                        self.go_on_with(fleet.size(), &what).await?;
                    }
                }
            }
        }
    }

    async fn summary(&self) -> Result<JobSummary> {
        let (dir, job) = (self.shared.dir.clone(), self.job);
        let summary =
            self.shared.hub.look(move |hub| hub.core.job(job).map(|j| hub.job_summary(&dir, j))).await;
        summary.map_err(refused)?.with_context(|| format!("{job} has vanished"))
    }

    async fn pause(&self) -> Result<()> {
        let job = self.job;
        let paused = self.shared.hub.call(move |hub| {
            let now_ms = hub.now_ms();
            hub.core.pause(job, now_ms)
        });
        // The job may have ended a moment ago, which the next look at it tells.
        if let Err(e) = paused.await.map_err(refused)? {
            tracing::debug!("{e}");
        }
        Ok(())
    }

    /// Lets the job go on with fewer workers, if it can.
    async fn go_on_with(&self, workers: u32, why: &str) -> Result<()> {
        let job = self.job;
        if workers < self.min_workers.max(1) {
            bail!("{why}");
        }
        self.shared
            .hub
            .call(move |hub| {
                let now_ms = hub.now_ms();
                hub.core.set_wait_for(job, Some(workers), now_ms)
            })
            .await
            .map_err(refused)??;
        Ok(())
    }
}

fn summarize(dir: &DataDir, job: &JobSummary, elapsed: Duration) {
    let folder = dir.job(job.id);
    note(format_args!("\n{} `{}` {} after {}", job.id, job.name, job.state, duration(elapsed.as_secs())));
    let line = |name: &str, value: &dyn std::fmt::Display| note(format_args!("  {name:<20} {value}"));
    for (name, value) in &job.metrics {
        line(name, &format_args!("{value:.5}"));
    }
    if let Some(digest) = &job.weights_digest {
        line("weights", digest);
    }
    if let Some(checkpoint) = &job.checkpoint {
        line("checkpoint", checkpoint);
    }
    line("log", &folder.log().display());
    line("metrics", &folder.metrics().display());
    if folder.artifacts().is_dir() {
        line("artifacts", &folder.artifacts().display());
    }
    if job.state == JobState::Finished {
        if job.checkpoint.is_some() {
            hint(format_args!(
                "`coordinator checkpoint export {} FILE.safetensors` writes the weights for other programs",
                job.id
            ));
        }
        hint("`coordinator run JOB.toml --workers N` gives the same weights with any number of workers");
    }
}
