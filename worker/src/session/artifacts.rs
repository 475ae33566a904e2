//! Files for people to look at, on their way to the coordinator: pictures, reports.

use crate::control::Control;
use crate::fault::{self, Point};
use crate::train::error::TrainError;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use lockstep_common::ids::{Generation, JobId};
use lockstep_common::wire::FromWorker;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often a wait looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(20);

/// Sends files in the background, one after the other: training waits for none, and fails for none.
pub(super) struct Artifacts {
    control: Control,
    job: JobId,
    generation: Generation,
    /// Ends with the last one that was given.
    last: Option<Receiver<()>>,
}

impl Artifacts {
    pub(super) fn new(control: Control, job: JobId, generation: Generation) -> Self {
        Self { control, job, generation, last: None }
    }

    /// Sends a file of `step`. The job's log says that `what` is in it, or why not.
    pub(super) fn send(
        &mut self,
        step: u64,
        name: String,
        bytes: Vec<u8>,
        what: String,
    ) -> Result<(), TrainError> {
        let (job, generation) = (self.job, self.generation);
        let control = self.control.clone();
        let before = self.last.take();
        let (ended, last): (Sender<()>, _) = bounded(1);
        let send = move || {
            // Two of one name must arrive in their order. The sender is never used: it ends.
            let _ = before.map(|before| before.recv());
            fault::point(Point::Artifact, step);
            let line = match control.store_artifact(job, generation, &name, bytes) {
                Ok(()) => format!("{what} in {name}"),
                Err(error) => format!("{what}: {name} could not be stored: {error}"),
            };
            control.tell(FromWorker::Log { job, generation, line });
            drop(ended);
        };
        let thread = std::thread::Builder::new().name("artifact".to_owned()).spawn(send);
        thread.map_err(|e| TrainError::Fatal(format!("cannot start a thread: {e}")))?;
        self.last = Some(last);
        Ok(())
    }

    /// Waits until all have been stored, or could not be, unless this rank is told to leave at once.
    pub(super) fn finish(&mut self, aborted: &AtomicBool) {
        let Some(last) = self.last.take() else { return };
        while last.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
            if aborted.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}
