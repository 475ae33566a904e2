//! The handle on a collective in flight.

use crate::engine::Engine;
use crate::error::CollectiveError;
use crate::tag::Tag;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::sync::Arc;

/// A result that is on its way. Clones wait for the same result.
///
/// Dropping it does not cancel the collective: the other ranks count on this one's part.
#[must_use = "a collective's failure shows only in `wait`"]
pub struct Pending<R> {
    slot: Arc<Slot<R>>,
    engine: Arc<Engine>,
    tag: Tag,
}

/// Where a collective puts its result. Set once.
pub(crate) struct Slot<R> {
    outcome: Mutex<Option<Result<Arc<R>, CollectiveError>>>,
    set: Condvar,
}

impl<R> Pending<R> {
    pub(crate) fn new(slot: Arc<Slot<R>>, engine: Arc<Engine>, tag: Tag) -> Self {
        Self { slot, engine, tag }
    }

    /// Blocks until the result is there, or the group has failed.
    ///
    /// Not for use on an async runtime's own threads: they may be the ones that bring the result.
    pub fn wait(&self) -> Result<Arc<R>, CollectiveError> {
        let mut outcome = self.slot.outcome.lock();
        let mut patience = self.engine.timeout();
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            if self.slot.set.wait_for(&mut outcome, patience).timed_out() && outcome.is_none() {
                patience = MutexGuard::unlocked(&mut outcome, || self.engine.handle_overdue(self.tag));
            }
        }
    }

    /// Whether `wait` would return at once.
    pub fn is_ready(&self) -> bool {
        self.slot.outcome.lock().is_some()
    }

    /// The collective's name.
    pub fn tag(&self) -> Tag {
        self.tag
    }
}

impl<R> Clone for Pending<R> {
    fn clone(&self) -> Self {
        Self { slot: self.slot.clone(), engine: self.engine.clone(), tag: self.tag }
    }
}

impl<R> Slot<R> {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { outcome: Mutex::new(None), set: Condvar::new() })
    }

    /// Sets the outcome and wakes everyone who waits for it. The first outcome stays.
    pub(crate) fn set(&self, outcome: Result<R, CollectiveError>) {
        self.outcome.lock().get_or_insert_with(|| outcome.map(Arc::new));
        self.set.notify_all();
    }
}
