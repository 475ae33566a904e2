//! The handle on a collective in flight.

use crate::engine::Engine;
use crate::error::CollectiveError;
use crate::shm::Waited;
use crate::tag::Tag;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
    ready: AtomicBool,
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
        // Woken before time is up, to ask those who may know more.
        let mut patience = self.engine.timeout() * 3 / 4;
        if let Some(near) = self.engine.near() {
            while near.wait(&self.engine, || self.is_ready(), patience) == Waited::TimedOut {
                patience = self.engine.handle_overdue(self.tag);
            }
        }
        let mut outcome = self.slot.outcome.lock();
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
        self.slot.ready.load(Ordering::Acquire)
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
        Arc::new(Self { ready: AtomicBool::new(false), outcome: Mutex::new(None), set: Condvar::new() })
    }

    /// Sets the outcome and wakes everyone who waits for it. The first outcome stays.
    pub(crate) fn set(&self, outcome: Result<R, CollectiveError>) {
        self.outcome.lock().get_or_insert_with(|| outcome.map(Arc::new));
        self.ready.store(true, Ordering::Release);
        self.set.notify_all();
    }
}
