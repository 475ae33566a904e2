//! When this rank last got on.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// The moment at which this rank last got on: entered or ended a collective, took in a part of one, or computed.
pub(crate) struct Progress {
    epoch: Instant,
    /// Nanoseconds since then.
    at: AtomicU64,
}

impl Progress {
    /// This rank gets on now.
    pub(crate) fn new() -> Self {
        Self { epoch: Instant::now(), at: AtomicU64::new(0) }
    }

    /// It got on at `now`.
    pub(crate) fn note(&self, now: Instant) {
        self.at.store(now.saturating_duration_since(self.epoch).as_nanos() as u64, Relaxed);
    }

    /// For how long it has not.
    pub(crate) fn idle(&self, now: Instant) -> Duration {
        let since_epoch = now.saturating_duration_since(self.epoch);
        since_epoch.saturating_sub(Duration::from_nanos(self.at.load(Relaxed)))
    }
}
