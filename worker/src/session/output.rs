//! What a generation tells and leaves: reports, checkpoints, pictures.

use super::Environment;
use crate::control::Control;
use crate::ledger::Ledger;
use crate::report::Reporter;
use crate::train::Number;
use crate::train::checkpoint::{Checkpointer, Heading};
use crate::train::error::TrainError;
use crate::train::replica::RawTensors;
use crate::train::trainer::Trainer;
use lockstep_common::checkpoint::CheckpointInfo;
use lockstep_common::ids::{Generation, JobId, Rank};
use lockstep_common::job::Task;
use lockstep_common::wire::{Assignment, FromWorker};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::SystemTime;

/// A rank's way to the coordinator.
pub(super) struct Output {
    control: Control,
    job: JobId,
    generation: Generation,
    /// The job file's text.
    toml: String,
    checkpoints: Checkpointer,
    is_first: bool,
    /// Pictures on their way to the coordinator.
    pictures: Vec<JoinHandle<()>>,
    pub(super) reporter: Reporter,
}

impl Output {
    /// Begins with what the coordinator may have missed.
    pub(super) fn new(environment: &Environment, assignment: &Assignment, ledger: &Ledger) -> Self {
        let (control, observed) = (environment.control.clone(), environment.metrics.clone());
        let (job, generation) = (assignment.job, assignment.generation);
        let observe = Arc::new(move |seconds| observed.checkpoint(seconds));
        let mut reporter = Reporter::new(control.clone(), assignment);
        reporter.catch_up(ledger.records());
        Self {
            checkpoints: Checkpointer::new(control.clone(), assignment, observe),
            is_first: assignment.rank == Rank(0),
            control,
            job,
            generation,
            toml: assignment.toml.clone(),
            pictures: Vec::new(),
            reporter,
        }
    }

    /// Sends a picture in the background: training waits for no picture, and fails for none.
    pub(super) fn send_picture(&mut self, epoch: u64, png: Vec<u8>) -> Result<(), TrainError> {
        let (job, generation) = (self.job, self.generation);
        let control = self.control.clone();
        let send = move || {
            let name = format!("samples-epoch-{epoch:04}.png");
            let line = match control.store_artifact(job, generation, &name, png) {
                Ok(()) => format!("epoch {epoch}: sample grid in {name}"),
                Err(error) => format!("epoch {epoch}: the sample grid could not be stored: {error}"),
            };
            control.tell(FromWorker::Log { job, generation, line });
        };
        let thread = std::thread::Builder::new().name("picture".to_owned()).spawn(send);
        let thread = thread.map_err(|e| TrainError::Fatal(format!("cannot start a thread: {e}")))?;
        self.pictures.retain(|p| !p.is_finished());
        self.pictures.push(thread);
        Ok(())
    }

    /// Whether another checkpoint can begin, after a moment at most.
    pub(super) fn make_way(&mut self) -> bool {
        self.checkpoints.make_way()
    }

    /// Begins this rank's share of a checkpoint of `trainer` after its last step, which is at `(epoch, step_in_epoch)`.
    /// If the one before is still on its way, this waits for it, unless this rank is to leave at once.
    pub(super) fn store<T: Number>(
        &mut self,
        trainer: &Trainer<T>,
        ledger: &Ledger,
        wires: Option<RawTensors>,
        (epoch, step_in_epoch): (u64, u64),
        weights_digest: String,
        aborted: &AtomicBool,
    ) -> Result<(), TrainError> {
        let (job, step) = (&trainer.job, trainer.replica.step);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let names = trainer.plan.networks.iter().map(|n| n.name.to_owned());
        let info = || CheckpointInfo {
            job_id: self.job,
            job_name: job.name.clone(),
            job_text: self.toml.clone(),
            task: match job.task {
                Task::Classify => "classify".to_owned(),
                Task::Gan => "gan".to_owned(),
            },
            seed: job.seed,
            step,
            epoch,
            step_in_epoch,
            phase_updates: names.zip(trainer.replica.updates().iter().copied()).collect(),
            generation: self.generation,
            metrics: ledger.metrics.clone(),
            created_unix_s: now.as_secs(),
        };
        // First the steps: whoever resumes from the checkpoint does not do them again.
        self.reporter.flush();
        match self.checkpoints.finish(aborted) {
            Err(TrainError::Aborted) => return Err(TrainError::Aborted),
            Err(error) => {
                self.reporter.log(format!("a checkpoint could not be stored, training goes on: {error}"));
            }
            Ok(()) => {}
        }
        let heading = Heading { step, weights_digest, info: self.is_first.then(info) };
        self.checkpoints.begin(&trainer.replica, &trainer.plan, wires, heading)
    }

    /// Waits for the last checkpoint, reports what is left to report.
    pub(super) fn settle(&mut self, aborted: &AtomicBool) -> Result<(), TrainError> {
        self.reporter.flush();
        for picture in self.pictures.drain(..) {
            // Its own thread has reported what went wrong, but for a panic, which concerns no step.
            let _ = picture.join();
        }
        self.checkpoints.finish(aborted)
    }
}
