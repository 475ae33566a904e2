//! What a generation tells and leaves: reports, checkpoints, pictures, evaluations.

use super::Environment;
use super::artifacts::Artifacts;
use crate::evaluation::report::Report;
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
use lockstep_common::wire::Assignment;
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

/// The file `evaluation.json`.
#[derive(Serialize)]
struct Evaluation<'a> {
    step: u64,
    epoch: u64,
    #[serde(flatten)]
    report: &'a Report,
}

/// A rank's way to the coordinator.
pub(super) struct Output {
    job: JobId,
    generation: Generation,
    /// The job file's text.
    toml: String,
    checkpoints: Checkpointer,
    is_first: bool,
    artifacts: Artifacts,
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
            artifacts: Artifacts::new(control, job, generation),
            job,
            generation,
            toml: assignment.toml.clone(),
            reporter,
        }
    }

    /// Sends a picture.
    pub(super) fn send_picture(&mut self, step: u64, epoch: u64, png: Vec<u8>) -> Result<(), TrainError> {
        let name = format!("samples-epoch-{epoch:04}.png");
        self.artifacts.send(step, name, png, format!("epoch {epoch}: sample grid"))
    }

    /// Sends the newest evaluation, in place of the one before.
    pub(super) fn send_evaluation(
        &mut self,
        step: u64,
        epoch: u64,
        report: &Report,
    ) -> Result<(), TrainError> {
        let json = serde_json::to_vec(&Evaluation { step, epoch, report });
        let json = json.map_err(|e| TrainError::Fatal(format!("cannot write an evaluation as JSON: {e}")))?;
        self.artifacts.send(step, "evaluation.json".to_owned(), json, format!("step {step}: evaluation"))
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
            // The coordinator has said so itself, once for all ranks.
            Err(error) if error.not_stored().is_some() => {}
            Err(error) => {
                self.reporter.log(format!("a checkpoint could not be stored, training goes on: {error}"));
            }
            Ok(()) => {}
        }
        let heading = Heading { step, weights_digest, info: self.is_first.then(info) };
        self.checkpoints.begin(&trainer.replica, &trainer.plan, wires, heading)
    }

    /// Waits for the checkpoint in progress, if there is one.
    pub(super) fn finish_checkpoint(&mut self, aborted: &AtomicBool) -> Result<(), TrainError> {
        self.reporter.flush();
        self.checkpoints.finish(aborted)
    }

    /// Waits for the last checkpoint, which is tried again for a while if the coordinator's disk does not take it, and
    /// reports what is left to report.
    pub(super) fn settle(&mut self, aborted: &AtomicBool) -> Result<(), TrainError> {
        self.reporter.flush();
        self.artifacts.finish(aborted);
        self.checkpoints.finish_last(aborted)
    }
}
