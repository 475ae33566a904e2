//! What the training thread knows of its worker's lease; the [agent](crate::agent) extends it.

use crate::train::error::TrainError;
use crate::uptime::uptime;
use parking_lot::{Condvar, Mutex};
use std::time::Duration;

/// How long a step that is ready waits for the first word from the coordinator, which is asked when a session begins.
const FIRST_WORD: Duration = Duration::from_secs(10);

/// A session's lease: until when it may commit steps, by the host's [uptime].
#[derive(Debug, Default)]
pub(crate) struct Lease {
    until: Mutex<Option<Duration>>,
    extended: Condvar,
}

impl Lease {
    /// The session may commit until then.
    pub(crate) fn extend(&self, until: Duration) {
        let mut known = self.until.lock();
        if known.is_none_or(|known| known < until) {
            *known = Some(until);
            self.extended.notify_all();
        }
    }

    /// An error if no update may be applied now: others may have been given the job.
    pub(crate) fn check(&self) -> Result<(), TrainError> {
        let mut until = self.until.lock();
        if until.is_none() {
            self.extended.wait_while_for(&mut until, |until| until.is_none(), FIRST_WORD);
        }
        let what = match *until {
            Some(until) if uptime() <= until => return Ok(()),
            Some(_) => {
                "the coordinator has not been heard for the job's `orphan_timeout_s`: the step in progress is not committed \
                 here, as others may have been given the job"
            }
            None => {
                "the coordinator went away before this rank's first step, which is not committed without its word"
            }
        };
        Err(TrainError::Unavailable { what: what.to_owned(), culprit: None })
    }
}
