//! The state machine: events in, actions out.

use crate::cause::{Cause, Who};
use crate::generation::{Live, MemberState};
use crate::jobs::{Job, Phase};
use crate::record::{Ending, JobRecord, WorkerRecord};
use crate::workers::{WorkerView, Workers};
use lockstep_common::ids::{Generation, JobId, Rank, WorkerId};
use lockstep_common::placement::Placement;
use lockstep_common::wire::{
    FlightSummary, FromWorker, Held, JobState, LEASE_MARGIN_MS, Outcome, Position, StopMode, ToWorker,
};
use std::collections::{BTreeMap, VecDeque};

/// Something that the shell has to do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Make the job's record durable before going on.
    PersistJob(Box<JobRecord>),
    /// Make the worker's record durable before going on.
    PersistWorker(WorkerRecord),
    /// Send in this session of the worker; nothing happens if it is over. A later session belongs to a worker that may have
    /// lost what this is about.
    Send {
        /// To whom.
        worker: WorkerId,
        /// The session that was its newest when this was decided.
        session: u64,
        /// What.
        message: ToWorker,
    },
    /// Look for the job's newest good checkpoint and answer with [`Core::handle_checkpoint_found`].
    FindCheckpoint {
        /// The job.
        job: JobId,
        /// The membership that waits for the answer.
        generation: Generation,
    },
    /// Add a line to the job's log.
    Log {
        /// The job.
        job: JobId,
        /// The line.
        line: String,
    },
}

/// What became of a worker's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reception {
    /// It counts.
    Current,
    /// It belongs to a membership that is over, and was ignored.
    Stale,
}

/// Patience.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How long after the coordinator's start workers of running jobs may take to come back once others have ended.
    pub restart_grace_ms: u64,
    /// How long a worker of a running job may be away once others have ended.
    pub away_grace_ms: u64,
    /// How long a worker that came back without its work may take to report how that ended.
    pub report_grace_ms: u64,
    /// How long a worker may take to abort.
    pub abort_ms: u64,
    /// How long a worker that a peer has named as the culprit may take to say its own end.
    pub accused_ms: u64,
    /// How long a worker that is away may take to come back once its membership has been aborted.
    pub rejoin_ms: u64,
    /// How long a worker that its peers cannot reach, though the coordinator can, is left out of their job for the first
    /// time; every further time doubles it, ...
    pub bench_ms: u64,
    /// ... up to this, ...
    pub max_bench_ms: u64,
    /// ... until a membership with it has stepped for this long.
    pub bench_forget_ms: u64,
    /// How long a newcomer that is ready waits for others that are about to be.
    pub gather_ms: u64,
    /// How long a leaving worker waits for others that leave at the same time.
    pub leave_ms: u64,
    /// Between two changes of a job's placement for the pace of its ranks.
    pub rebalance_ms: u64,
    /// Beyond a job's own time: for clocks that differ and packets on their way.
    pub lease_margin_ms: u64,
    /// After so many failures in a row without getting further a job is given up, ...
    pub max_fruitless: u32,
    /// ... unless less than this has passed since the first of them: misfortunes of the cluster come in quick succession.
    pub fruitless_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        // A worker retries every second and gives a silent coordinator up after 6 s, so 15 s are two tries and some.
        Self {
            restart_grace_ms: 15_000,
            away_grace_ms: 5_000,
            report_grace_ms: 1_000,
            abort_ms: 20_000,
            // A worker that lives says its end in the same millisecond as its peers; half a second is far beyond that.
            accused_ms: 500,
            // Two tries of a worker that has just noticed a coordinator's restart.
            rejoin_ms: 1_000,
            bench_ms: 10_000,
            // A collective times out after 10 s by default: a fiftieth of the time is lost at most.
            max_bench_ms: 600_000,
            // Six time-outs: who could not be reached for that long would have ended the membership.
            bench_forget_ms: 60_000,
            gather_ms: 1_000,
            // Those who end many workers at once do it within some milliseconds.
            leave_ms: 100,
            rebalance_ms: 30_000,
            lease_margin_ms: LEASE_MARGIN_MS,
            max_fruitless: 10,
            fruitless_ms: 120_000,
        }
    }
}

/// What the shell has kept since the last run.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// All jobs.
    pub jobs: Vec<JobRecord>,
    /// All workers.
    pub workers: Vec<WorkerRecord>,
    /// The number of the last job ever, if jobs have been left out.
    pub last_job: JobId,
    /// The number of the last worker ever, if workers have been left out.
    pub last_worker: WorkerId,
}

/// The coordinator's state.
///
/// Call `handle_*` and commands as things happen, and after each of them [`Self::poll_action`] until it returns `None`.
pub struct Core {
    pub(crate) config: Config,
    pub(crate) jobs: BTreeMap<JobId, Job>,
    pub(crate) workers: Workers,
    pub(crate) actions: VecDeque<Action>,
    last_job: JobId,
    last_worker: WorkerId,
    pub(crate) stale_messages: u64,
    /// When this coordinator took jobs over that run.
    pub(crate) took_over_ms: Option<u64>,
}

impl Core {
    /// A core that goes on where the records end. Running jobs wait for their workers to come back.
    pub fn new(config: Config, restored: Restored, now_ms: u64) -> Self {
        let last_job = restored.jobs.iter().map(|j| j.id).max().unwrap_or_default().max(restored.last_job);
        let last_worker =
            restored.workers.iter().map(|w| w.id).max().unwrap_or_default().max(restored.last_worker);
        let mut core = Self {
            config,
            jobs: restored.jobs.into_iter().map(|r| (r.id, Job::new(r))).collect(),
            workers: Workers::restored(restored.workers),
            actions: VecDeque::new(),
            last_job,
            last_worker,
            stale_messages: 0,
            took_over_ms: None,
        };
        let away = MemberState::Away { since_ms: now_ms, until_ms: now_ms + config.restart_grace_ms };
        for job in core.jobs.values_mut() {
            if !matches!(job.record.state, JobState::Running | JobState::Stopping) {
                continue;
            }
            let record = &job.record;
            let even = || Placement::even(record.logical_shards, record.members.len().max(1) as u32);
            let placement = record.placement.clone().unwrap_or_else(even);
            let live = Live::new(record.generation, &record.members, placement, &away);
            for member in &live.members {
                core.workers.engage(member.worker, (job.record.id, live.generation));
            }
            let hosts = live.members.iter().map(|m| (m.worker, core.workers.host(m.worker).to_owned()));
            job.begin_flight(live.generation, hosts.collect());
            job.phase = Phase::Live(live);
            core.took_over_ms = Some(now_ms);
        }
        core.schedule(now_ms);
        core
    }
}

/// Getters
impl Core {
    /// All jobs in order of submission.
    pub fn jobs(&self) -> impl Iterator<Item = &JobRecord> {
        self.jobs.values().map(|j| &j.record)
    }

    /// One job.
    pub fn job(&self, id: JobId) -> Option<&JobRecord> {
        self.jobs.get(&id).map(|j| &j.record)
    }

    /// Estimated seconds to the end of a running job.
    pub fn eta_s(&self, id: JobId) -> Option<f64> {
        let job = self.jobs.get(&id)?;
        let left = job.record.total_steps.checked_sub(job.record.step)?;
        (job.record.state == JobState::Running).then_some(())?;
        Some(job.pace_s? * left as f64)
    }

    /// All workers that ever enrolled.
    pub fn workers(&self) -> impl Iterator<Item = WorkerView<'_>> {
        self.workers.views()
    }

    /// What a job's ranks wait for, or waited for when its last membership failed, if they have told.
    pub fn flight(&self, id: JobId, now_ms: u64) -> Option<FlightSummary> {
        self.jobs.get(&id)?.flight(now_ms)
    }

    /// Messages that were ignored because their membership was over.
    pub fn stale_messages(&self) -> u64 {
        self.stale_messages
    }

    /// Whether a session of `worker` is open.
    pub fn is_connected(&self, worker: WorkerId) -> bool {
        self.workers.session(worker).is_some()
    }

    /// Whether the job's present membership is `generation` and not over.
    pub fn is_running(&self, job: JobId, generation: Generation) -> bool {
        self.jobs.get(&job).and_then(Job::live).is_some_and(|live| live.generation == generation)
    }

    /// Whether `worker` takes part in the job's present membership, which is `generation`, and has not ended.
    pub fn is_current(&self, worker: WorkerId, job: JobId, generation: Generation) -> bool {
        let live = self.jobs.get(&job).and_then(Job::live).filter(|l| l.generation == generation);
        live.and_then(|l| Some(&l.members[l.rank_of(worker)?].state)).is_some_and(MemberState::is_open)
    }
}

/// Output
impl Core {
    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }
}

/// Events
impl Core {
    /// A newcomer with a good token gets a number.
    pub fn handle_enrolled(&mut self, host: String, now_ms: u64) -> WorkerId {
        self.last_worker = WorkerId(self.last_worker.0 + 1);
        let record = WorkerRecord { id: self.last_worker, host, enrolled_ms: now_ms, port: None };
        self.actions.push_back(Action::PersistWorker(record.clone()));
        self.workers.add(record);
        self.last_worker
    }

    /// A worker says something in its session.
    pub fn handle_message(&mut self, worker: WorkerId, message: FromWorker, now_ms: u64) -> Reception {
        self.workers.heard(worker, now_ms);
        let (job, generation) = match &message {
            FromWorker::Leaving => {
                self.handle_leaving(worker, now_ms);
                return Reception::Current;
            }
            FromWorker::Steps { job, generation, .. }
            | FromWorker::Metrics { job, generation, .. }
            | FromWorker::Log { job, generation, .. }
            | FromWorker::Flight { job, generation, .. }
            | FromWorker::Following { job, generation, .. }
            | FromWorker::Pace { job, generation, .. }
            | FromWorker::Ended { job, generation, .. } => (*job, *generation),
        };
        if let FromWorker::Following { position, .. } = &message {
            self.handle_following(worker, (job, generation), *position, now_ms);
            return Reception::Current;
        }
        self.hear_forgetful(worker, (job, generation), now_ms);
        if !self.is_current(worker, job, generation) {
            self.stale_messages += 1;
            if let FromWorker::Ended { outcome, held, .. } = message {
                self.handle_late_end(worker, (job, generation), outcome, held, now_ms);
            }
            return Reception::Stale;
        }
        match message {
            FromWorker::Steps { records, .. } => {
                if let Some(known) = self.jobs.get_mut(&job) {
                    records.iter().for_each(|r| known.step_done(r));
                    if let Some(live) = known.live_mut() {
                        live.steps_since_ms.get_or_insert(now_ms);
                    }
                }
            }
            FromWorker::Metrics { values, .. } => {
                if let Some(known) = self.jobs.get_mut(&job) {
                    known.record.take_in(values);
                }
                self.persist(job);
            }
            FromWorker::Ended { outcome, held, .. } => {
                self.note_held(worker, (job, generation), held);
                self.handle_ended(worker, (job, generation), outcome, now_ms)
            }
            FromWorker::Flight { report, .. } => {
                if let Some(known) = self.jobs.get_mut(&job)
                    && let Some(rank) = known.live().and_then(|l| l.rank_of(worker))
                    && let Some(board) = &mut known.flight
                {
                    board.handle_report(rank, report, now_ms);
                }
            }
            FromWorker::Pace { pace, .. } => self.handle_pace(worker, job, pace, now_ms),
            FromWorker::Log { .. } | FromWorker::Leaving | FromWorker::Following { .. } => {}
        }
        Reception::Current
    }

    /// A worker that came back without its work and tells of it is about to say how that ended.
    fn hear_forgetful(&mut self, worker: WorkerId, (job, generation): (JobId, Generation), now_ms: u64) {
        let grace_ms = self.config.report_grace_ms;
        let live = self.jobs.get_mut(&job).and_then(Job::live_mut).filter(|l| l.generation == generation);
        if let Some(live) = live
            && let Some(rank) = live.rank_of(worker)
            && let MemberState::Forgotten { until_ms } = &mut live.members[rank].state
        {
            *until_ms = now_ms + grace_ms;
        }
    }

    /// The membership whose outcome it is that `worker` keeps a state of `job` from `generation`, if it is of use.
    ///
    /// A coordinator may be killed between writing down a membership and telling its members. Whoever was to take part and
    /// keeps what that was to start from has not begun: then nobody has stepped in it, and its start is its outcome.
    pub(crate) fn outcome_of(
        &mut self,
        worker: WorkerId,
        job: JobId,
        generation: Generation,
    ) -> Option<Generation> {
        let known = self.jobs.get_mut(&job).filter(|known| known.spoilt != Some(generation))?;
        let record = &mut known.record;
        if record.state.is_final() {
            return None;
        }
        let started = record.started;
        if started != generation {
            let Phase::Live(live) = &known.phase else { return None };
            let is_member = live.generation == started && live.rank_of(worker).is_some();
            if !is_member || !record.resumed_from.contains(&generation) {
                return None;
            }
            record.undelivered = true;
        }
        Some(started)
    }

    /// What a worker that has ended keeps for the next membership.
    fn note_held(
        &mut self,
        worker: WorkerId,
        (job, generation): (JobId, Generation),
        held: Option<Position>,
    ) {
        if held.is_some() && self.jobs.get(&job).is_some_and(|known| known.spoilt == Some(generation)) {
            return self.drop_memory(worker, job);
        }
        let held = held.map(|position| Held { job, generation, position });
        self.workers.set_held(worker, held);
        if let (Some(held), Some(known)) = (held, self.jobs.get_mut(&job)) {
            known.record.step = known.record.step.max(held.position.step);
        }
    }

    /// The end of a rank that was not waited for any longer. It may be what shows that its membership is over.
    fn handle_late_end(
        &mut self,
        worker: WorkerId,
        engagement: (JobId, Generation),
        outcome: Outcome,
        held: Option<Position>,
        now_ms: u64,
    ) {
        let (id, generation) = engagement;
        self.workers.release(worker, engagement);
        let started = self.jobs.get(&id).map(|j| j.record.started);
        if started == Some(generation) {
            self.note_held(worker, engagement, held);
        } else if held.is_some()
            && self.workers.engaged(worker).is_none_or(|(job, _)| job != id)
            && !self.workers.follows(worker, id)
        {
            // One that takes part or follows has nothing of then any more, and would drop what it has of now.
            self.drop_memory(worker, id);
        }
        if let Some(live) =
            self.jobs.get_mut(&id).and_then(Job::live_mut).filter(|l| l.generation == generation)
            && let Some(rank) = live.rank_of(worker)
            && matches!(live.members[rank].state, MemberState::Gone(_))
        {
            live.members[rank].state = MemberState::Ended(outcome);
            self.settle(id, now_ms);
        }
        self.schedule(now_ms);
    }

    /// A member of the job's present membership as logs name it.
    pub(crate) fn who(&self, worker: WorkerId, rank: usize) -> Who {
        Who { rank: Rank(rank as u32), worker, host: self.workers.host(worker).to_owned() }
    }

    /// The member of the job's present membership with this rank, if there is one.
    fn member(&self, id: JobId, rank: usize) -> Option<Who> {
        let member = self.jobs.get(&id)?.live()?.members.get(rank)?;
        Some(self.who(member.worker, rank))
    }

    fn handle_ended(
        &mut self,
        worker: WorkerId,
        engagement: (JobId, Generation),
        outcome: Outcome,
        now_ms: u64,
    ) {
        let id = engagement.0;
        let accused_until = now_ms + self.config.accused_ms;
        self.workers.release(worker, engagement);
        let Some(rank) = self.jobs.get(&id).and_then(Job::live).and_then(|l| l.rank_of(worker)) else {
            return;
        };
        let who = self.who(worker, rank);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if let Some(live) = job.live_mut() {
            live.members[rank].state = MemberState::Ended(outcome.clone());
        }
        let next = |cause| Ending::Next { cause, mode: StopMode::Abort };
        let is_mismatch = matches!(outcome, Outcome::Mismatch { .. });
        match outcome {
            Outcome::Finished { weights_digest, step, epoch, metrics } => {
                if rank == 0 {
                    job.record.weights_digest = Some(weights_digest);
                    job.record.step = step;
                    job.record.epoch = epoch;
                    job.record.take_in(metrics);
                    self.persist(id);
                }
                self.settle(id, now_ms);
            }
            Outcome::Stopped { step } => {
                let told = job.live().is_some_and(|l| l.stop.is_some());
                job.record.step = job.record.step.max(step);
                self.log(id, format!("{who} stopped after step {step}"));
                if told {
                    self.settle(id, now_ms);
                } else {
                    // It was told to by its host. All ranks stop at the same step, so the others will too.
                    let ending =
                        Ending::Next { cause: Cause::StoppedByItself { who }, mode: StopMode::Boundary };
                    self.begin_ending(id, ending, now_ms);
                }
            }
            Outcome::Lost { error, culprit } | Outcome::Mismatch { error, culprit } => {
                if is_mismatch {
                    job.spoilt = Some(engagement.1);
                }
                if let Some(accused) = culprit.filter(|c| c.index() != rank && !is_mismatch)
                    && let Some(member) = job.live_mut().and_then(|l| l.members.get_mut(accused.index()))
                {
                    member.accusers += 1;
                    member.accused_until_ms.get_or_insert(accused_until);
                }
                let blamed = culprit.map(|c| format!(", caused by {c}")).unwrap_or_default();
                let other = culprit.filter(|c| c.index() != rank);
                let culprit = other.and_then(|c| self.member(id, c.index()));
                self.log(id, format!("{who} cannot go on: {error}{blamed}"));
                self.begin_ending(id, next(Cause::PeersLost { who, error, culprit }), now_ms);
            }
            Outcome::Unstored { error } => {
                let newest = match job.record.checkpoint {
                    Some(step) => format!("the checkpoint of step {step}"),
                    None => "the start".to_owned(),
                };
                let error = format!(
                    "the coordinator's disk has not taken the last checkpoint: {error}; then resume the job, which goes on from \
                     {newest}"
                );
                self.begin_ending(id, Ending::Fail { error }, now_ms);
            }
            Outcome::Failed { error } => {
                self.log(id, format!("{who} failed: {error}"));
                let error = format!("{who}: {error}");
                self.begin_ending(id, Ending::Fail { error }, now_ms);
            }
        }
    }

    fn handle_leaving(&mut self, worker: WorkerId, now_ms: u64) {
        self.workers.leaving(worker);
        self.workers.unfollow(worker);
        let Some((job, generation)) = self.workers.engaged(worker) else { return };
        if self.is_current(worker, job, generation) {
            if let Some(known) = self.jobs.get_mut(&job) {
                known.leave_at_ms.get_or_insert(now_ms + self.config.leave_ms);
            }
        } else {
            self.drop_reservation(job);
            self.schedule(now_ms);
        }
    }

    /// A checkpoint has become visible.
    pub fn handle_checkpoint_stored(&mut self, job: JobId, step: u64) {
        if let Some(known) = self.jobs.get_mut(&job) {
            known.record.checkpoint = Some(step);
            known.record.step = known.record.step.max(step);
            self.persist(job);
        }
    }
}

/// Helpers of all parts
impl Core {
    pub(crate) fn new_job_id(&mut self) -> JobId {
        self.last_job = JobId(self.last_job.0 + 1);
        self.last_job
    }

    pub(crate) fn log(&mut self, job: JobId, line: String) {
        self.actions.push_back(Action::Log { job, line });
    }

    /// Has a worker drop what it keeps and what it follows of a job.
    pub(crate) fn drop_memory(&mut self, worker: WorkerId, job: JobId) {
        self.workers.forget(worker, job);
        self.send(worker, ToWorker::Release { job });
    }

    pub(crate) fn send(&mut self, worker: WorkerId, message: ToWorker) {
        if let Some(session) = self.workers.session(worker) {
            self.actions.push_back(Action::Send { worker, session, message });
        }
    }

    pub(crate) fn persist(&mut self, id: JobId) {
        if let Some(job) = self.jobs.get(&id) {
            self.actions.push_back(Action::PersistJob(Box::new(job.record.clone())));
        }
    }
}
