//! The workers: who is connected, and who is engaged in which generation.

use crate::record::WorkerRecord;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{Held, Position, Register};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Connected and free.
    Idle,
    /// In a job.
    Busy,
    /// Not connected.
    Away,
}

impl Activity {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Idle, Self::Busy, Self::Away];

    /// The word for lists and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Busy => "busy",
            Self::Away => "away",
        }
    }
}

/// A worker as others may see it.
#[derive(Clone, Copy, Debug)]
pub struct WorkerView<'a> {
    /// What is kept of it.
    pub record: &'a WorkerRecord,
    /// What it does.
    pub activity: Activity,
    /// Its newest introduction, if it has introduced itself since the coordinator's start.
    pub register: Option<&'a Register>,
    /// The job and generation that it is engaged in.
    pub engaged: Option<(JobId, Generation)>,
    /// When it was last heard of.
    pub heard_ms: u64,
}

pub(crate) struct Worker {
    record: WorkerRecord,
    session: Option<u64>,
    register: Option<Register>,
    engaged: Option<(JobId, Generation)>,
    /// What it has said to keep of a job.
    held: Option<Held>,
    following: Option<Follower>,
    leaving: bool,
    heard_ms: u64,
}

/// A worker that gets ready to join a job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Follower {
    pub(crate) job: JobId,
    /// The membership that it follows.
    pub(crate) generation: Generation,
    /// When it said that it is ready, and how far its copy was.
    pub(crate) ready: Option<(u64, Position)>,
}

#[derive(Default)]
pub(crate) struct Workers(BTreeMap<WorkerId, Worker>);

impl Workers {
    pub(crate) fn restored(records: Vec<WorkerRecord>) -> Self {
        Self(records.into_iter().map(|r| (r.id, Worker::new(r))).collect())
    }

    pub(crate) fn add(&mut self, record: WorkerRecord) {
        self.0.insert(record.id, Worker::new(record));
    }

    pub(crate) fn views(&self) -> impl Iterator<Item = WorkerView<'_>> {
        self.0.values().map(Worker::view)
    }

    /// Connected workers that neither have a job nor get ready for one, in ascending order.
    pub(crate) fn idle(&self) -> Vec<WorkerId> {
        self.0.iter().filter(|(_, w)| w.is_idle()).map(|(id, _)| *id).collect()
    }

    pub(crate) fn knows(&self, id: WorkerId) -> bool {
        self.0.contains_key(&id)
    }

    pub(crate) fn register(&self, id: WorkerId) -> Option<&Register> {
        self.0.get(&id)?.register.as_ref()
    }

    pub(crate) fn host(&self, id: WorkerId) -> &str {
        self.0.get(&id).map_or("?", Worker::host)
    }

    /// The same workers, those of one host side by side, so that a reduction can go through each host once. Hosts keep
    /// the order of their first workers.
    pub(crate) fn by_host(&self, workers: Vec<WorkerId>) -> Vec<WorkerId> {
        let key = |id: &WorkerId| self.register(*id)?.host_key.as_ref();
        let first_of_host = |id| key(id).and_then(|host| workers.iter().position(|w| key(w) == Some(host)));
        let place = |(index, id)| (first_of_host(id).unwrap_or(index), *id);
        let mut placed: Vec<_> = workers.iter().enumerate().map(place).collect();
        placed.sort_by_key(|(place, _)| *place);
        placed.into_iter().map(|(_, id)| id).collect()
    }

    /// Where the last process of the worker listened, if that is known.
    pub(crate) fn port(&self, id: WorkerId) -> Option<SocketAddr> {
        self.0.get(&id)?.record.port
    }

    /// Notes where the worker's process listens; returns its record if that is news.
    pub(crate) fn set_port(&mut self, id: WorkerId, port: Option<SocketAddr>) -> Option<&WorkerRecord> {
        let record = &mut self.0.get_mut(&id)?.record;
        (std::mem::replace(&mut record.port, port) != port).then_some(record)
    }

    /// The worker's session, if it is connected.
    pub(crate) fn session(&self, id: WorkerId) -> Option<u64> {
        self.0.get(&id)?.session
    }

    pub(crate) fn engaged(&self, id: WorkerId) -> Option<(JobId, Generation)> {
        self.0.get(&id)?.engaged
    }

    /// The worker keeps this, or nothing.
    pub(crate) fn set_held(&mut self, id: WorkerId, held: Option<Held>) {
        if let Some(worker) = self.0.get_mut(&id) {
            worker.held = held;
        }
    }

    /// How far the state is that the worker keeps of `job` from its membership `generation`.
    pub(crate) fn kept(&self, id: WorkerId, job: JobId, generation: Generation) -> Option<Position> {
        let held = self.0.get(&id)?.held?;
        (held.job == job && held.generation == generation).then_some(held.position)
    }

    /// All workers that keep something of `job`.
    pub(crate) fn holders(&self, job: JobId) -> Vec<WorkerId> {
        let holds = |w: &Worker| w.held.is_some_and(|held| held.job == job);
        self.0.iter().filter(|(_, w)| holds(w)).map(|(id, _)| *id).collect()
    }

    /// The worker gets ready to join `job`.
    pub(crate) fn follow(&mut self, id: WorkerId, job: JobId, generation: Generation) {
        if let Some(worker) = self.0.get_mut(&id) {
            worker.following = Some(Follower { job, generation, ready: None });
        }
    }

    /// The worker is ready to join what it follows; whether it follows just that.
    pub(crate) fn ready(&mut self, id: WorkerId, of: (JobId, Generation), at: Position, now_ms: u64) -> bool {
        let follower = self.0.get_mut(&id).and_then(|w| w.following.as_mut());
        let Some(follower) = follower.filter(|f| (f.job, f.generation) == of) else { return false };
        follower.ready.get_or_insert((now_ms, at));
        true
    }

    /// The worker follows nothing any longer; what it did follow.
    pub(crate) fn unfollow(&mut self, id: WorkerId) -> Option<JobId> {
        Some(self.0.get_mut(&id)?.following.take()?.job)
    }

    /// The worker neither keeps anything of `job` any more nor gets ready to join it.
    pub(crate) fn forget(&mut self, id: WorkerId, job: JobId) {
        if let Some(worker) = self.0.get_mut(&id) {
            worker.following.take_if(|f| f.job == job);
            worker.held.take_if(|held| held.job == job);
        }
    }

    /// Whether the worker gets ready to join `job`.
    pub(crate) fn follows(&self, id: WorkerId, job: JobId) -> bool {
        self.0.get(&id).and_then(|w| w.following).is_some_and(|f| f.job == job)
    }

    /// Who gets ready to join `job`.
    pub(crate) fn followers(&self, job: JobId) -> Vec<(WorkerId, Follower)> {
        let of_job = |(id, w): (&WorkerId, &Worker)| Some((*id, w.following.filter(|f| f.job == job)?));
        self.0.iter().filter_map(of_job).collect()
    }

    /// Who gets ready to join any job.
    pub(crate) fn all_followers(&self) -> Vec<WorkerId> {
        self.0.iter().filter(|(_, w)| w.following.is_some()).map(|(id, _)| *id).collect()
    }

    /// Whether it is being shut down.
    pub(crate) fn is_leaving(&self, id: WorkerId) -> bool {
        self.0.get(&id).is_some_and(|w| w.leaving)
    }

    pub(crate) fn connect(&mut self, id: WorkerId, session: u64, register: Register, now_ms: u64) {
        if let Some(worker) = self.0.get_mut(&id) {
            worker.session = Some(session);
            worker.leaving = false;
            worker.heard_ms = now_ms;
            worker.held = register.held;
            worker.following = None;
            worker.register = Some(register);
        }
    }

    /// Whether `session` was the worker's newest, so that the worker is away now.
    pub(crate) fn disconnect(&mut self, id: WorkerId, session: u64, now_ms: u64) -> bool {
        match self.0.get_mut(&id) {
            Some(worker) if worker.session == Some(session) => {
                worker.session = None;
                worker.held = None;
                worker.following = None;
                worker.heard_ms = now_ms;
                true
            }
            _ => false,
        }
    }

    pub(crate) fn heard(&mut self, id: WorkerId, now_ms: u64) {
        if let Some(worker) = self.0.get_mut(&id) {
            worker.heard_ms = now_ms;
        }
    }

    /// The worker takes no further job in this session.
    pub(crate) fn leaving(&mut self, id: WorkerId) {
        if let Some(worker) = self.0.get_mut(&id) {
            worker.leaving = true;
        }
    }

    pub(crate) fn engage(&mut self, id: WorkerId, engagement: (JobId, Generation)) {
        if let Some(worker) = self.0.get_mut(&id) {
            worker.engaged = Some(engagement);
            worker.following = None;
        }
    }

    /// Frees the worker, if it is engaged in just this.
    pub(crate) fn release(&mut self, id: WorkerId, engagement: (JobId, Generation)) {
        if let Some(worker) = self.0.get_mut(&id)
            && worker.engaged == Some(engagement)
        {
            worker.engaged = None;
        }
    }
}

impl Worker {
    fn new(record: WorkerRecord) -> Self {
        Self {
            heard_ms: record.enrolled_ms,
            record,
            session: None,
            register: None,
            engaged: None,
            held: None,
            following: None,
            leaving: false,
        }
    }

    fn is_idle(&self) -> bool {
        self.session.is_some() && self.engaged.is_none() && self.following.is_none() && !self.leaving
    }

    fn host(&self) -> &str {
        self.register.as_ref().map_or(&self.record.host, |r| &r.host)
    }

    fn view(&self) -> WorkerView<'_> {
        let activity = match (self.session, self.is_idle()) {
            (None, _) => Activity::Away,
            (Some(_), true) => Activity::Idle,
            (Some(_), false) => Activity::Busy,
        };
        WorkerView {
            record: &self.record,
            activity,
            register: self.register.as_ref(),
            engaged: self.engaged,
            heard_ms: self.heard_ms,
        }
    }
}
