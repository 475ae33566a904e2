//! What a worker keeps of a job between two generations.

use crate::ledger::Ledger;
use crate::train::replica::Replica;
use lockstep_common::ids::JobId;
use lockstep_common::wire::Position;
use parking_lot::Mutex;

/// A rank's training state.
pub(crate) struct State {
    /// Weights, optimizers, position.
    pub(crate) replica: Replica,
    /// What the run has told.
    pub(crate) ledger: Ledger,
}

/// The place for one job's state.
#[derive(Default)]
pub(crate) struct Kept(Mutex<Option<(JobId, State)>>);

impl Kept {
    /// Keeps the state of `job`, if it is whole.
    pub(crate) fn put(&self, job: JobId, state: State) {
        if state.replica.is_whole() {
            *self.0.lock() = Some((job, state));
        }
    }

    /// Hands over what is kept of `job`.
    pub(crate) fn take(&self, job: JobId) -> Option<State> {
        self.0.lock().take_if(|(kept, _)| *kept == job).map(|(_, state)| state)
    }

    /// How far what is kept of `job` is.
    pub(crate) fn position(&self, job: JobId) -> Option<Position> {
        self.0.lock().as_ref().filter(|(kept, _)| *kept == job).map(|(_, state)| state.replica.position())
    }

    /// Drops what is kept.
    pub(crate) fn clear(&self) {
        *self.0.lock() = None;
    }
}
