//! A cluster around the core: a shell that keeps records and delivers messages, with verbs for what goes wrong.

use lockstep_common::ids::{Generation, HostKey, JobId, Rank, WorkerId};
use lockstep_common::wire::{
    FlightReport, FromWorker, Held, InterfaceAddress, JobState, Outcome, Position, Register, Running,
    StepRecord, ToWorker,
};
use lockstep_core::{Action, Config, Core, JobRecord, NewJob, Restored, WorkerRecord};
use std::collections::BTreeMap;

pub(crate) struct World {
    pub(crate) core: Core,
    pub(crate) now_ms: u64,
    /// What the core asked for, in words.
    pub(crate) trace: Vec<String>,
    jobs: BTreeMap<JobId, JobRecord>,
    workers: BTreeMap<WorkerId, WorkerRecord>,
    sessions: BTreeMap<WorkerId, u64>,
    last_session: u64,
    sent: Vec<(WorkerId, ToWorker)>,
    wanted: Vec<(JobId, Generation)>,
}

/// A job of 8 logical shards for `min` to `max` workers.
pub(crate) fn job(min: u32, max: u32) -> NewJob {
    NewJob {
        file: "job.toml".to_owned(),
        toml: String::new(),
        name: "job".to_owned(),
        logical_shards: 8,
        min_workers: min,
        max_workers: max,
        keep_checkpoints: 3,
        datasets: Vec::new(),
        wait_for: None,
        state_in_memory: true,
        orphan_timeout_ms: 3_600_000,
    }
}

pub(crate) fn finished(digest: &str) -> Outcome {
    Outcome::Finished { weights_digest: digest.to_owned(), step: 100, epoch: 1, metrics: BTreeMap::new() }
}

fn introduction(worker: u64) -> Register {
    Register {
        host: format!("host{worker}"),
        device: "cpu".to_owned(),
        threads: 1,
        host_key: None,
        addresses: Vec::new(),
        advertised: Vec::new(),
        metrics: None,
        running: None,
        held: None,
    }
}

pub(crate) fn stopped(step: u64) -> Outcome {
    Outcome::Stopped { step }
}

/// Cluster
impl World {
    pub(crate) fn new() -> Self {
        Self::with(Core::new(Config::default(), Restored::default(), 0), 0)
    }

    fn with(core: Core, now_ms: u64) -> Self {
        Self {
            core,
            now_ms,
            trace: Vec::new(),
            jobs: BTreeMap::new(),
            workers: BTreeMap::new(),
            sessions: BTreeMap::new(),
            last_session: 0,
            sent: Vec::new(),
            wanted: Vec::new(),
        }
    }

    /// The coordinator is killed and started again on what it had kept.
    pub(crate) fn restart(self) -> Self {
        let restored = Restored {
            jobs: self.jobs.values().cloned().collect(),
            workers: self.workers.values().cloned().collect(),
            ..Restored::default()
        };
        let mut world = Self::with(Core::new(Config::default(), restored, self.now_ms), self.now_ms);
        (world.jobs, world.workers, world.last_session) = (self.jobs, self.workers, self.last_session);
        world.pump();
        world
    }

    /// Does what the core asks for.
    pub(crate) fn pump(&mut self) {
        while let Some(action) = self.core.poll_action() {
            let words = match &action {
                Action::PersistJob(job) => format!("persist {} {} {}", job.id, job.state, job.generation),
                Action::PersistWorker(worker) => format!("persist {}", worker.id),
                Action::Send { worker, message: ToWorker::Start(a), .. } => {
                    format!("{worker}: start {} {} as {}", a.job, a.generation, a.rank)
                }
                Action::Send { worker, message, .. } => format!("{worker}: {message:?}"),
                Action::FindCheckpoint { job, generation } => format!("find {job} {generation}"),
                Action::Log { job, line } => format!("log {job} {line}"),
            };
            self.trace.push(words);
            match action {
                Action::PersistJob(job) => drop(self.jobs.insert(job.id, *job)),
                Action::PersistWorker(worker) => drop(self.workers.insert(worker.id, worker)),
                Action::Send { worker, session, message } if self.sessions.get(&worker) == Some(&session) => {
                    self.sent.push((worker, message));
                }
                Action::FindCheckpoint { job, generation } => self.wanted.push((job, generation)),
                Action::Send { .. } | Action::Log { .. } => {}
            }
        }
    }

    /// What has been delivered to workers since the last look.
    pub(crate) fn inbox(&mut self) -> Vec<(WorkerId, ToWorker)> {
        std::mem::take(&mut self.sent)
    }

    pub(crate) fn enroll(&mut self, count: u64) {
        for _ in 0..count {
            self.core.handle_enrolled("host".to_owned(), self.now_ms);
        }
        self.pump();
    }

    pub(crate) fn submit(&mut self, job: NewJob) {
        self.core.submit(job, self.now_ms);
        self.pump();
    }

    /// Answers all searches for checkpoints.
    pub(crate) fn find(&mut self, step: Option<u64>) {
        for (job, generation) in std::mem::take(&mut self.wanted) {
            self.core.handle_checkpoint_found(job, generation, Ok(step), self.now_ms);
        }
        self.pump();
    }

    /// The worker opens a session, in the middle of nothing.
    pub(crate) fn connect(&mut self, worker: u64) {
        self.register(worker, None);
    }

    /// The worker opens a session in the middle of a job.
    pub(crate) fn return_with(&mut self, worker: u64, job: JobId, generation: u64, rank: u32, step: u64) {
        let running = Running { job, generation: Generation(generation), rank: Rank(rank), step };
        self.register(worker, Some(running));
    }

    /// The worker opens a session from a host whose only interface has this address, in 10.0.0.0/8.
    pub(crate) fn connect_from(&mut self, worker: u64, ip: [u8; 4]) {
        let interface = "eth0".to_owned();
        let address = InterfaceAddress { address: (ip, 7).into(), interface, prefix_bits: 8 };
        let key = HostKey(format!("{ip:?}"));
        self.open(worker, Register { host_key: Some(key), addresses: vec![address], ..introduction(worker) });
    }

    pub(crate) fn register(&mut self, worker: u64, running: Option<Running>) {
        self.open(worker, Register { running, ..introduction(worker) });
    }

    fn open(&mut self, worker: u64, register: Register) {
        self.last_session += 1;
        self.sessions.insert(WorkerId(worker), self.last_session);
        self.core.handle_connected(WorkerId(worker), self.last_session, register, self.now_ms).unwrap();
        self.pump();
    }

    /// The worker's connection breaks.
    pub(crate) fn cut(&mut self, worker: u64) {
        self.disconnect(worker, false);
    }

    /// The worker's process ends, and its host says so.
    pub(crate) fn die(&mut self, worker: u64) {
        self.disconnect(worker, true);
    }

    /// The coordinator finds out that the worker's host would tell if its process ended; it listens at this port.
    pub(crate) fn listens(&mut self, worker: u64, port: u16) {
        let address = ([10, 0, 0, worker as u8], port).into();
        self.core.handle_listening(WorkerId(worker), self.sessions[&WorkerId(worker)], Some(address));
        self.pump();
    }

    /// The worker's host says that nobody holds this port.
    pub(crate) fn closed(&mut self, worker: u64, port: u16) {
        let address = ([10, 0, 0, worker as u8], port).into();
        self.core.handle_port_closed(WorkerId(worker), address, self.now_ms);
        self.pump();
    }

    fn disconnect(&mut self, worker: u64, process_ended: bool) {
        self.sent.retain(|(to, _)| to.0 != worker);
        if let Some(session) = self.sessions.remove(&WorkerId(worker)) {
            self.core.handle_disconnected(WorkerId(worker), session, process_ended, self.now_ms);
        }
        self.pump();
    }

    /// The worker opens a session and says that it keeps the state of a job after this step.
    pub(crate) fn return_holding(&mut self, worker: u64, job: JobId, generation: u64, step: u64) {
        let held = Held { job, generation: Generation(generation), position: Position::at(step) };
        self.open(worker, Register { held: Some(held), ..introduction(worker) });
    }

    /// The worker says something.
    pub(crate) fn say(&mut self, worker: u64, message: FromWorker) {
        self.core.handle_message(WorkerId(worker), message, self.now_ms);
        self.pump();
    }

    /// The worker says how it ended a generation.
    pub(crate) fn end(&mut self, worker: u64, job: JobId, generation: u64, outcome: Outcome) {
        self.say(worker, FromWorker::Ended { job, generation: Generation(generation), outcome, held: None });
    }

    /// The worker says how it ended a generation, and that it keeps the state.
    pub(crate) fn end_with(
        &mut self,
        worker: u64,
        job: JobId,
        generation: u64,
        outcome: Outcome,
        at: Position,
    ) {
        let generation = Generation(generation);
        self.say(worker, FromWorker::Ended { job, generation, outcome, held: Some(at) });
    }

    /// The worker is ready to join.
    pub(crate) fn following(&mut self, worker: u64, job: JobId, generation: u64, step: u64) {
        let (generation, position) = (Generation(generation), Position::at(step));
        self.say(worker, FromWorker::Following { job, generation, position });
    }

    /// The worker reports a step.
    pub(crate) fn step(&mut self, worker: u64, job: JobId, generation: u64, step: u64) {
        let values = [("loss".to_owned(), 0.5)].into();
        let record = StepRecord {
            step,
            epoch: 1,
            total_steps: 100,
            samples: 64,
            seconds: 0.1,
            values,
            ..Default::default()
        };
        self.say(
            worker,
            FromWorker::Steps { job, generation: Generation(generation), records: vec![record] },
        );
    }

    /// The worker tells where its collectives are.
    pub(crate) fn fly(&mut self, worker: u64, job: JobId, generation: u64, report: FlightReport) {
        self.say(worker, FromWorker::Flight { job, generation: Generation(generation), report });
    }

    /// Time passes.
    pub(crate) fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        self.core.handle_tick(self.now_ms);
        self.pump();
    }

    pub(crate) fn state(&self, job: JobId) -> JobState {
        self.core.job(job).unwrap().state
    }

    pub(crate) fn reason(&self, job: JobId) -> &str {
        &self.core.job(job).unwrap().reason
    }

    pub(crate) fn generation(&self, job: JobId) -> Generation {
        self.core.job(job).unwrap().generation
    }
}
