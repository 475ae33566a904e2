//! One worker's part in one generation of one job, on a thread of its own.

use crate::cli::DeviceArg;
use crate::control::Control;
use crate::data::batch::Decoder;
use crate::data::loader::{Loader, Timetable};
use crate::data::source;
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::report::Reporter;
use crate::tasks::TaskPlan;
use crate::train::checkpoint::{self, Checkpointer};
use crate::train::clock::timed;
use crate::train::device::device;
use crate::train::error::TrainError;
use crate::train::evaluate::evaluate;
use crate::train::trainer::Trainer;
use crate::train::{Number, picture};
use lockstep_collectives::{CollectiveError, Group};
use lockstep_common::checkpoint::CheckpointInfo;
use lockstep_common::dataset::{DatasetReader, ShardCache};
use lockstep_common::ids::{Generation, JobId, Rank};
use lockstep_common::job::{JobSpec, Precision, Task};
use lockstep_common::sampler::Sampler;
use lockstep_common::wire::{Assignment, FromWorker, Outcome, Resumption, Running, StopMode};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// How long a finished rank waits for what it has sent to arrive.
const CLOSE: Duration = Duration::from_secs(5);

/// What a worker has whatever it is assigned.
#[derive(Clone)]
pub(crate) struct Environment {
    pub(crate) control: Control,
    pub(crate) metrics: Metrics,
    pub(crate) mesh: Mesh,
    pub(crate) runtime: Handle,
    pub(crate) home: PathBuf,
    pub(crate) datasets: Vec<PathBuf>,
    pub(crate) cache_bytes: u64,
    pub(crate) device: DeviceArg,
    pub(crate) threads: usize,
}

/// What the agent and the training thread share.
struct Shared {
    stop: AtomicBool,
    aborted: AtomicBool,
    step: AtomicU64,
    /// The group to wake when the session is told to leave at once.
    group: Mutex<Option<Group>>,
}

/// The agent's handle on a session.
pub(crate) struct SessionHandle {
    job: JobId,
    generation: Generation,
    rank: Rank,
    shared: Arc<Shared>,
    ended: watch::Receiver<bool>,
}

impl SessionHandle {
    /// Whether this is that generation of that job.
    pub(crate) fn is(&self, job: JobId, generation: Generation) -> bool {
        self.job == job && self.generation == generation
    }

    /// What to tell a coordinator that was away; `None` once the session has ended.
    pub(crate) fn running(&self) -> Option<Running> {
        (!*self.ended.borrow()).then(|| Running {
            job: self.job,
            generation: self.generation,
            rank: self.rank,
            step: self.shared.step.load(Ordering::Relaxed),
        })
    }

    /// Leaves as told.
    pub(crate) fn stop(&self, mode: StopMode) {
        match mode {
            StopMode::Checkpoint => self.shared.stop.store(true, Ordering::Relaxed),
            StopMode::Abort => self.abort("told to leave at once"),
        }
    }

    /// Leaves at once.
    pub(crate) fn abort(&self, reason: &str) {
        self.shared.aborted.store(true, Ordering::Relaxed);
        if let Some(group) = &*self.shared.group.lock() {
            group.abort(CollectiveError::Aborted(reason.to_owned()));
        }
    }

    /// Waits for the session's end.
    pub(crate) async fn ended(&self) {
        // An error means that the thread is gone, which is an end too.
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }
}

/// Starts the session for `assignment`.
pub(crate) fn start(environment: Environment, assignment: Assignment) -> SessionHandle {
    let shared = Arc::new(Shared {
        stop: AtomicBool::new(false),
        aborted: AtomicBool::new(false),
        step: AtomicU64::new(0),
        group: Mutex::new(None),
    });
    let (ended, watch) = watch::channel(false);
    let (job, generation, rank) = (assignment.job, assignment.generation, assignment.rank);
    let handle = SessionHandle { job, generation, rank, shared: shared.clone(), ended: watch };
    let control = environment.control.clone();
    let metrics = environment.metrics.clone();
    let work = move || {
        metrics.membership(generation.0, assignment.peers.len() as u32);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(&environment, &assignment, &shared)
        }));
        let step = shared.step.load(Ordering::Relaxed);
        let outcome = match result {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) if shared.aborted.load(Ordering::Relaxed) => TrainError::Aborted.outcome(step),
            Ok(Err(error)) => error.outcome(step),
            Err(_) => Outcome::Failed {
                error: "internal error: the training thread panicked; see the worker's log".to_owned(),
            },
        };
        if let Outcome::Lost { error, .. } | Outcome::Failed { error } = &outcome {
            tracing::warn!("{job} {generation}: {error}");
        }
        *shared.group.lock() = None;
        environment.metrics.membership(0, 0);
        // First the end, so that a coordinator that hears the outcome can assign again at once.
        let _ = ended.send(true);
        environment.control.tell(FromWorker::Ended { job, generation, outcome });
    };
    if let Err(error) = std::thread::Builder::new().name(format!("train-{job}")).spawn(work) {
        let outcome = Outcome::Failed { error: format!("cannot start the training thread: {error}") };
        control.tell(FromWorker::Ended { job, generation, outcome });
    }
    handle
}

fn run(
    environment: &Environment,
    assignment: &Assignment,
    shared: &Arc<Shared>,
) -> Result<Outcome, TrainError> {
    // The optimizer's operations are short, and the other workers of this host have the other cores.
    tch::set_num_threads(1);
    let job =
        JobSpec::parse(&assignment.file, &assignment.toml).map_err(|e| TrainError::Fatal(e.to_string()))?;
    if !assignment.placement.is_valid() || assignment.placement.shards() != job.logical_shards {
        return Err(TrainError::Fatal("the coordinator placed other shards than the job has".to_owned()));
    }
    match job.precision {
        Precision::F32 => run_typed::<f32>(environment, assignment, job, shared),
        Precision::F64 => run_typed::<f64>(environment, assignment, job, shared),
    }
}

fn run_typed<T: Number>(
    environment: &Environment,
    assignment: &Assignment,
    job: JobSpec,
    shared: &Arc<Shared>,
) -> Result<Outcome, TrainError> {
    let group = environment.runtime.block_on(environment.mesh.group(assignment, &job))?;
    *shared.group.lock() = Some(group.clone());
    if shared.aborted.load(Ordering::Relaxed) {
        return Err(TrainError::Aborted);
    }
    let mut session = Session::<T>::prepare(environment, assignment, job, shared.clone(), group)?;
    let outcome = session.train();
    session.count_shards();
    if let Err(error) = &outcome {
        session.trainer.abort(match error {
            TrainError::Collective(cause) => cause.clone(),
            other => CollectiveError::Aborted(other.to_string()),
        });
    }
    outcome
}

/// A label beyond the network's last logit would only fail deep inside libtorch.
fn check_classes(job: &JobSpec, train: &DatasetReader) -> Result<(), TrainError> {
    /// What every classifier has where a job file names no other number.
    const DEFAULT_CLASSES: u64 = 10;
    let Some(model) = &job.model else { return Ok(()) };
    let classes = model.options.get("classes").and_then(serde_json::Value::as_u64).unwrap_or(DEFAULT_CLASSES);
    let needed = u64::from(train.manifest().classes);
    if needed > classes {
        return Err(TrainError::Fatal(format!(
            "dataset `{}` has {needed} classes and the model {classes}; set `classes = {needed}` in `[model]`",
            train.manifest().name
        )));
    }
    Ok(())
}

/// Everything that a running generation needs on this worker.
struct Session<'a, T> {
    environment: &'a Environment,
    assignment: &'a Assignment,
    shared: Arc<Shared>,
    trainer: Trainer<T>,
    timetable: Timetable,
    total_steps: u64,
    loader: Loader,
    test: Option<Arc<Decoder<T>>>,
    cache: Arc<ShardCache>,
    /// The cache's hash failures and fetches that are in the metrics.
    counted: (u64, u64),
    checkpoints: Checkpointer,
    reporter: Reporter,
    metrics: BTreeMap<String, f64>,
}

impl<'a, T: Number> Session<'a, T> {
    fn prepare(
        environment: &'a Environment,
        assignment: &'a Assignment,
        job: JobSpec,
        shared: Arc<Shared>,
        group: Group,
    ) -> Result<Self, TrainError> {
        let fatal = |e: &dyn std::fmt::Display| TrainError::Fatal(e.to_string());
        let control = &environment.control;
        let device = device(environment.device);
        let cache = source::cache(
            &environment.home,
            environment.cache_bytes,
            &environment.datasets,
            control.clone(),
        )?;
        let open = |name: &str| source::open(name, &assignment.datasets, &cache, control);
        let train = open(&job.data.train)?;
        let statistics = (train.manifest().mean.clone(), train.manifest().std.clone());
        let decoder = |reader, augments| {
            let statistics = (statistics.0.as_slice(), statistics.1.as_slice());
            Decoder::<T>::new(reader, job.data.scale, statistics, augments, job.seed, device)
        };
        let test = match &job.data.test {
            Some(name) => Some(Arc::new(decoder(open(name)?, Vec::new())?)),
            None => None,
        };
        check_classes(&job, &train)?;
        let sampler =
            Sampler::new(job.seed, train.len(), u64::from(job.global_batch), job.logical_shards, true);
        let plan = Arc::new(TaskPlan::new(&job));
        let timetable = Timetable {
            sampler: Arc::new(sampler.map_err(|e| fatal(&e))?),
            per_step: plan.minibatches as u64,
        };
        let total_steps = job.total_steps(timetable.steps_per_epoch());
        let train = decoder(train, job.data.augment.clone())?;

        let shards = group.placement().range(group.rank());
        let mut trainer = Trainer::<T>::new(job, plan.clone(), group, device, environment.threads)?;
        let mut metrics = BTreeMap::new();
        if let Resumption::Checkpoint { step } = assignment.resume {
            let (job, generation) = (assignment.job, assignment.generation);
            let manifest = checkpoint::restore(control, job, generation, step, &plan, &mut trainer.replica)?;
            metrics = manifest.info.metrics;
        }
        let loader = Loader::start(train, timetable.clone(), shards, trainer.replica.step..total_steps)?;
        shared.step.store(trainer.replica.step, Ordering::Relaxed);
        let observed = environment.metrics.clone();
        let checkpoints = Checkpointer::new(
            control.clone(),
            assignment.job,
            assignment.generation,
            Arc::new(move |seconds| observed.checkpoint(seconds)),
        );
        let reporter = Reporter::new(control.clone(), assignment, total_steps);
        Ok(Self {
            environment,
            assignment,
            shared,
            trainer,
            timetable,
            total_steps,
            loader,
            test,
            cache,
            counted: (0, 0),
            checkpoints,
            reporter,
            metrics,
        })
    }

    /// Brings the metrics up to date with the cache, which lives as long as this session.
    fn count_shards(&mut self) {
        let now = (self.cache.hash_failures(), self.cache.fetches());
        self.environment.metrics.shards(now.0 - self.counted.0, now.1 - self.counted.1);
        self.counted = now;
    }

    fn is_first(&self) -> bool {
        self.assignment.rank == Rank(0)
    }

    fn train(&mut self) -> Result<Outcome, TrainError> {
        let per_epoch = self.timetable.steps_per_epoch();
        let (mut images, mut seconds) = (0u64, 0f64);
        while self.trainer.replica.step < self.total_steps {
            let start = Instant::now();
            let mut data = 0.0;
            let batches = timed(&mut data, || self.loader.next())?;
            let (samples, epoch) = (batches.samples, batches.epoch + 1);
            let before = self.trainer.group.stats();
            let ask_stop = self.shared.stop.load(Ordering::Relaxed);
            let mut done = self.trainer.step(batches, self.total_steps, per_epoch, ask_stop)?;
            done.times.data += data;
            let wall = start.elapsed().as_secs_f64();
            let step = self.trainer.replica.step;
            self.shared.step.store(step, Ordering::Relaxed);
            (images, seconds) = (images + samples, seconds + wall);
            self.environment.metrics.step(&done.figures, samples, &done.times, wall);
            self.environment.metrics.collectives(&before, &self.trainer.group.stats());
            self.count_shards();
            self.reporter.step(step, epoch, samples, wall, done.figures);

            let last = step == self.total_steps;
            if last || step.is_multiple_of(per_epoch) {
                self.end_of_epoch(step, epoch)?;
            }
            let every = self.trainer.job.checkpoint.every_steps;
            let due = every > 0 && step.is_multiple_of(every);
            let needed = last || done.stop;
            if needed || due {
                self.store(step, needed)?;
            }
            if done.stop && !last {
                self.settle()?;
                self.leave();
                return Ok(Outcome::Stopped { step });
            }
        }
        let step = self.trainer.replica.step;
        self.settle()?;
        let weights_digest = self.trainer.compare_replicas()?;
        if seconds > 0.0 {
            self.metrics.insert("images_per_second".to_owned(), images as f64 / seconds);
        }
        self.leave();
        let epoch = self.timetable.position(step.max(1) - 1).0 + 1;
        Ok(Outcome::Finished { weights_digest, step, epoch, metrics: self.metrics.clone() })
    }

    /// Evaluates, compares the replicas and leaves a picture where the task has one.
    fn end_of_epoch(&mut self, step: u64, epoch: u64) -> Result<(), TrainError> {
        if let Some(test) = &self.test
            && !self.trainer.plan.evaluation.is_empty()
        {
            let figures = evaluate(&self.trainer, test)?;
            self.reporter.metrics(step, epoch, figures.clone());
            self.metrics.extend(figures);
        }
        if self.is_first() && self.trainer.job.task == Task::Gan {
            let name = format!("samples-epoch-{epoch:04}.png");
            if let Some(png) = picture::png(&self.trainer)? {
                let (job, generation) = (self.assignment.job, self.assignment.generation);
                self.environment.control.store_artifact(job, generation, &name, png)?;
                self.reporter.log(format!("epoch {epoch}: sample grid in {name}"));
            }
        }
        Ok(())
    }

    /// Begins a checkpoint. One that is not `needed` is left out while the coordinator is away.
    fn store(&mut self, step: u64, needed: bool) -> Result<(), TrainError> {
        if !self.is_first() {
            return Ok(());
        }
        let job = &self.trainer.job;
        let (epoch, step_in_epoch) = self.timetable.position(step);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let info = CheckpointInfo {
            job_id: self.assignment.job,
            job_name: job.name.clone(),
            job_text: self.assignment.toml.clone(),
            task: match job.task {
                Task::Classify => "classify".to_owned(),
                Task::Gan => "gan".to_owned(),
            },
            seed: job.seed,
            step,
            epoch,
            step_in_epoch,
            phase_updates: BTreeMap::new(),
            generation: self.assignment.generation,
            metrics: self.metrics.clone(),
            created_unix_s: now.as_secs(),
        };
        // First the steps: whoever resumes from the checkpoint does not do them again.
        self.reporter.flush();
        let ready =
            if needed { self.checkpoints.finish().map(|()| true) } else { self.checkpoints.make_way() };
        match ready {
            Ok(true) => {}
            Ok(false) => {
                self.reporter.log(format!("no checkpoint at step {step}: the coordinator is away"));
                return Ok(());
            }
            Err(error) => {
                self.reporter.log(format!("a checkpoint could not be stored, training goes on: {error}"));
            }
        }
        self.checkpoints.begin(&self.trainer.replica, &self.trainer.plan, info)
    }

    /// Waits for the last checkpoint, reports what is left to report.
    fn settle(&mut self) -> Result<(), TrainError> {
        self.reporter.flush();
        self.checkpoints.finish()
    }

    /// Leaves the group in good order.
    fn leave(&mut self) {
        if let Some(group) = self.shared.group.lock().take() {
            group.close(CLOSE);
        }
    }
}
