//! What the training thread knows of its worker's lease; the [agent](crate::agent) extends it.

use parking_lot::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long a step that is ready waits for the first word from the coordinator, which is asked when a session begins.
const FIRST_WORD: Duration = Duration::from_secs(10);

/// A session's lease: until when it may commit steps.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    until: Mutex<Option<Instant>>,
    extended: Condvar,
}

impl Lease {
    /// The session may commit until then.
    pub(crate) fn extend(&self, until: Instant) {
        let mut known = self.until.lock();
        if known.is_none_or(|known| known < until) {
            *known = Some(until);
            self.extended.notify_all();
        }
    }

    /// Whether an update may be applied now. If not, other workers may have been given the job.
    pub(crate) fn holds(&self) -> bool {
        let mut until = self.until.lock();
        if until.is_none() {
            self.extended.wait_while_for(&mut until, |until| until.is_none(), FIRST_WORD);
        }
        until.is_some_and(|until| Instant::now() <= until)
    }
}
