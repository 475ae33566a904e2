//! The generation itself: step after step, and what follows some of them.

use super::output::Output;
use super::prepare::Prepared;
use super::{Environment, Shared};
use crate::data::batch::Decoder;
use crate::data::loader::{Loader, Timetable};
use crate::evaluation::report::Report;
use crate::fault::{self, Point};
use crate::kept::State;
use crate::ledger::Ledger;
use crate::pace::PaceReporter;
use crate::state::desk::Desk;
use crate::state::pack::Copied;
use crate::train::clock::timed;
use crate::train::compress;
use crate::train::device_buckets::Carrier;
use crate::train::error::TrainError;
use crate::train::evaluate::evaluate;
use crate::train::trainer::Trainer;
use crate::train::wishes::Wishes;
use crate::train::{Number, mismatch, picture};
use lockstep_collectives::{Group, Tag, TagKind};
use lockstep_common::audit::StepAudit;
use lockstep_common::ids::Rank;
use lockstep_common::job::{JobSpec, OnMismatch, Task};
use lockstep_common::wire::{Assignment, Outcome, Position, StepRecord, StopMode, decode, encode};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a finished rank waits for what it has sent to arrive.
const CLOSE: Duration = Duration::from_secs(5);

/// Everything that a running generation needs on this worker.
pub(super) struct Session<'a, T> {
    environment: &'a Environment,
    assignment: &'a Assignment,
    shared: Arc<Shared>,
    trainer: Trainer<T>,
    ledger: Ledger,
    timetable: Timetable,
    total_steps: u64,
    loader: Loader,
    test: Option<Arc<Decoder<T>>>,
    output: Output,
    pace: PaceReporter,
    /// Seconds for which training has stood still for the next checkpoint to begin.
    waited: f64,
    /// Where those that are behind, and those that want to join, get the state.
    desk: Arc<Desk>,
}

/// What a session is made of.
pub(super) struct Parts<T> {
    pub(super) job: JobSpec,
    pub(super) group: Group,
    pub(super) prepared: Prepared<T>,
    pub(super) carrier: Option<Arc<dyn Carrier>>,
    pub(super) desk: Arc<Desk>,
}

/// Sums over the steps of this generation.
#[derive(Default)]
struct Totals {
    steps: u64,
    images: u64,
    seconds: f64,
    comm: f64,
    gradients: f64,
}

impl<'a, T: Number> Session<'a, T> {
    /// Takes over `state`, and agrees with the other ranks on where they are.
    pub(super) fn begin(
        environment: &'a Environment,
        assignment: &'a Assignment,
        shared: Arc<Shared>,
        parts: Parts<T>,
        state: &mut Option<State>,
    ) -> Result<Self, TrainError> {
        let Parts { job, group, prepared, carrier, desk } = parts;
        let Prepared { plan, wires, timetable, total_steps, loader, test } = prepared;
        let Some(here) = state else { return Err(TrainError::Fatal("no state was prepared".to_owned())) };
        let (ledger, samples) = compare(&group, here)?;
        let Some(State { mut replica, .. }) = state.take() else {
            return Err(TrainError::Fatal("no state was prepared".to_owned()));
        };
        replica.set_samples(samples);
        let output = Output::new(environment, assignment, &ledger);
        let every = job.checks.every_steps(assignment.peers.iter().map(|peer| &peer.device[..]));
        let trainer = Trainer::<T>::new(job, plan, group, replica, environment.threads, every)?
            .carried_by(carrier)
            .followed_at(desk.clone())
            .leased_by(shared.lease.clone());
        if let Some(wires) = wires {
            trainer.restore_wires(wires.as_ref())?;
        }
        Ok(Self {
            environment,
            assignment,
            shared,
            trainer,
            ledger,
            timetable,
            total_steps,
            loader,
            test,
            output,
            pace: PaceReporter::new(assignment),
            desk,
            waited: 0.0,
        })
    }

    /// Hands the state back.
    pub(super) fn end(mut self) -> State {
        self.count_shards();
        self.output.reporter.flush();
        State { replica: self.trainer.into_replica(), ledger: self.ledger }
    }

    /// Brings the metrics up to date with the cache.
    fn count_shards(&self) {
        let cache = &self.environment.shards;
        self.environment.metrics.shards(cache.hash_failures(), cache.fetches());
    }

    fn is_first(&self) -> bool {
        self.assignment.rank == Rank(0)
    }

    pub(super) fn train(&mut self) -> Result<Outcome, TrainError> {
        let mut totals = Totals::default();
        let mut digest = None;
        let Position { step, phase } = self.trainer.replica.position();
        if phase == 0 && self.ledger.settled < Some(step) {
            // Somebody went away between this step's commit and the end of what follows it.
            digest = self.follow_up(step, None, false)?;
        } else if step == self.total_steps {
            // A job without steps only evaluates. Any other has done so, but the report may have gone with whoever had it.
            let evaluation = self.evaluate()?;
            self.end_of_epoch(step, evaluation)?;
        }
        while self.trainer.replica.step < self.total_steps {
            let wishes = self.step(&mut totals)?;
            let step = self.trainer.replica.step;
            let stop = self.stop_mode(wishes);
            digest = self.follow_up(step, stop, wishes.busy)?;
            if wishes.snapshot {
                self.copy(step)?;
            }
            if let Some(mode) = stop.filter(|_| step < self.total_steps) {
                self.leave_early(step, mode);
                return Ok(Outcome::Stopped { step });
            }
        }
        self.finish(digest, &totals)
    }

    /// Copies the state after `step` for those that want to join.
    fn copy(&mut self, step: u64) -> Result<(), TrainError> {
        self.trainer.fail_on_purpose(Point::Copy, step)?;
        let (rank, metrics) = (self.assignment.rank, &self.environment.metrics);
        let Trainer { replica, plan, job, .. } = &mut self.trainer;
        replica.vouch(rank, &job.checks).inspect_err(|_| metrics.mismatched())?;
        self.desk.copy(Copied::of(replica, plan)?, &self.ledger)
    }

    /// How the generation ends after this step, if it does. What a wire keeps is handed on by checkpoint only.
    fn stop_mode(&self, wishes: Wishes) -> Option<StopMode> {
        let keeps_state = compress::keeps_state(&self.trainer.job.collective);
        wishes.stop().map(|mode| if keeps_state { StopMode::Checkpoint } else { mode })
    }

    /// One step, from its data to its record. Returns what the ranks together want.
    fn step(&mut self, totals: &mut Totals) -> Result<Wishes, TrainError> {
        let start = Instant::now();
        let mut data = 0.0;
        fault::point(Point::Data, self.trainer.replica.step + 1);
        let batches = timed(&mut data, || self.loader.next(&self.shared.aborted))?;
        let (samples, epoch) = (batches.samples, batches.epoch + 1);
        let before = self.trainer.group.stats();
        let mut wishes = self.shared.wishes();
        wishes.snapshot = self.desk.is_wanted();
        if self.is_first() {
            wishes.heard =
                self.environment.control.heard_step(self.assignment.job, self.assignment.generation);
        }
        if self.is_checkpoint_due(self.trainer.replica.step + 1) {
            wishes.busy = !timed(&mut self.waited, || self.output.make_way());
        }
        let per_epoch = self.timetable.steps_per_epoch();
        let mut done = self.trainer.step(batches, self.total_steps, per_epoch, wishes)?;
        done.times.data += data;
        let seconds = start.elapsed().as_secs_f64();
        let step = self.trainer.replica.step;
        self.shared.step.store(step, Ordering::Relaxed);
        totals.steps += 1;
        totals.images += samples;
        totals.seconds += seconds;
        totals.comm += done.times.comm(seconds);
        totals.gradients += done.times.gradients;
        if done.times.check > 0.0 {
            self.environment.metrics.compared(done.times.check);
        }
        self.environment.metrics.step(&done.figures, samples, &done.times, seconds);
        self.pace.step(&self.environment.control, self.assignment, &done.times, seconds);
        self.environment.metrics.collectives(&before, &self.trainer.group.stats());
        self.count_shards();
        let (total_steps, values) = (self.total_steps, done.figures);
        let (generation, shards) = (self.assignment.generation, done.shards);
        let record = StepRecord { generation, step, epoch, total_steps, samples, seconds, values, shards };
        // The others have begun, so nobody needs the state that this generation started from.
        self.desk.withdraw("the generation has gone on");
        self.ledger.heard(done.wishes.heard);
        self.ledger.note(record.clone());
        self.output.reporter.step(record);
        self.trainer.fail_on_purpose(Point::Boundary, step)?;
        Ok(done.wishes)
    }

    /// What follows the commit of `step`: an evaluation, a comparison, a checkpoint, which is left out if a rank is `busy`
    /// with the last one and none is needed. Returns the weights' digest if the ranks have compared it.
    fn follow_up(
        &mut self,
        step: u64,
        stop: Option<StopMode>,
        busy: bool,
    ) -> Result<Option<String>, TrainError> {
        let last = step == self.total_steps;
        let epoch_ends = last || step.is_multiple_of(self.timetable.steps_per_epoch());
        let due = self.is_checkpoint_due(step);
        let needed = last || stop == Some(StopMode::Checkpoint);
        let mut digest = None;
        let evaluation = if epoch_ends { self.evaluate()? } else { None };
        if epoch_ends || needed || due {
            // Before anybody hears what the weights came to, and a checkpoint hands the state on.
            let mut seconds = 0.0;
            digest = Some(timed(&mut seconds, || self.trainer.compare_replicas())?);
            self.environment.metrics.compared(seconds);
        }
        if epoch_ends {
            self.end_of_epoch(step, evaluation)?;
        }
        match &digest {
            Some(digest) if needed || due && !busy => {
                let mut pause = std::mem::take(&mut self.waited);
                timed(&mut pause, || self.store(step, digest.clone()))?;
                if !needed {
                    self.environment.metrics.paused(pause);
                }
            }
            _ if due => {
                let line = format!("no checkpoint at step {step}: the one before is still on its way");
                self.output.reporter.log(line);
            }
            _ => {}
        }
        self.ledger.settled = Some(step);
        Ok(digest)
    }

    /// Ends in good order after an error to which all ranks have come together; any other is handed back.
    pub(super) fn part(&mut self, error: TrainError) -> Result<Outcome, TrainError> {
        let TrainError::Mismatch(mismatch) = error else { return Err(error) };
        let what = mismatch::describe(&mismatch, &self.assignment.peers);
        if mismatch.is_at_fault(self.assignment.rank) {
            self.environment.metrics.mismatched();
        }
        if !mismatch.is_right(self.assignment.rank) {
            self.trainer.replica.give_up();
        }
        let culprit = mismatch.culprit();
        let outcome = match self.trainer.job.checks.on_mismatch {
            OnMismatch::Stop => Outcome::Failed { error: what },
            OnMismatch::Heal if mismatch.has_truth() => Outcome::Lost { error: what, culprit },
            OnMismatch::Heal => {
                // The newest checkpoint may be one that is still on its way: the replicas were the same when it was taken.
                if let Err(error) = self.output.finish_checkpoint(&self.shared.aborted) {
                    self.output.reporter.log(format!("the last checkpoint could not be stored: {error}"));
                }
                Outcome::Mismatch { error: what, culprit }
            }
        };
        self.leave();
        Ok(outcome)
    }

    /// Begins a checkpoint with all other ranks.
    fn store(&mut self, step: u64, weights_digest: String) -> Result<(), TrainError> {
        let wires = self.trainer.wire_state()?;
        let position = self.timetable.position(step);
        let aborted = &self.shared.aborted;
        self.output.store(&self.trainer, &self.ledger, wires, position, weights_digest, aborted)
    }

    fn is_checkpoint_due(&self, step: u64) -> bool {
        let every = self.trainer.job.checkpoint.every_steps;
        every > 0 && step.is_multiple_of(every)
    }

    /// Evaluates, where the job does.
    fn evaluate(&mut self) -> Result<Option<Report>, TrainError> {
        let test = self.test.as_ref().filter(|_| self.trainer.plan.is_evaluated);
        test.map(|test| self.trainer.averaged(|trainer| evaluate(trainer, test))).transpose()
    }

    /// Tells what the `evaluation` came to, and leaves a picture where the task has one.
    fn end_of_epoch(&mut self, step: u64, evaluation: Option<Report>) -> Result<(), TrainError> {
        let epoch = self.timetable.position(step.max(1) - 1).0 + 1;
        if let Some(report) = evaluation {
            self.output.reporter.metrics(step, epoch, report.figures());
            self.ledger.metrics.extend(report.figures());
            if self.is_first() {
                self.output.send_evaluation(step, epoch, &report)?;
            }
        }
        if self.is_first()
            && self.trainer.job.task == Task::Gan
            && let Some(png) = picture::png(&self.trainer)?
        {
            self.output.send_picture(step, epoch, png)?;
        }
        Ok(())
    }

    /// The generation ends after `step`, and the job does not.
    fn leave_early(&mut self, step: u64, mode: StopMode) {
        if mode == StopMode::Checkpoint {
            if let Err(error) = self.output.settle(&self.shared.aborted) {
                let line = format!("stopped without a checkpoint of step {step}: {error}");
                self.output.reporter.log(line);
            }
        } else {
            // The next generation waits for this one's end, so a checkpoint that is on its way is left to itself.
            self.output.reporter.flush();
        }
        self.leave();
    }

    /// The last step is committed.
    fn finish(&mut self, digest: Option<String>, totals: &Totals) -> Result<Outcome, TrainError> {
        let step = self.trainer.replica.step;
        let weights_digest = digest.map_or_else(|| self.trainer.compare_replicas(), Ok)?;
        self.output.settle(&self.shared.aborted)?;
        let mut metrics = self.ledger.metrics.clone();
        if totals.seconds > 0.0 {
            let mut insert = |name: &str, value| metrics.insert(name.to_owned(), value);
            let steps = totals.steps as f64;
            insert("images_per_second", totals.images as f64 / totals.seconds);
            insert("step_seconds", totals.seconds / steps);
            // Waiting that no computing hides: all of it, and what lies between backward and its reduced gradients.
            insert("comm_seconds", totals.comm / steps);
            insert("grad_wait_seconds", totals.gradients / steps);
        }
        self.leave();
        let epoch = self.timetable.position(step.max(1) - 1).0 + 1;
        Ok(Outcome::Finished { weights_digest, step, epoch, metrics })
    }

    /// Leaves the group in good order.
    fn leave(&mut self) {
        if let Some(group) = self.shared.group.lock().take() {
            group.close(CLOSE);
        }
    }
}

/// Compares where the ranks of `group` are, which must be the same place, what each has told, and what the shards were
/// given in the phases of the next step that have been applied.
fn compare(group: &Group, state: &State) -> Result<(Ledger, StepAudit), TrainError> {
    let position = state.replica.position();
    let mut mine = position.step.to_le_bytes().to_vec();
    mine.extend_from_slice(&position.phase.to_le_bytes());
    let samples = encode(state.replica.samples()).map_err(|e| TrainError::Fatal(e.to_string()))?;
    mine.extend_from_slice(&(samples.len() as u32).to_le_bytes());
    mine.extend_from_slice(&samples);
    mine.extend_from_slice(&state.ledger.to_bytes());
    // Positions may differ here, so the tag must not have them.
    let tag = Tag::new(0, 0, TagKind::State).index(1);
    let all = group.all_gather(tag, mine)?.wait()?;
    let mut ledgers = Vec::with_capacity(all.len());
    let mut samples = StepAudit::default();
    for (rank, bytes) in (0..).map(Rank).zip(all.iter()) {
        let Some((at, given, ledger)) = account(bytes) else {
            return Err(TrainError::Fatal(format!("{rank} sent an unintelligible account of its state")));
        };
        if at != position {
            let what = format!("{rank} starts at {at} and {} at {position}", group.rank());
            return Err(TrainError::Unavailable { what, culprit: None });
        }
        ledgers.push(ledger);
        // At one position all that know it know the same; one that was healed does not.
        if given != StepAudit::default() {
            samples = given;
        }
    }
    Ok((Ledger::merged(&ledgers, position.step), samples))
}

fn account(bytes: &[u8]) -> Option<(Position, StepAudit, Ledger)> {
    let (step, rest) = bytes.split_first_chunk()?;
    let (phase, rest) = rest.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let (samples, ledger) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let position = Position { step: u64::from_le_bytes(*step), phase: u16::from_le_bytes(*phase) };
    Some((position, decode(samples).ok()?, Ledger::from_bytes(ledger)?))
}
