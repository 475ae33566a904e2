//! One worker's part in one generation of one job, on a thread of its own.

use crate::cli::DeviceArg;
use crate::control::Control;
use crate::data::batch::Decoder;
use crate::data::loader::{Loader, Timetable};
use crate::data::source;
use crate::fault::{self, Point};
use crate::flight::{SharedGroup, Watch};
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::report::Reporter;
use crate::tasks::TaskPlan;
use crate::train::checkpoint::{self, Checkpointer};
use crate::train::clock::timed;
use crate::train::device::device;
use crate::train::device_buckets::Carrier;
use crate::train::error::TrainError;
use crate::train::evaluate::evaluate;
use crate::train::gpu;
use crate::train::replica::Replica;
use crate::train::trainer::Trainer;
use crate::train::{Number, mismatch, picture};
use lockstep_collectives::{CollectiveError, Group};
use lockstep_common::checkpoint::CheckpointInfo;
use lockstep_common::dataset::{DatasetReader, ShardCache};
use lockstep_common::ids::{Generation, JobId, Rank};
use lockstep_common::job::{JobSpec, OnMismatch, Precision, Task};
use lockstep_common::sampler::Sampler;
use lockstep_common::wire::{Assignment, FromWorker, Outcome, Resumption, Running, StopMode};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};
use tch::Tensor;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};

/// How long a finished rank waits for what it has sent to arrive.
const CLOSE: Duration = Duration::from_secs(5);

/// What a worker has whatever it is assigned.
#[derive(Clone)]
pub(crate) struct Environment {
    pub(crate) control: Control,
    pub(crate) metrics: Metrics,
    pub(crate) mesh: Mesh,
    pub(crate) runtime: Handle,
    pub(crate) shards: Arc<ShardCache>,
    pub(crate) device: DeviceArg,
    pub(crate) threads: usize,
}

/// What the agent and the training thread share.
struct Shared {
    stop: AtomicBool,
    aborted: AtomicBool,
    /// Wakes a session that is still connecting when it is told to leave at once.
    abort: Notify,
    step: AtomicU64,
    /// The group to wake when the session is told to leave at once.
    group: Arc<SharedGroup>,
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
            StopMode::Boundary | StopMode::Checkpoint => self.shared.stop.store(true, Ordering::Relaxed),
            StopMode::Abort => self.abort("told to leave at once"),
        }
    }

    /// Leaves at once.
    pub(crate) fn abort(&self, reason: &str) {
        self.shared.aborted.store(true, Ordering::Relaxed);
        self.shared.abort.notify_one();
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

/// Starts the session for `assignment`, once the `previous` one, which must have been aborted, has ended.
pub(crate) fn start(
    environment: Environment,
    assignment: Assignment,
    previous: Option<SessionHandle>,
) -> SessionHandle {
    let shared = Arc::new(Shared {
        stop: AtomicBool::new(false),
        aborted: AtomicBool::new(false),
        abort: Notify::new(),
        step: AtomicU64::new(0),
        group: Arc::new(Mutex::new(None)),
    });
    let (ended, watch) = watch::channel(false);
    let (job, generation, rank) = (assignment.job, assignment.generation, assignment.rank);
    let handle = SessionHandle { job, generation, rank, shared: shared.clone(), ended: watch };
    let control = environment.control.clone();
    let metrics = environment.metrics.clone();
    let work = move || {
        if let Some(previous) = previous {
            // Two sessions at a time would need twice the memory.
            environment.runtime.block_on(previous.ended());
        }
        metrics.membership(generation.0, assignment.peers.len() as u32);
        fault::set_rank(rank);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(&environment, &assignment, &shared)
        }));
        let step = shared.step.load(Ordering::Relaxed);
        let outcome = match result {
            Ok(Ok(outcome)) => outcome,
            // Only what the abort itself brought about; an error that came first is the one to tell.
            Ok(Err(TrainError::Collective(_))) if shared.aborted.load(Ordering::Relaxed) => {
                TrainError::Aborted.outcome(step)
            }
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
        environment.control.tell(FromWorker::Ended { job, generation, outcome, held: None });
    };
    if let Err(error) = std::thread::Builder::new().name(format!("train-{job}")).spawn(work) {
        let outcome = Outcome::Failed { error: format!("cannot start the training thread: {error}") };
        control.tell(FromWorker::Ended { job, generation, outcome, held: None });
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
    let choice = gpu::choice(&assignment.peers, job.collective.backend)?;
    // All that may take long comes before the ranks connect: from then on they wait for each other.
    let prepared = Prepared::<T>::new(environment, assignment, &job, shared)?;
    let group = environment.runtime.block_on(async {
        tokio::select! {
            group = environment.mesh.group(assignment, job.reduction, &job.collective) => group.map_err(TrainError::from),
            () = shared.abort.notified() => Err(TrainError::Aborted),
        }
    })?;
    *shared.group.lock() = Some(group.clone());
    if shared.aborted.load(Ordering::Relaxed) {
        return Err(TrainError::Aborted);
    }
    let watch = (assignment.peers.len() > 1).then(|| {
        let (control, metrics) = (&environment.control, &environment.metrics);
        let of = (assignment.job, assignment.generation);
        Watch::start(&environment.runtime, control, metrics, of, shared.group.clone())
    });
    let device = device(environment.device);
    let result =
        gpu::carrier::<T>(&group, &assignment.peers, &job.collective, choice, device).and_then(|carrier| {
            let mut session = Session::begin(
                environment,
                assignment,
                job,
                shared.clone(),
                group.clone(),
                prepared,
                carrier,
            )?;
            let outcome = session.train().or_else(|error| session.part(error));
            session.count_shards();
            outcome
        });
    if let Err(error) = &result {
        group.abort(match error {
            TrainError::Collective(cause) => cause.clone(),
            other => CollectiveError::Aborted(other.to_string()),
        });
        if let Some(watch) = watch {
            watch.failed(&group);
        }
    }
    result
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
    checkpoints: Checkpointer,
    /// Pictures on their way to the coordinator.
    pictures: Vec<JoinHandle<()>>,
    reporter: Reporter,
    metrics: BTreeMap<String, f64>,
}

/// What a rank has ready before it connects to the others.
struct Prepared<T> {
    plan: Arc<TaskPlan>,
    replica: Replica,
    /// What the wires kept, if it is a checkpoint from which this generation goes on.
    wires: Option<Option<BTreeMap<String, Tensor>>>,
    timetable: Timetable,
    total_steps: u64,
    loader: Loader,
    test: Option<Arc<Decoder<T>>>,
    metrics: BTreeMap<String, f64>,
}

impl<T: Number> Prepared<T> {
    /// Opens the data, restores the checkpoint, loads the first samples.
    fn new(
        environment: &Environment,
        assignment: &Assignment,
        job: &JobSpec,
        shared: &Shared,
    ) -> Result<Self, TrainError> {
        let (control, device) = (&environment.control, device(environment.device));
        let open = |name: &str| source::open(name, &assignment.datasets, &environment.shards, control);
        let train = open(&job.data.train)?;
        check_classes(job, &train)?;
        let statistics = (train.manifest().mean.clone(), train.manifest().std.clone());
        let decoder = |reader, augments| {
            let statistics = (statistics.0.as_slice(), statistics.1.as_slice());
            Decoder::<T>::new(reader, job.data.scale, statistics, augments, job.seed, device)
        };
        let test = match &job.data.test {
            Some(name) => Some(Arc::new(decoder(open(name)?, Vec::new())?)),
            None => None,
        };
        let plan = Arc::new(TaskPlan::new(job));
        let sampler =
            Sampler::new(job.seed, train.len(), u64::from(job.global_batch), job.logical_shards, true);
        let timetable = Timetable {
            sampler: Arc::new(sampler.map_err(|e| TrainError::Fatal(e.to_string()))?),
            per_step: plan.minibatches as u64,
        };
        let total_steps = job.total_steps(timetable.steps_per_epoch());

        let mut replica = Replica::new(&plan, T::KIND, device)?;
        let mut metrics = BTreeMap::new();
        let mut wires = None;
        if let Resumption::Checkpoint { step } = assignment.resume {
            let (job, generation) = (assignment.job, assignment.generation);
            let (manifest, kept) = checkpoint::restore(control, job, generation, step, &plan, &mut replica)?;
            metrics = manifest.info.metrics;
            wires = Some(kept);
        }
        shared.step.store(replica.step, Ordering::Relaxed);
        let train = decoder(train, job.data.augment.clone())?;
        let shards = assignment.placement.range(assignment.rank);
        let loader = Loader::start(train, timetable.clone(), shards, replica.step..total_steps)?;
        loader.warm_up(&shared.aborted)?;
        Ok(Self { plan, replica, wires, timetable, total_steps, loader, test, metrics })
    }
}

impl<'a, T: Number> Session<'a, T> {
    fn begin(
        environment: &'a Environment,
        assignment: &'a Assignment,
        job: JobSpec,
        shared: Arc<Shared>,
        group: Group,
        prepared: Prepared<T>,
        carrier: Option<Arc<dyn Carrier>>,
    ) -> Result<Self, TrainError> {
        let Prepared { plan, replica, wires, timetable, total_steps, loader, test, metrics } = prepared;
        let control = &environment.control;
        let observed = environment.metrics.clone();
        let checkpoints = Checkpointer::new(
            control.clone(),
            assignment.job,
            assignment.generation,
            Arc::new(move |seconds| observed.checkpoint(seconds)),
        );
        let trainer = Trainer::<T>::new(job, plan, group, replica, environment.threads)?.carried_by(carrier);
        if let Some(wires) = wires {
            trainer.restore_wires(wires.as_ref())?;
        }
        Ok(Self {
            environment,
            assignment,
            shared,
            trainer,
            timetable,
            total_steps,
            loader,
            test,
            checkpoints,
            pictures: Vec::new(),
            reporter: Reporter::new(control.clone(), assignment, total_steps),
            metrics,
        })
    }

    /// Brings the metrics up to date with the cache.
    fn count_shards(&self) {
        let cache = &self.environment.shards;
        self.environment.metrics.shards(cache.hash_failures(), cache.fetches());
    }

    fn is_first(&self) -> bool {
        self.assignment.rank == Rank(0)
    }

    fn train(&mut self) -> Result<Outcome, TrainError> {
        let per_epoch = self.timetable.steps_per_epoch();
        let (mut images, mut seconds) = (0u64, 0f64);
        let (mut steps, mut comm, mut gradients) = (0u64, 0f64, 0f64);
        let mut digest = None;
        while self.trainer.replica.step < self.total_steps {
            let start = Instant::now();
            let mut data = 0.0;
            fault::point(Point::Data, self.trainer.replica.step + 1);
            let batches = timed(&mut data, || self.loader.next(&self.shared.aborted))?;
            let (samples, epoch) = (batches.samples, batches.epoch + 1);
            let before = self.trainer.group.stats();
            let ask_stop = self.shared.stop.load(Ordering::Relaxed);
            let mut done = self.trainer.step(batches, self.total_steps, per_epoch, ask_stop)?;
            done.times.data += data;
            let wall = start.elapsed().as_secs_f64();
            let step = self.trainer.replica.step;
            self.shared.step.store(step, Ordering::Relaxed);
            (images, seconds) = (images + samples, seconds + wall);
            (steps, comm) = (steps + 1, comm + done.times.comm(wall));
            gradients += done.times.gradients;
            self.environment.metrics.step(&done.figures, samples, &done.times, wall);
            self.environment.metrics.collectives(&before, &self.trainer.group.stats());
            self.count_shards();
            fault::point(Point::Boundary, step);
            if fault::flips(step) {
                self.trainer.replica.flip_bit()?;
            }
            self.reporter.step(step, epoch, samples, wall, done.figures, done.shards);

            let last = step == self.total_steps;
            let epoch_ends = last || step.is_multiple_of(per_epoch);
            let every = self.trainer.job.checkpoint.every_steps;
            let due = every > 0 && step.is_multiple_of(every);
            let needed = last || done.stop;
            if epoch_ends {
                self.end_of_epoch(step, epoch)?;
            }
            if epoch_ends || needed || due || self.is_check_due(step) {
                // Before a checkpoint hands the state on, and before rank 0 turns to the coordinator while the
                // others wait.
                let mut seconds = 0.0;
                digest = Some(timed(&mut seconds, || self.trainer.compare_replicas())?);
                self.environment.metrics.compared(seconds);
            }
            if needed || due {
                self.store(step, needed)?;
            }
            if done.stop && !last {
                if let Err(error) = self.settle() {
                    self.reporter.log(format!("stopped without a checkpoint of step {step}: {error}"));
                }
                self.leave();
                return Ok(Outcome::Stopped { step });
            }
        }
        let step = self.trainer.replica.step;
        let weights_digest = digest.map_or_else(|| self.trainer.compare_replicas(), Ok)?;
        self.settle()?;
        if seconds > 0.0 {
            let mut insert = |name: &str, value| self.metrics.insert(name.to_owned(), value);
            insert("images_per_second", images as f64 / seconds);
            insert("step_seconds", seconds / steps as f64);
            // Waiting that no computing hides: all of it, and what lies between backward and its reduced gradients.
            insert("comm_seconds", comm / steps as f64);
            insert("grad_wait_seconds", gradients / steps as f64);
        }
        self.leave();
        let epoch = self.timetable.position(step.max(1) - 1).0 + 1;
        Ok(Outcome::Finished { weights_digest, step, epoch, metrics: self.metrics.clone() })
    }

    /// Whether the replicas are to be compared after this step, besides where they always are.
    fn is_check_due(&self, step: u64) -> bool {
        let every = self.trainer.job.checks.digest_every_steps;
        every > 0 && step.is_multiple_of(every) && self.trainer.group.world_size() > 1
    }

    /// Ends with the others, in good order, after an error that all ranks have come to together.
    fn part(&mut self, error: TrainError) -> Result<Outcome, TrainError> {
        let TrainError::Mismatch(mismatch) = error else { return Err(error) };
        let what = mismatch::describe(&mismatch, &self.assignment.peers);
        if mismatch.is_odd(self.assignment.rank) {
            self.environment.metrics.mismatched();
        }
        self.reporter.flush();
        let outcome = match self.trainer.job.checks.on_mismatch {
            OnMismatch::Stop => Outcome::Failed { error: what },
            OnMismatch::Heal => {
                self.reporter.log(format!("{what}; all go back to the newest checkpoint"));
                Outcome::Lost { error: what, culprit: mismatch.culprit() }
            }
        };
        self.leave();
        Ok(outcome)
    }

    /// Evaluates, and leaves a picture where the task has one.
    fn end_of_epoch(&mut self, step: u64, epoch: u64) -> Result<(), TrainError> {
        if let Some(test) = &self.test
            && !self.trainer.plan.evaluation.is_empty()
        {
            let figures = evaluate(&self.trainer, test)?;
            self.reporter.metrics(step, epoch, figures.clone());
            self.metrics.extend(figures);
        }
        if self.is_first()
            && self.trainer.job.task == Task::Gan
            && let Some(png) = picture::png(&self.trainer)?
        {
            self.send_picture(epoch, png)?;
        }
        Ok(())
    }

    /// Sends a picture in the background: training waits for no picture, and fails for none.
    fn send_picture(&mut self, epoch: u64, png: Vec<u8>) -> Result<(), TrainError> {
        let (job, generation) = (self.assignment.job, self.assignment.generation);
        let control = self.environment.control.clone();
        let send = move || {
            let name = format!("samples-epoch-{epoch:04}.png");
            let line = match control.store_artifact(job, generation, &name, png) {
                Ok(()) => format!("epoch {epoch}: sample grid in {name}"),
                Err(error) => format!("epoch {epoch}: the sample grid could not be stored: {error}"),
            };
            control.tell(FromWorker::Log { job, generation, line });
        };
        let thread = std::thread::Builder::new().name("picture".to_owned()).spawn(send);
        let thread = thread.map_err(|e| TrainError::Fatal(format!("cannot start a thread: {e}")))?;
        self.pictures.retain(|p| !p.is_finished());
        self.pictures.push(thread);
        Ok(())
    }

    /// Begins a checkpoint. One that is not `needed` is left out while the one before is on its way.
    fn store(&mut self, step: u64, needed: bool) -> Result<(), TrainError> {
        let wires = self.trainer.wire_state()?;
        if !self.is_first() {
            return Ok(());
        }
        let job = &self.trainer.job;
        let (epoch, step_in_epoch) = self.timetable.position(step);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let names = self.trainer.plan.networks.iter().map(|n| n.name.to_owned());
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
            phase_updates: names.zip(self.trainer.replica.updates().iter().copied()).collect(),
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
                self.reporter
                    .log(format!("no checkpoint at step {step}: the one before is still on its way"));
                return Ok(());
            }
            Err(error) => {
                self.reporter.log(format!("a checkpoint could not be stored, training goes on: {error}"));
            }
        }
        self.checkpoints.begin(&self.trainer.replica, &self.trainer.plan, wires, info)
    }

    /// Waits for the last checkpoint, reports what is left to report.
    fn settle(&mut self) -> Result<(), TrainError> {
        self.reporter.flush();
        for picture in self.pictures.drain(..) {
            // Its own thread has reported what went wrong, but for a panic, which concerns no step.
            let _ = picture.join();
        }
        self.checkpoints.finish()
    }

    /// Leaves the group in good order.
    fn leave(&mut self) {
        if let Some(group) = self.shared.group.lock().take() {
            group.close(CLOSE);
        }
    }
}
