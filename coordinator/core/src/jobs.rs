//! A job in the core, and what an operator can ask of it.

use crate::bench::Bench;
use crate::core::{Action, Core};
use crate::flight::Board;
use crate::generation::Live;
use crate::pace::Paces;
use crate::record::{Ending, JobRecord, NewJob};
use crate::start::CONNECTING;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{FlightSummary, JobState, StepRecord};
use thiserror::Error;

/// Why a command was refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CommandError {
    /// There is no such job.
    #[error("there is no job {0}; `coordinator jobs` lists them")]
    UnknownJob(JobId),
    /// The job is in a state in which the command makes no sense.
    #[error("{job} is {state} and cannot be {verb}")]
    NotNow {
        /// The job.
        job: JobId,
        /// Its state.
        state: JobState,
        /// What was asked, as a participle.
        verb: &'static str,
    },
    /// The worker's certificate is good, but its coordinator has forgotten it.
    #[error(
        "{0} is not known to this coordinator; remove the worker's data directory and join with a new token"
    )]
    UnknownWorker(WorkerId),
}

/// How far a job's membership is.
pub(crate) enum Phase {
    /// It has none.
    Idle,
    /// Its workers are chosen; the newest good checkpoint is being looked for.
    Reserved(Vec<WorkerId>),
    /// At work.
    Live(Live),
}

pub(crate) struct Job {
    pub(crate) record: JobRecord,
    pub(crate) phase: Phase,
    /// Seconds a step, a moving average.
    pub(crate) pace_s: Option<f64>,
    /// Where the collectives of the newest membership are.
    pub(crate) flight: Option<Board>,
    /// Where they were when the membership before it failed, until the job steps again.
    pub(crate) failed_flight: Option<Board>,
    /// How fast the ranks of the present membership are.
    pub(crate) paces: Paces,
    /// Before this no rank is given other shards for its pace.
    pub(crate) rebalance_from_ms: u64,
    /// How many shards each worker is to own in the next membership, if it has the same workers.
    pub(crate) wanted: Option<Vec<(WorkerId, u32)>>,
    /// When the members that are being shut down are let go.
    pub(crate) leave_at_ms: Option<u64>,
    /// Workers that its other workers could not reach.
    pub(crate) bench: Bench,
    /// The membership whose ranks were found to hold different states: nobody goes on from those.
    pub(crate) spoilt: Option<Generation>,
}

impl Job {
    pub(crate) fn new(record: JobRecord) -> Self {
        Self {
            record,
            phase: Phase::Idle,
            pace_s: None,
            flight: None,
            failed_flight: None,
            paces: Paces::new(0),
            rebalance_from_ms: 0,
            wanted: None,
            leave_at_ms: None,
            bench: Bench::default(),
            spoilt: None,
        }
    }

    pub(crate) fn live(&self) -> Option<&Live> {
        match &self.phase {
            Phase::Live(live) => Some(live),
            _ => None,
        }
    }

    pub(crate) fn live_mut(&mut self) -> Option<&mut Live> {
        match &mut self.phase {
            Phase::Live(live) => Some(live),
            _ => None,
        }
    }

    /// A membership of `members`, with their hosts, is at work.
    pub(crate) fn begin_flight(&mut self, generation: Generation, members: Vec<(WorkerId, String)>) {
        self.paces = Paces::new(members.len());
        let old = self.flight.replace(Board::new(generation, members));
        self.failed_flight = old.filter(Board::has_failed).or(self.failed_flight.take());
    }

    /// What the job waits for, or waited for when it failed last.
    pub(crate) fn flight(&self, now_ms: u64) -> Option<FlightSummary> {
        let summary = |board: &Option<Board>| board.as_ref()?.summary(now_ms);
        let (newest, failed) = (summary(&self.flight), summary(&self.failed_flight));
        match newest {
            Some(newest) if failed.is_none() || !newest.waiting.is_empty() || newest.failure.is_some() => {
                Some(newest)
            }
            _ => failed,
        }
    }

    pub(crate) fn waits(&self) -> bool {
        self.record.state == JobState::Queued && matches!(self.phase, Phase::Idle)
    }

    /// Smallest and largest membership as of now; `kept` says whether some worker has its state in memory.
    pub(crate) fn range(&self, kept: bool) -> (u32, u32) {
        match self.record.wait_for {
            Some(n) if !kept => (n, n),
            Some(n) => (self.record.min_workers.min(n), n),
            None => (self.record.min_workers, self.record.max_workers),
        }
    }

    pub(crate) fn step_done(&mut self, step: &StepRecord) {
        /// About 50 steps back count for the estimate of the end.
        const NEWEST_WEIGHT: f64 = 0.02;
        self.failed_flight = None;
        self.record.step = step.step;
        if self.record.reason.starts_with(CONNECTING) {
            self.record.reason = "its workers step".to_owned();
        }
        self.record.epoch = step.epoch;
        self.record.total_steps = step.total_steps;
        self.record.take_in(step.values.clone());
        if step.seconds.is_finite() {
            let pace = self.pace_s.map_or(step.seconds, |p| p + NEWEST_WEIGHT * (step.seconds - p));
            self.pace_s = Some(pace);
        }
    }
}

/// Commands
impl Core {
    /// Puts a job in the queue.
    pub fn submit(&mut self, job: NewJob, now_ms: u64) -> JobId {
        let id = self.new_job_id();
        let record = JobRecord::new(id, job, now_ms);
        self.actions.push_back(Action::PersistJob(Box::new(record.clone())));
        self.log(id, format!("submitted as {id} `{}`", record.name));
        self.jobs.insert(id, Job::new(record));
        self.schedule(now_ms);
        id
    }

    /// Ends a job without a checkpoint.
    pub fn cancel(&mut self, id: JobId, now_ms: u64) -> Result<(), CommandError> {
        self.halt(id, Ending::Cancel, JobState::Cancelled, "cancelled", now_ms)
    }

    /// Stops a job with a checkpoint and frees its workers.
    pub fn pause(&mut self, id: JobId, now_ms: u64) -> Result<(), CommandError> {
        self.halt(id, Ending::Pause, JobState::Paused, "paused", now_ms)
    }

    /// Puts a paused job back in the queue, at the place that its number gives it.
    pub fn resume(&mut self, id: JobId, now_ms: u64) -> Result<(), CommandError> {
        let job = self.jobs.get_mut(&id).ok_or(CommandError::UnknownJob(id))?;
        if !matches!(job.record.state, JobState::Paused | JobState::Failed) {
            return Err(CommandError::NotNow { job: id, state: job.record.state, verb: "resumed" });
        }
        let record = &mut job.record;
        (record.fruitless, record.weights_digest) = (0, None);
        record.state = JobState::Queued;
        self.log(id, "put back in the queue".to_owned());
        self.persist(id);
        self.schedule(now_ms);
        Ok(())
    }

    /// Makes the job wait for exactly this many workers, or for its own range again.
    pub fn set_wait_for(&mut self, id: JobId, workers: Option<u32>, now_ms: u64) -> Result<(), CommandError> {
        self.jobs.get_mut(&id).ok_or(CommandError::UnknownJob(id))?.record.wait_for = workers;
        self.persist(id);
        self.schedule(now_ms);
        Ok(())
    }

    fn halt(
        &mut self,
        id: JobId,
        ending: Ending,
        rest: JobState,
        verb: &'static str,
        now_ms: u64,
    ) -> Result<(), CommandError> {
        let job = self.jobs.get(&id).ok_or(CommandError::UnknownJob(id))?;
        let state = job.record.state;
        let again = job.record.ending.as_ref() == Some(&ending) || state == rest;
        if state.is_final() || again {
            return Err(CommandError::NotNow { job: id, state, verb });
        }
        let live = job.live().is_some();
        self.log(id, format!("to be {verb} by an operator"));
        if live {
            self.begin_ending(id, ending, now_ms);
            return Ok(());
        }
        self.drop_reservation(id);
        if let Some(job) = self.jobs.get_mut(&id) {
            job.record.state = rest;
            job.record.reason = format!("{verb} by an operator");
        }
        if rest.is_final() {
            self.let_go(id);
        }
        self.persist(id);
        self.schedule(now_ms);
        Ok(())
    }
}
