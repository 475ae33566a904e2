//! The state machine: events in, actions out.

use crate::action::{Action, Leave, Refused, Start};
use crate::lease::Lease;
use crate::leaving::Leaving;
use lockstep_common::ids::{Generation, JobId, Rank};
use lockstep_common::job::{JobSpec, WorkerRange};
use lockstep_common::wire::{
    Assignment, Following, FromWorker, Held, Outcome, Position, Resumption, Running, StopMode, ToWorker,
};
use std::collections::{BTreeMap, VecDeque};

/// A worker's membership.
///
/// Call `handle_*` as things happen, and after each of them [`Self::poll_action`] until it returns `None`.
#[derive(Debug, Default)]
pub struct Member {
    pub(crate) session: Option<Session>,
    /// Begins when the session has ended.
    next: Option<Box<Assignment>>,
    kept: Option<Held>,
    following: Option<Followed>,
    /// The newest generation seen of each job.
    newest: BTreeMap<JobId, Generation>,
    /// Since when the coordinator has been away; `None` while it is there.
    pub(crate) away_since_ms: Option<u64>,
    pub(crate) leaving: Option<Leaving>,
    left: bool,
    pub(crate) actions: VecDeque<Action>,
}

/// The session that runs.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    job: JobId,
    generation: Generation,
    rank: Rank,
    step: u64,
    /// How many ranks it has.
    world_size: usize,
    pub(crate) lease: Lease,
    /// Whether it has been told to end, by whomever.
    pub(crate) ending: bool,
    /// Whether that was at once.
    aborted: bool,
    /// Whether nothing of it is to be kept.
    released: bool,
}

impl Session {
    /// How it ends in good order when nobody can be asked: its peers keep the state, if there are any.
    pub(crate) fn local_stop(&self) -> StopMode {
        if self.world_size > 1 { StopMode::Boundary } else { StopMode::Checkpoint }
    }
}

/// The job that is followed.
#[derive(Clone, Copy, Debug)]
struct Followed {
    job: JobId,
    generation: Generation,
    /// How far the copy was when it was ready.
    ready: Option<Position>,
}

/// What others may know
impl Member {
    /// What to tell a coordinator that this worker connects to: the job that it is in the middle of, and what it keeps
    /// of one that it is not.
    pub fn register(&self) -> (Option<Running>, Option<Held>) {
        let running = self.session.as_ref().map(|s| Running {
            job: s.job,
            generation: s.generation,
            rank: s.rank,
            step: s.step,
        });
        (running, self.kept)
    }

    /// Whether this worker has been asked to leave.
    pub fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Whether it has left: there is nothing more to do.
    pub fn has_left(&self) -> bool {
        self.left
    }
}

/// Events
impl Member {
    /// A session with the coordinator is open, for which it was asked at `asked_ms`.
    pub fn handle_connected(&mut self, asked_ms: u64, now_ms: u64) {
        self.away_since_ms = None;
        self.forget_question();
        self.extend_lease(asked_ms);
        if self.leaving.is_some() {
            // It may be another coordinator than the one that was told.
            self.tell(FromWorker::Leaving);
        }
        self.handle_tick(now_ms);
    }

    /// The coordinator has answered [`Action::Ping`].
    pub fn handle_word(&mut self, sent_ms: u64, now_ms: u64) {
        self.extend_lease(sent_ms);
        self.handle_tick(now_ms);
    }

    /// The coordinator is away.
    pub fn handle_disconnected(&mut self, now_ms: u64) {
        self.away_since_ms.get_or_insert(now_ms);
        self.handle_tick(now_ms);
    }

    /// The session has committed `step`.
    pub fn handle_committed(&mut self, job: JobId, generation: Generation, step: u64) {
        if let Some(session) = self.session_of(job, generation) {
            session.step = step;
        }
    }

    /// The coordinator has given an order. `Err` says why it is not obeyed, which is no failure.
    pub fn handle_order(&mut self, order: ToWorker, now_ms: u64) -> Result<(), Refused> {
        match order {
            ToWorker::Start(assignment) => self.start(assignment, now_ms),
            ToWorker::Follow(following) => self.follow(following),
            ToWorker::Release { job } => {
                self.release(job);
                Ok(())
            }
            ToWorker::Stop { job, generation, mode } => self.stop(job, generation, mode),
            ToWorker::Dismiss { reason } => {
                self.abort("dismissed by the coordinator");
                self.leave(Leave::Dismissed { reason });
                Ok(())
            }
            // A matter between the outbox and the coordinator.
            ToWorker::Heard { .. } => Ok(()),
        }
    }

    /// The session has ended. `held` is how far the state is that the shell keeps of it.
    pub fn handle_session_ended(
        &mut self,
        job: JobId,
        generation: Generation,
        outcome: Outcome,
        held: Option<Position>,
        now_ms: u64,
    ) {
        let Some(session) = self.session.take_if(|s| s.job == job && s.generation == generation) else {
            return;
        };
        let over =
            matches!(outcome, Outcome::Finished { .. } | Outcome::Failed { .. } | Outcome::Unstored { .. });
        let of_use = !over && !session.released && self.leaving.is_none();
        if held.is_some() && !of_use {
            self.actions.push_back(Action::Drop);
        }
        let held = held.filter(|_| of_use);
        self.kept = held.map(|position| Held { job, generation, position });
        self.tell(FromWorker::Ended { job, generation, outcome, held });
        if let Some(assignment) = self.next.take() {
            self.begin(assignment, now_ms);
        }
        self.handle_tick(now_ms);
    }

    /// The copy that follows a job is at `position`: at most a step or two behind, or given up.
    pub fn handle_followed(&mut self, job: JobId, generation: Generation, position: Position) {
        if let Some(following) = &mut self.following
            && following.job == job
            && following.generation == generation
        {
            following.ready = Some(position);
            self.tell(FromWorker::Following { job, generation, position });
        }
    }

    /// This worker is to leave (a signal): in good order, so that nobody does a step again for it.
    pub fn handle_departure(&mut self, now_ms: u64) {
        if self.leaving.is_some() || self.left {
            return;
        }
        self.leaving = Some(Leaving::since(now_ms));
        // At once, so that nothing new is assigned here and nobody takes the end for a failure.
        self.tell(FromWorker::Leaving);
        if let Some(assignment) = self.next.take() {
            self.let_down(&assignment);
        }
        self.unfollow();
        self.drop_kept();
        self.handle_tick(now_ms);
    }

    /// Time has passed.
    pub fn handle_tick(&mut self, now_ms: u64) {
        self.tick_lease(now_ms);
        self.tick_leaving(now_ms);
    }
}

/// What comes out
impl Member {
    /// What is to be done next.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_tick`] is due.
    pub fn poll_timeout(&self) -> Option<u64> {
        match self.left {
            true => None,
            false => [self.lease_due_ms(), self.leaving_due_ms()].into_iter().flatten().min(),
        }
    }
}

impl Member {
    pub(crate) fn session_of(&mut self, job: JobId, generation: Generation) -> Option<&mut Session> {
        self.session.as_mut().filter(|s| s.job == job && s.generation == generation)
    }

    /// Has the session end in good order.
    pub(crate) fn end_session(&mut self, mode: StopMode) {
        if let Some(session) = &mut self.session {
            session.ending = true;
            self.actions.push_back(Action::Stop { mode });
        }
    }

    pub(crate) fn abort(&mut self, reason: &str) {
        if let Some(session) = &mut self.session {
            (session.ending, session.aborted) = (true, true);
            self.actions.push_back(Action::Abort { reason: reason.to_owned() });
        }
    }

    pub(crate) fn tell(&mut self, report: FromWorker) {
        self.actions.push_back(Action::Tell(report));
    }

    pub(crate) fn leave(&mut self, how: Leave) {
        if !self.left {
            self.left = true;
            self.actions.push_back(Action::Leave(how));
        }
    }

    /// Refuses what belongs to an older generation than the newest seen, and remembers a newer one.
    fn fence(&mut self, job: JobId, generation: Generation) -> Result<(), Refused> {
        let newest = self.newest.entry(job).or_insert(generation);
        if generation < *newest {
            return Err(Refused::Stale { job, generation, newest: *newest });
        }
        *newest = generation;
        Ok(())
    }

    fn start(&mut self, assignment: Box<Assignment>, now_ms: u64) -> Result<(), Refused> {
        let (job, generation) = (assignment.job, assignment.generation);
        let seen = self.newest.get(&job).copied();
        self.fence(job, generation)?;
        // A follower has seen the generation that it follows, which is not one that it can be started in.
        if seen == Some(generation) {
            return Err(Refused::Repeated);
        }
        if self.is_leaving() {
            self.let_down(&assignment);
            return Err(Refused::Leaving);
        }
        if self.session.is_none() {
            self.begin(assignment, now_ms);
            self.tick_lease(now_ms);
            return Ok(());
        }
        if let Some(superseded) = self.next.replace(assignment) {
            self.decline(&superseded);
        }
        // Even if it was to end in good order: its peers have gone on without it, and it would wait for them.
        if self.session.as_ref().is_some_and(|s| !s.aborted) {
            self.abort("a newer generation has begun");
        }
        Ok(())
    }

    /// Begins a session with what there is; none runs.
    fn begin(&mut self, assignment: Box<Assignment>, now_ms: u64) {
        let (job, generation, rank) = (assignment.job, assignment.generation, assignment.rank);
        // Only what was followed to its end: another generation in between may have got to the same position on another way,
        // which leads to other bits where a reduction is not exact.
        let followed =
            self.following.filter(|f| f.job == job && f.generation.0 + 1 == generation.0).is_some();
        let start = match &assignment.resume {
            Resumption::Peers { position, sources } if sources.contains(&rank) => {
                let kept = self.kept.filter(|kept| kept.job == job);
                if kept.is_none_or(|kept| kept.position != *position) {
                    let has =
                        kept.map_or("nothing".to_owned(), |kept| format!("the state of {}", kept.position));
                    let error = format!(
                        "{rank} was told to go on from its state of {position} of {job}, and keeps {has}"
                    );
                    self.unfollow();
                    self.drop_kept();
                    let outcome = Outcome::Lost { error, culprit: Some(rank) };
                    self.tell(FromWorker::Ended { job, generation, outcome, held: None });
                    return;
                }
                Start::Kept
            }
            Resumption::Peers { .. } if followed => Start::Followed,
            Resumption::Peers { .. } | Resumption::Checkpoint { .. } | Resumption::Fresh => Start::Elsewhere,
        };
        // Two states at a time would need twice the memory.
        if start == Start::Followed {
            self.following = None;
        } else {
            self.unfollow();
        }
        if start == Start::Kept {
            self.kept = None;
        } else {
            self.drop_kept();
        }
        // A job file that cannot be read ends the session by itself.
        let workers = JobSpec::parse(&assignment.file, &assignment.toml).map(|job| job.workers);
        let timeout_ms = workers.unwrap_or_else(|_| WorkerRange::default()).orphan_timeout_s * 1000;
        self.session = Some(Session {
            job,
            generation,
            rank,
            step: match &assignment.resume {
                Resumption::Fresh => 0,
                Resumption::Checkpoint { step } => *step,
                Resumption::Peers { position, .. } => position.step,
            },
            world_size: assignment.peers.len(),
            lease: Lease::new(now_ms, timeout_ms),
            ending: false,
            aborted: false,
            released: false,
        });
        self.actions.push_back(Action::Begin { assignment, start });
    }

    /// Says that a generation has ended here before it began.
    fn decline(&mut self, assignment: &Assignment) {
        let (job, generation) = (assignment.job, assignment.generation);
        let outcome = Outcome::Stopped { step: 0 };
        self.tell(FromWorker::Ended { job, generation, outcome, held: None });
    }

    /// Says that a generation cannot begin with this worker, which leaves: its other ranks would wait for it, as they do not
    /// stop at the same step without having begun one.
    fn let_down(&mut self, assignment: &Assignment) {
        let (job, generation, rank) = (assignment.job, assignment.generation, assignment.rank);
        let error = format!("{rank} leaves before its first step");
        let outcome = Outcome::Lost { error, culprit: Some(rank) };
        self.tell(FromWorker::Ended { job, generation, outcome, held: None });
    }

    fn follow(&mut self, following: Box<Following>) -> Result<(), Refused> {
        let (job, generation) = (following.job, following.generation);
        self.fence(job, generation)?;
        if self.is_leaving() {
            return Err(Refused::Leaving);
        }
        if self.session.is_some() {
            return Err(Refused::Busy);
        }
        if let Some(present) = self.following
            && (present.job, present.generation) == (job, generation)
        {
            // A coordinator that was away does not know how far this is.
            let Some(position) = present.ready else { return Err(Refused::Repeated) };
            self.tell(FromWorker::Following { job, generation, position });
            return Ok(());
        }
        self.unfollow();
        self.drop_kept();
        self.following = Some(Followed { job, generation, ready: None });
        self.actions.push_back(Action::Follow(following));
        Ok(())
    }

    fn stop(&mut self, job: JobId, generation: Generation, mode: StopMode) -> Result<(), Refused> {
        if let Some(next) = self.next.take_if(|n| n.job == job && n.generation == generation) {
            self.decline(&next);
            return Ok(());
        }
        if self.session_of(job, generation).is_none() {
            return Err(Refused::NotRunning { job, generation });
        }
        match mode {
            StopMode::Boundary | StopMode::Checkpoint => self.end_session(mode),
            StopMode::Abort => self.abort("told to leave at once"),
        }
        Ok(())
    }

    fn release(&mut self, job: JobId) {
        if self.kept.is_some_and(|kept| kept.job == job) {
            self.drop_kept();
        }
        if self.following.is_some_and(|f| f.job == job) {
            self.unfollow();
        }
        if let Some(session) = self.session.as_mut().filter(|s| s.job == job) {
            session.released = true;
        }
    }

    fn unfollow(&mut self) {
        if self.following.take().is_some() {
            self.actions.push_back(Action::Unfollow);
        }
    }

    fn drop_kept(&mut self) {
        if self.kept.take().is_some() {
            self.actions.push_back(Action::Drop);
        }
    }
}
