//! What a rank has ready before it connects to the others.

use super::data::Data;
use super::{Environment, Origin, Shared};
use crate::data::batch::Decoder;
use crate::data::loader::{Loader, Timetable};
use crate::kept::State;
use crate::ledger::Ledger;
use crate::state::heal::heal;
use crate::tasks::TaskPlan;
use crate::train::Number;
use crate::train::checkpoint;
use crate::train::device::device;
use crate::train::error::TrainError;
use crate::train::replica::Replica;
use lockstep_common::ids::Rank;
use lockstep_common::job::JobSpec;
use lockstep_common::wire::{Assignment, FromWorker, Position, Resumption};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tch::Tensor;

/// What the wires kept, if a checkpoint has it.
type Wires = Option<BTreeMap<String, Tensor>>;

/// A rank that can connect. Its state lies beside it.
pub(super) struct Prepared<T> {
    pub(super) plan: Arc<TaskPlan>,
    /// What the wires kept, if it is a checkpoint from which this generation goes on.
    pub(super) wires: Option<Wires>,
    pub(super) timetable: Timetable,
    pub(super) total_steps: u64,
    pub(super) loader: Loader,
    pub(super) test: Option<Arc<Decoder<T>>>,
}

impl<T: Number> Prepared<T> {
    /// Opens the data, gets the state, loads the first samples. What is kept goes to `state` before anything can fail.
    pub(super) fn new(
        environment: &Environment,
        assignment: &Assignment,
        origin: Origin,
        job: &JobSpec,
        shared: &Shared,
        state: &mut Option<State>,
    ) -> Result<Self, TrainError> {
        let step = match &assignment.resume {
            Resumption::Fresh => 0,
            Resumption::Checkpoint { step } => *step,
            Resumption::Peers { position, .. } => position.step,
        };
        if let Origin::Kept = &origin {
            *state = environment.kept.take(assignment.job);
        }
        shared.step.store(step, Ordering::Relaxed);
        let plan = Arc::new(TaskPlan::new(job));
        // The first samples are loaded while the state is on its way.
        let Data { train, test, timetable } = Data::open(environment, job, &assignment.datasets, &plan)?;
        let total_steps = job.total_steps(timetable.steps_per_epoch());
        let shards = assignment.placement.range(assignment.rank);
        let loader = Loader::start(train, timetable.clone(), shards, step..total_steps)?;
        let replica = || Replica::new(&plan, T::KIND, device(environment.device));
        let mut wires = None;
        match &assignment.resume {
            Resumption::Fresh => {
                let ledger = Ledger::starting_at(0, BTreeMap::new());
                let replica = Replica::first(&plan, T::KIND, device(environment.device))?;
                *state = Some(State { replica, ledger });
            }
            Resumption::Checkpoint { step } => {
                let (restored, kept) = restore(environment, assignment, *step, &plan, replica()?)?;
                (*state, wires) = (Some(restored), Some(kept));
            }
            Resumption::Peers { position, sources } => {
                let copy = match origin {
                    Origin::Followed(follower) => follower.finish(*position, &shared.aborted),
                    Origin::Kept | Origin::Elsewhere => state.take(),
                };
                // What is not this generation's must not be kept as this generation's.
                let copy = copy.filter(|state| state.replica.position() == *position);
                *state = Some(match copy {
                    Some(copy) => copy,
                    None if sources.contains(&assignment.rank) => {
                        let what =
                            format!("{} is to go on from {position} and has no such state", assignment.rank);
                        return Err(TrainError::Unavailable { what, culprit: Some(assignment.rank) });
                    }
                    None => fetch(environment, assignment, (*position, sources), &plan, replica()?, shared)?,
                });
            }
        }
        loader.warm_up(&shared.aborted)?;
        Ok(Self { plan, wires, timetable, total_steps, loader, test })
    }
}

/// The state of the checkpoint after `step`.
fn restore(
    environment: &Environment,
    assignment: &Assignment,
    step: u64,
    plan: &TaskPlan,
    mut replica: Replica,
) -> Result<(State, Wires), TrainError> {
    let (control, job, generation) = (&environment.control, assignment.job, assignment.generation);
    let (manifest, wires) = checkpoint::restore(control, job, generation, step, plan, &mut replica)?;
    if replica.step != step {
        let what = format!("the checkpoint of step {step} is one of step {}", replica.step);
        return Err(TrainError::Fatal(what));
    }
    let ledger = Ledger::starting_at(step, manifest.info.metrics);
    Ok((State { replica, ledger }, wires))
}

/// The state that the ranks in `sources` hold.
fn fetch(
    environment: &Environment,
    assignment: &Assignment,
    (position, sources): (Position, &[Rank]),
    plan: &TaskPlan,
    replica: Replica,
    shared: &Shared,
) -> Result<State, TrainError> {
    let healed = environment.runtime.block_on(async {
        tokio::select! {
            healed = heal(&environment.mesh, assignment, position, sources, plan, replica) => healed,
            () = shared.abort.notified() => Err(TrainError::Aborted),
        }
    });
    let (state, complaints) = healed.map_err(|error| match error {
        TrainError::Differ { what, .. } if plan.stops_on_mismatch() => TrainError::Fatal(what),
        other => other,
    })?;
    let (job, generation) = (assignment.job, assignment.generation);
    tracing::info!("{job} {generation}: fetched the state of {position} from the others");
    for line in complaints {
        tracing::warn!("{job} {generation}: {line}");
        environment.control.tell(FromWorker::Log { job, generation, line });
    }
    Ok(state)
}
