//! The coordinator's process: `coordinator/src/service/hub.rs` and what is around it, without threads.
//!
//! One event after the other, each followed by what the core asks for, in its order. A record's write takes its time, and
//! the process may die in the middle of it.

use crate::chain::State;
use crate::cluster::World;
use crate::judge::NO_SPACE;
use crate::network::{COORDINATOR, ConnectionId, Lane};
use crate::plan::Workload;
use crate::scheduler::Timer;
use crate::store::Store;
use crate::words::Message;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{FromWorker, JobState, Register, ToWorker};
use lockstep_core::{Action, Config, Core};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// How often the core's timers are looked at.
const TICK_MS: u64 = 200;

/// How long after a failure the store is tried again.
const WRITE_AGAIN_MS: u64 = 1_000;

/// Something for the hub to do.
enum Task {
    Tick,
    Open { connection: ConnectionId, register: Box<Register> },
    Hear { connection: ConnectionId, report: Box<FromWorker> },
    Close { connection: ConnectionId, process_ended: bool },
    Found { job: JobId, generation: Generation, step: Option<u64> },
    Stored { job: JobId, step: u64, answer: (ConnectionId, u64) },
    Enroll,
    Submit(Rc<Workload>),
    Pause,
    Resume,
}

/// What is done once all that follows from a task is durable.
enum Answer {
    Welcome(ConnectionId),
    Heard(ConnectionId),
    Stored(ConnectionId, u64),
    Enrolled(WorkerId),
}

/// Work beside the hub.
enum Background {
    /// A search for the newest checkpoint.
    Search { job: JobId, generation: Generation },
    /// A checkpoint that is being written.
    Install {
        connection: ConnectionId,
        request: u64,
        worker: WorkerId,
        job: JobId,
        generation: Generation,
        state: State,
    },
}

struct Session {
    worker: WorkerId,
    number: u64,
    welcome: bool,
    /// Orders that wait for the welcome.
    orders: Vec<ToWorker>,
}

/// The coordinator's process.
pub(crate) struct Hub {
    pub(crate) life: u32,
    pub(crate) core: Core,
    started_ms: u64,
    wall_at_start_ms: u64,
    tasks: VecDeque<Task>,
    sessions: BTreeMap<ConnectionId, Session>,
    newest: BTreeMap<WorkerId, ConnectionId>,
    last_session: u64,
    answers: Vec<Answer>,
    /// A write that has not reached the disk.
    writing: Option<Action>,
    /// An action that waits until the store can be written.
    blocked: Option<Action>,
    background: BTreeMap<u64, Background>,
    last_background: u64,
    /// The process dies at its so many-th write from now.
    pub(crate) doom: Option<u64>,
    /// Writes take no time, so that all that is there from the start is durable.
    pub(crate) new_disk: bool,
    /// Workers that have enrolled and are to be started.
    pub(crate) enrolled: Vec<WorkerId>,
}

/// Life
impl Hub {
    /// Starts on what the disk has.
    pub(crate) fn start(store: &Store, wall_ms: u64, world: &mut World) -> Self {
        let life = world.net.start(COORDINATOR, &mut world.clock);
        let config = Config { max_fruitless: u32::MAX, ..Config::default() };
        let started_ms = world.clock.now_ms();
        let hub = Self {
            life,
            core: Core::new(config, store.restored(), wall_ms),
            started_ms,
            wall_at_start_ms: wall_ms,
            tasks: VecDeque::new(),
            sessions: BTreeMap::new(),
            newest: BTreeMap::new(),
            last_session: 0,
            answers: Vec::new(),
            writing: None,
            blocked: None,
            background: BTreeMap::new(),
            last_background: 0,
            doom: None,
            new_disk: world.clock.now_ms() == 0,
            enrolled: Vec::new(),
        };
        hub.wake(world, TICK_MS, Timer::Tick);
        hub
    }

    /// The process dies; a write in progress may have reached the disk.
    pub(crate) fn die(&mut self, store: &mut Store, world: &mut World) {
        if let Some(action) = self.writing.take()
            && world.clock.one_in(2)
        {
            self.writing = Some(action);
            self.written(store, world);
        }
        // A checkpoint that is being written is a temporary file, of which nobody knows.
    }

    fn wake(&self, world: &mut World, ms: u64, timer: Timer) {
        world.clock.wake((COORDINATOR, self.life), ms, timer);
    }

    /// Milliseconds of a clock that never runs backwards, but may have been set before the start.
    fn now_ms(&self, world: &World) -> u64 {
        self.wall_at_start_ms + world.clock.now_ms() - self.started_ms
    }
}

/// Input
impl Hub {
    pub(crate) fn handle_timer(&mut self, timer: Timer, store: &mut Store, world: &mut World) {
        match timer {
            Timer::Tick => {
                self.wake(world, TICK_MS, Timer::Tick);
                self.tasks.push_back(Task::Tick);
            }
            Timer::Written => self.written(store, world),
            Timer::WriteAgain => {
                self.writing = self.blocked.take();
                if self.writing.is_some() {
                    self.write(store, world);
                }
            }
            Timer::Background(number) => self.finish(number, store, world),
            _ => {}
        }
        self.run(store, world);
    }

    pub(crate) fn handle_message(
        &mut self,
        connection: ConnectionId,
        message: Message,
        store: &mut Store,
        world: &mut World,
    ) {
        match message {
            Message::Register(register) => self.tasks.push_back(Task::Open { connection, register }),
            Message::Ping { sent_ms } => {
                let worker = self.sessions.get(&connection).map(|session| session.worker);
                if worker.is_some_and(|worker| self.core.is_connected(worker)) {
                    world.send(connection, COORDINATOR, Lane::Requests, Message::Pong { sent_ms });
                }
            }
            Message::Report(report) => self.tasks.push_back(Task::Hear { connection, report }),
            Message::Put { request, job, generation, state } => {
                let Some(worker) = world.worker_at(connection) else { return };
                if !self.core.is_current(worker, job, generation) {
                    let answer = Err("old_generation".to_owned());
                    world.send(connection, COORDINATOR, Lane::Requests, Message::Answer { request, answer });
                    return;
                }
                let install = Background::Install { connection, request, worker, job, generation, state };
                let write_ms = world.clock.between(5, 400);
                self.begin(install, write_ms, world);
            }
            Message::Get { request, job, generation, step } => {
                let Some(worker) = world.worker_at(connection) else { return };
                let answer =
                    match (self.core.is_current(worker, job, generation), store.checkpoint(job, step)) {
                        (false, _) => Err("old_generation".to_owned()),
                        (true, None) => Err("checkpoint".to_owned()),
                        (true, state) => Ok(state),
                    };
                world.send(connection, COORDINATOR, Lane::Requests, Message::Answer { request, answer });
            }
            _ => {}
        }
        self.run(store, world);
    }

    pub(crate) fn handle_lost(
        &mut self,
        connection: ConnectionId,
        process_ended: bool,
        store: &mut Store,
        world: &mut World,
    ) {
        // What came over it and is not taken care of is dropped with it.
        self.background
            .retain(|_, b| !matches!(b, Background::Install { connection: c, .. } if *c == connection));
        self.tasks.push_back(Task::Close { connection, process_ended });
        self.run(store, world);
    }

    pub(crate) fn enroll(&mut self, store: &mut Store, world: &mut World) {
        self.tasks.push_back(Task::Enroll);
        self.run(store, world);
    }

    pub(crate) fn submit(&mut self, workload: Rc<Workload>, store: &mut Store, world: &mut World) {
        self.tasks.push_back(Task::Submit(workload));
        self.run(store, world);
    }

    /// An operator pauses all jobs, or lets them go on.
    pub(crate) fn pause(&mut self, pause: bool, store: &mut Store, world: &mut World) {
        self.tasks.push_back(if pause { Task::Pause } else { Task::Resume });
        self.run(store, world);
    }

    fn begin(&mut self, work: Background, ms: u64, world: &mut World) {
        self.last_background += 1;
        self.background.insert(self.last_background, work);
        self.wake(world, ms, Timer::Background(self.last_background));
    }

    fn finish(&mut self, number: u64, store: &mut Store, world: &mut World) {
        match self.background.remove(&number) {
            Some(Background::Search { job, generation }) => {
                self.tasks.push_back(Task::Found { job, generation, step: store.newest(job) });
            }
            Some(Background::Install { connection, request, worker, job, generation, state }) => {
                let current = self.core.is_current(worker, job, generation);
                if current && !store.checkpoints_full {
                    let keep = self.core.job(job).map_or(1, |j| j.keep_checkpoints as usize);
                    store.install(job, state, keep);
                    let (step, answer) = (state.position.step, (connection, request));
                    self.tasks.push_back(Task::Stored { job, step, answer });
                    return;
                }
                if current {
                    world.judge.no_space(job);
                }
                let answer = Err(if current { NO_SPACE } else { "old_generation" }.to_owned());
                world.send(connection, COORDINATOR, Lane::Requests, Message::Answer { request, answer });
            }
            None => {}
        }
    }
}

/// The hub
impl Hub {
    /// Carries out what there is, until the disk is waited for.
    fn run(&mut self, store: &mut Store, world: &mut World) {
        loop {
            if !self.carry_out(store, world) {
                return;
            }
            let Some(task) = self.tasks.pop_front() else { return };
            self.perform(task, world);
        }
    }

    /// Whether all actions are done, or wait in a way that leaves the hub free.
    fn carry_out(&mut self, store: &mut Store, world: &mut World) -> bool {
        if self.writing.is_some() {
            return false;
        }
        while self.blocked.is_none() {
            let Some(action) = self.core.poll_action() else {
                self.answer(world);
                return true;
            };
            match action {
                Action::PersistJob(_) | Action::PersistWorker(_) => {
                    self.writing = Some(action);
                    if !self.write(store, world) {
                        return false;
                    }
                }
                Action::Send { worker, session, message } => self.send(worker, session, message, world),
                Action::FindCheckpoint { job, generation } => {
                    let search_ms = world.clock.between(1, 50);
                    self.begin(Background::Search { job, generation }, search_ms, world);
                }
                Action::Log { job, line } => {
                    world.trace.note(world.clock.now_ms(), &[5, job.0], || format!("{job}: {line}"));
                }
            }
        }
        true
    }

    /// Writes the record that is to be written; whether the hub is free again.
    fn write(&mut self, store: &mut Store, world: &mut World) -> bool {
        if store.records_full {
            self.blocked = self.writing.take();
            self.wake(world, WRITE_AGAIN_MS, Timer::WriteAgain);
            return true;
        }
        if let Some(left) = &mut self.doom {
            *left = left.saturating_sub(1);
            if *left == 0 {
                world.doomed = true;
                return false;
            }
        }
        let ms = if world.clock.one_in(5) { world.clock.between(1, 40) } else { 0 };
        let ms = if world.clock.one_in(200) { 800 } else { ms };
        if ms == 0 || self.new_disk {
            self.written(store, world);
            return true;
        }
        self.wake(world, ms, Timer::Written);
        false
    }

    fn written(&mut self, store: &mut Store, world: &mut World) {
        if let Some(action) = self.writing.take() {
            store.write(&action);
            if let Action::PersistJob(record) = &action {
                world.judge.recorded(record);
            }
        }
    }

    fn perform(&mut self, task: Task, world: &mut World) {
        let now_ms = self.now_ms(world);
        match task {
            Task::Tick => self.core.handle_tick(now_ms),
            Task::Open { connection, register } => {
                let Some(worker) = world.worker_at(connection) else { return };
                if world.net.end_of(connection, COORDINATOR).is_none() {
                    return; // It broke before its turn came.
                }
                self.last_session += 1;
                let number = self.last_session;
                if self.core.handle_connected(worker, number, *register, now_ms).is_err() {
                    world
                        .judge
                        .object(|| format!("{worker} has enrolled, and the coordinator does not know it"));
                    return;
                }
                let session = Session { worker, number, welcome: false, orders: Vec::new() };
                self.sessions.insert(connection, session);
                if let Some(old) = self.newest.insert(worker, connection) {
                    world.close(old, COORDINATOR);
                    self.tasks.push_back(Task::Close { connection: old, process_ended: false });
                }
                self.answers.push(Answer::Welcome(connection));
            }
            Task::Hear { connection, report } => {
                // A session that a newer one has taken over is still listened to until it has closed.
                let Some(session) = self.sessions.get(&connection) else { return };
                self.core.handle_message(session.worker, *report, now_ms);
                self.answers.push(Answer::Heard(connection));
            }
            Task::Close { connection, process_ended } => {
                let Some(session) = self.sessions.remove(&connection) else { return };
                if self.newest.get(&session.worker) == Some(&connection) {
                    self.newest.remove(&session.worker);
                }
                self.core.handle_disconnected(session.worker, session.number, process_ended, now_ms);
            }
            Task::Found { job, generation, step } => {
                self.core.handle_checkpoint_found(job, generation, Ok(step), now_ms);
            }
            Task::Stored { job, step, answer: (connection, request) } => {
                self.core.handle_checkpoint_stored(job, step);
                self.answers.push(Answer::Stored(connection, request));
            }
            Task::Enroll => {
                let worker = self.core.handle_enrolled("host".to_owned(), now_ms);
                self.answers.push(Answer::Enrolled(worker));
            }
            Task::Submit(workload) => {
                let job = self.core.submit(workload.job(), now_ms);
                world.judge.submitted(job, workload.clone());
                world.workloads.insert(job, workload);
            }
            Task::Pause => {
                let running: Vec<_> =
                    self.core.jobs().filter(|j| j.state == JobState::Running).map(|j| j.id).collect();
                for job in running {
                    // A refusal is an answer too.
                    let _ = self.core.pause(job, now_ms);
                }
            }
            Task::Resume => {
                let paused: Vec<_> =
                    self.core.jobs().filter(|j| j.state == JobState::Paused).map(|j| j.id).collect();
                for job in paused {
                    let _ = self.core.resume(job, now_ms);
                }
            }
        }
    }

    fn answer(&mut self, world: &mut World) {
        for answer in std::mem::take(&mut self.answers) {
            let (connection, message, lane) = match answer {
                Answer::Welcome(connection) => (connection, Message::Welcome, Lane::Talk),
                Answer::Heard(connection) => {
                    let heard = Box::new(ToWorker::Heard { reports: 1 });
                    (connection, Message::Order(heard), Lane::Talk)
                }
                Answer::Stored(connection, request) => {
                    (connection, Message::Answer { request, answer: Ok(None) }, Lane::Requests)
                }
                Answer::Enrolled(worker) => {
                    self.enrolled.push(worker);
                    continue;
                }
            };
            world.send(connection, COORDINATOR, lane, message);
            if lane == Lane::Talk
                && let Some(session) = self.sessions.get_mut(&connection)
                && !std::mem::replace(&mut session.welcome, true)
            {
                for order in std::mem::take(&mut session.orders) {
                    world.send(connection, COORDINATOR, Lane::Talk, Message::Order(Box::new(order)));
                }
            }
        }
    }

    fn send(&mut self, worker: WorkerId, number: u64, message: ToWorker, world: &mut World) {
        let Some(connection) = self.newest.get(&worker) else { return };
        let Some(session) = self.sessions.get_mut(connection).filter(|s| s.number == number) else { return };
        if session.welcome {
            world.send(*connection, COORDINATOR, Lane::Talk, Message::Order(Box::new(message)));
        } else {
            session.orders.push(message);
        }
    }
}
