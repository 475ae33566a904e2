//! How far a long command is, on a terminal's standard error.

use parking_lot::Mutex;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How often the line changes.
const INTERVAL: Duration = Duration::from_millis(200);

/// Counts samples up to a known number. Where standard error is no terminal it shows nothing.
pub(super) struct Progress {
    total: u64,
    shows: bool,
    state: Mutex<State>,
}

struct State {
    done: u64,
    began: Instant,
    shown: Instant,
}

impl Progress {
    /// Of `total` samples.
    pub(super) fn new(total: u64) -> Self {
        let now = Instant::now();
        let state = Mutex::new(State { done: 0, began: now, shown: now });
        Self { total, shows: std::io::stderr().is_terminal(), state }
    }

    /// So many more are done.
    pub(super) fn add(&self, samples: u64) {
        let mut state = self.state.lock();
        state.done += samples;
        if self.shows && (state.shown.elapsed() >= INTERVAL || state.done == self.total) {
            state.shown = Instant::now();
            let rate = state.done as f64 / state.began.elapsed().as_secs_f64().max(1e-9);
            let end = if state.done == self.total { "\n" } else { "" };
            let mut out = std::io::stderr().lock();
            // A terminal that is gone is no reason to stop.
            let _ = write!(out, "\r{} of {} images, {rate:.0} images/s \x1b[K{end}", state.done, self.total);
        }
    }
}
