//! One worker's part in one generation of one job, on a thread of its own.

mod artifacts;
pub(crate) mod data;
mod output;
mod prepare;
mod run;

use crate::cli::DeviceArg;
use crate::control::Control;
use crate::data::pool::Pool;
use crate::fault;
use crate::flight::{SharedGroup, Watch};
use crate::kept::{Kept, State};
use crate::lease::Lease;
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::state::desk::Desk;
use crate::state::follow::Follower;
use crate::state::pack::Copied;
use crate::tasks::TaskPlan;
use crate::train::Number;
use crate::train::compress;
use crate::train::device::device;
use crate::train::error::TrainError;
use crate::train::gpu;
use crate::train::wishes::Wishes;
use lockstep_collectives::{CollectiveError, Group};
use lockstep_common::dataset::ShardCache;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::job::{JobSpec, Precision};
use lockstep_common::wire::{Assignment, FromWorker, Outcome, Position, Resumption, StopMode};
use parking_lot::Mutex;
use prepare::Prepared;
use run::{Parts, Session};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;

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
    /// The threads that prepare samples.
    pub(crate) decoders: Arc<Pool>,
    /// This worker.
    pub(crate) worker: WorkerId,
    /// What is left of the last session.
    pub(crate) kept: Arc<Kept>,
}

/// Where a session's state comes from.
pub(crate) enum Origin {
    /// From the job file, a checkpoint, or the peers that hold it.
    Elsewhere,
    /// From what the last session has left.
    Kept,
    /// From the copy that has followed the job; as [`Self::Elsewhere`] if that does not get to where it should.
    Followed(Follower),
}

/// What the agent and the training thread share.
struct Shared {
    boundary: AtomicBool,
    checkpoint: AtomicBool,
    aborted: AtomicBool,
    /// Wakes a session that is still connecting when it is told to leave at once.
    abort: Notify,
    step: AtomicU64,
    lease: Arc<Lease>,
    /// The group to wake when the session is told to leave at once.
    group: Arc<SharedGroup>,
}

impl Shared {
    fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Relaxed)
    }

    /// How this rank has been told to end its part, if it has.
    fn wishes(&self) -> Wishes {
        Wishes {
            boundary: self.boundary.load(Ordering::Relaxed),
            checkpoint: self.checkpoint.load(Ordering::Relaxed),
            ..Wishes::default()
        }
    }
}

/// The agent's handle on a session.
pub(crate) struct SessionHandle {
    job: JobId,
    generation: Generation,
    shared: Arc<Shared>,
}

/// How a session has ended.
pub(crate) struct SessionEnd {
    pub(crate) job: JobId,
    pub(crate) generation: Generation,
    pub(crate) outcome: Outcome,
    /// How far the state is that is kept.
    pub(crate) held: Option<Position>,
}

impl SessionHandle {
    /// Which part this is, and the last step that it has committed.
    pub(crate) fn progress(&self) -> (JobId, Generation, u64) {
        (self.job, self.generation, self.shared.step.load(Ordering::Relaxed))
    }

    /// It may commit steps until then.
    pub(crate) fn extend_lease(&self, until: Duration) {
        self.shared.lease.extend(until);
    }

    /// Leaves as told.
    pub(crate) fn stop(&self, mode: StopMode) {
        match mode {
            StopMode::Boundary => self.shared.boundary.store(true, Ordering::Relaxed),
            StopMode::Checkpoint => self.shared.checkpoint.store(true, Ordering::Relaxed),
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
}

/// Starts the session for `assignment`; its end goes to `ends`. No other session runs.
pub(crate) fn start(
    environment: Environment,
    assignment: Assignment,
    origin: Origin,
    ends: UnboundedSender<SessionEnd>,
) -> SessionHandle {
    let shared = Arc::new(Shared {
        boundary: AtomicBool::new(false),
        checkpoint: AtomicBool::new(false),
        aborted: AtomicBool::new(false),
        abort: Notify::new(),
        step: AtomicU64::new(0),
        lease: Arc::new(Lease::default()),
        group: Arc::new(Mutex::new(None)),
    });
    let (job, generation) = (assignment.job, assignment.generation);
    let handle = SessionHandle { job, generation, shared: shared.clone() };
    let failed = ends.clone();
    let work = move || {
        environment.metrics.membership(generation.0, assignment.peers.len() as u32);
        fault::set_rank(assignment.rank);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(&environment, &assignment, origin, &shared)
        }));
        let step = shared.step.load(Ordering::Relaxed);
        let outcome = match result {
            Ok(Ok(outcome)) => outcome,
            // Only what the abort itself brought about; an error that came first is the one to tell.
            Ok(Err(TrainError::Collective(_))) if shared.is_aborted() => TrainError::Aborted.outcome(step),
            Ok(Err(error)) => error.outcome(step),
            Err(_) => Outcome::Failed {
                error: "internal error: the training thread panicked; see the worker's log".to_owned(),
            },
        };
        if let Outcome::Lost { error, .. } | Outcome::Failed { error } | Outcome::Unstored { error } =
            &outcome
        {
            tracing::warn!("{job} {generation}: {error}");
        }
        *shared.group.lock() = None;
        environment.metrics.membership(0, 0);
        let held = environment.kept.position(job);
        // An agent that is gone needs no word.
        let _ = ends.send(SessionEnd { job, generation, outcome, held });
    };
    if let Err(error) = std::thread::Builder::new().name(format!("train-{job}")).spawn(work) {
        let outcome = Outcome::Failed { error: format!("cannot start the training thread: {error}") };
        let _ = failed.send(SessionEnd { job, generation, outcome, held: None });
    }
    handle
}

fn run(
    environment: &Environment,
    assignment: &Assignment,
    origin: Origin,
    shared: &Arc<Shared>,
) -> Result<Outcome, TrainError> {
    // The optimizer's operations are short, and the other workers of this host have the other cores.
    tch::set_num_threads(1);
    let job =
        JobSpec::parse(&assignment.file, &assignment.toml).map_err(|e| TrainError::Fatal(e.to_string()))?;
    if !assignment.placement.is_valid() || assignment.placement.shards() != job.logical_shards {
        return Err(TrainError::Fatal("the coordinator placed other shards than the job has".to_owned()));
    }
    let keeps = !compress::keeps_state(&job.collective);
    let checks = job.checks.clone();
    // Filled as soon as there is a state, so that whatever comes after that does not lose it.
    let mut state = None;
    let result = match job.precision {
        Precision::F32 | Precision::Bf16 => {
            run_typed::<f32>(environment, assignment, origin, job, shared, &mut state)
        }
        Precision::F64 => run_typed::<f64>(environment, assignment, origin, job, shared, &mut state),
    };
    let goes_on = match &result {
        Ok(outcome) => matches!(outcome, Outcome::Stopped { .. } | Outcome::Lost { .. }),
        Err(error) => !matches!(error.outcome(0), Outcome::Failed { .. } | Outcome::Unstored { .. }),
    };
    if let Some(mut state) = state.filter(|_| keeps && goes_on) {
        // One that has changed by itself is not to be counted on.
        match state.replica.vouch(assignment.rank, &checks) {
            Ok(()) => environment.kept.put(assignment.job, state),
            Err(error) => {
                environment.metrics.mismatched();
                tracing::warn!("{} {}: {error}", assignment.job, assignment.generation);
            }
        }
    }
    result
}

fn run_typed<T: Number>(
    environment: &Environment,
    assignment: &Assignment,
    origin: Origin,
    job: JobSpec,
    shared: &Arc<Shared>,
    state: &mut Option<State>,
) -> Result<Outcome, TrainError> {
    let choice = gpu::choice(&assignment.peers, job.collective.backend)?;
    let desk = environment.mesh.station().open(assignment);
    // All that may take long comes before the ranks connect: from then on they wait for each other.
    let prepared = Prepared::<T>::new(environment, assignment, origin, &job, shared, state)?;
    let group = connect(environment, assignment, &job, shared, &desk.desk, &prepared.plan, state)?;
    *shared.group.lock() = Some(group.clone());
    if shared.is_aborted() {
        return Err(TrainError::Aborted);
    }
    let watch = (assignment.peers.len() > 1).then(|| {
        let (control, metrics) = (&environment.control, &environment.metrics);
        let of = (assignment.job, assignment.generation);
        Watch::start(&environment.runtime, control, metrics, of, shared.group.clone())
    });
    let device = device(environment.device);
    let result = gpu::carrier::<T>(&group, &assignment.peers, &job.collective, choice, device)
        .and_then(|carrier| {
            let group = group.clone();
            let parts = Parts { job, group, prepared, carrier, desk: desk.desk.clone() };
            Session::begin(environment, assignment, shared.clone(), parts, state)
        })
        .and_then(|mut session| {
            let outcome = session.train().or_else(|error| session.part(error));
            if let Err(error) = &outcome {
                abort(&group, error);
            }
            *state = Some(session.end());
            outcome
        });
    if let Err(error) = &result {
        abort(&group, error);
        if let Some(watch) = watch {
            watch.failed(&group);
        }
    }
    result
}

/// Forms the group, and meanwhile shows the state to those that are behind.
fn connect(
    environment: &Environment,
    assignment: &Assignment,
    job: &JobSpec,
    shared: &Shared,
    desk: &Desk,
    plan: &TaskPlan,
    state: &mut Option<State>,
) -> Result<Group, TrainError> {
    let source = match &assignment.resume {
        Resumption::Peers { sources, .. } => sources.contains(&assignment.rank),
        Resumption::Fresh | Resumption::Checkpoint { .. } => false,
    };
    if !source {
        desk.withdraw("this rank does not hold the state");
    }
    let (control, job_id, generation) = (environment.control.clone(), assignment.job, assignment.generation);
    let notices = move |line: &str| {
        control.tell(FromWorker::Log { job: job_id, generation, line: line.to_owned() });
    };
    let group = environment.mesh.group(assignment, job.reduction, &job.collective, Arc::new(notices));
    environment.runtime.block_on(async {
        tokio::pin!(group);
        let mut shown = !source;
        loop {
            tokio::select! {
                group = &mut group => return group.map_err(TrainError::from),
                () = shared.abort.notified() => return Err(TrainError::Aborted),
                () = desk.asked(), if !shown => {
                    if let Some(state) = state.as_mut() {
                        state.replica.vouch(assignment.rank, &job.checks).inspect_err(|_| environment.metrics.mismatched())?;
                        desk.show(Copied::of(&state.replica, plan)?.pack(assignment.job)?, &state.ledger);
                    }
                    shown = true;
                }
            }
        }
    })
}

/// Ends the group, so that nobody waits for this rank.
fn abort(group: &Group, error: &TrainError) {
    group.abort(match error {
        TrainError::Collective(cause) => cause.clone(),
        other => CollectiveError::Aborted(other.to_string()),
    });
}
