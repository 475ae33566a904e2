//! What a rank has ready before it connects to the others.

use super::{Environment, Shared};
use crate::data::batch::Decoder;
use crate::data::loader::{Loader, Timetable};
use crate::data::source;
use crate::kept::State;
use crate::ledger::Ledger;
use crate::tasks::TaskPlan;
use crate::train::Number;
use crate::train::checkpoint;
use crate::train::device::device;
use crate::train::error::TrainError;
use crate::train::replica::Replica;
use lockstep_common::dataset::DatasetReader;
use lockstep_common::job::JobSpec;
use lockstep_common::sampler::Sampler;
use lockstep_common::wire::{Assignment, DatasetBrief, Position, Resumption};
use lockstep_member::Start;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tch::Tensor;

/// A rank that can connect. Its state lies beside it.
pub(super) struct Prepared<T> {
    pub(super) plan: Arc<TaskPlan>,
    /// What the wires kept, if it is a checkpoint from which this generation goes on.
    pub(super) wires: Option<Option<BTreeMap<String, Tensor>>>,
    pub(super) timetable: Timetable,
    pub(super) total_steps: u64,
    pub(super) loader: Loader,
    pub(super) test: Option<Arc<Decoder<T>>>,
}

/// A job's datasets, open, and when which samples come.
struct Data<T> {
    train: Decoder<T>,
    test: Option<Arc<Decoder<T>>>,
    timetable: Timetable,
}

impl<T: Number> Data<T> {
    fn open(
        environment: &Environment,
        job: &JobSpec,
        datasets: &[DatasetBrief],
        plan: &TaskPlan,
    ) -> Result<Self, TrainError> {
        let (control, device) = (&environment.control, device(environment.device));
        let open = |name: &str| source::open(name, datasets, &environment.shards, control);
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
        let sampler =
            Sampler::new(job.seed, train.len(), u64::from(job.global_batch), job.logical_shards, true);
        let timetable = Timetable {
            sampler: Arc::new(sampler.map_err(|e| TrainError::Fatal(e.to_string()))?),
            per_step: plan.minibatches as u64,
        };
        Ok(Self { train: decoder(train, job.data.augment.clone())?, test, timetable })
    }
}

impl<T: Number> Prepared<T> {
    /// Opens the data, gets the state, loads the first samples.
    pub(super) fn new(
        environment: &Environment,
        assignment: &Assignment,
        start: Start,
        job: &JobSpec,
        shared: &Shared,
        state: &mut Option<State>,
    ) -> Result<Self, TrainError> {
        let plan = Arc::new(TaskPlan::new(job));
        let (had, wires) = match &assignment.resume {
            // Before anything that can fail: it is not lost then.
            Resumption::Peers { position, sources } => {
                (peers_state(environment, assignment, start, (*position, sources))?, None)
            }
            Resumption::Fresh => {
                let replica = Replica::new(&plan, T::KIND, device(environment.device))?;
                (State { replica, ledger: Ledger::starting_at(0, BTreeMap::new()) }, None)
            }
            Resumption::Checkpoint { step } => {
                let mut replica = Replica::new(&plan, T::KIND, device(environment.device))?;
                let (job, generation) = (assignment.job, assignment.generation);
                let control = &environment.control;
                let (manifest, wires) =
                    checkpoint::restore(control, job, generation, *step, &plan, &mut replica)?;
                let ledger = Ledger::starting_at(replica.step, manifest.info.metrics);
                (State { replica, ledger }, Some(wires))
            }
        };
        let state = state.insert(had);
        shared.step.store(state.replica.step, Ordering::Relaxed);
        let Data { train, test, timetable } = Data::open(environment, job, &assignment.datasets, &plan)?;
        let total_steps = job.total_steps(timetable.steps_per_epoch());
        let shards = assignment.placement.range(assignment.rank);
        let loader = Loader::start(train, timetable.clone(), shards, state.replica.step..total_steps)?;
        loader.warm_up(&shared.aborted)?;
        Ok(Self { plan, wires, timetable, total_steps, loader, test })
    }
}

/// The state at `position` that the ranks in `sources` have.
fn peers_state(
    environment: &Environment,
    assignment: &Assignment,
    start: Start,
    (position, _sources): (Position, &[lockstep_common::ids::Rank]),
) -> Result<State, TrainError> {
    let rank = assignment.rank;
    let kept = (start == Start::Kept).then(|| environment.kept.take(assignment.job)).flatten();
    match kept {
        Some(state) if state.replica.position() == position => Ok(state),
        _ => Err(TrainError::Unavailable {
            what: format!("{rank} has no state of {position} to go on from"),
            culprit: Some(rank),
        }),
    }
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
