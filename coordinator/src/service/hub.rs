//! The thread that owns the core and the store: one event after the other, each followed by what it asks for.
//!
//! A caller gets its answer after the actions of its event have been carried out, so what was answered is durable. If
//! the store cannot be written, nothing further is sent until it can be: operators are refused with the reason, and
//! workers' reports are not acknowledged until then.

use super::assembly::Assemblies;
use super::audits::Audits;
use super::refuse;
use super::resent::Reports;
use super::unstored::Unstored;
use crate::data_dir::DataDir;
use crate::metrics::Metrics;
use crate::store::Store;
use lockstep_common::durable::FileError;
use lockstep_common::http::Readiness;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{FromWorker, Refusal, Register, StepRecord, ToWorker};
use lockstep_core::{Action, CommandError, Core, Reception};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{mpsc, oneshot, watch};

/// How often the core's timers are looked at.
const TICK: Duration = Duration::from_millis(200);

/// How long after a failure the store is tried again.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// How often a lasting failure to write to jobs' folders is told of.
const FILES_TOLD_EVERY: Duration = Duration::from_secs(60);

/// Milliseconds since 1970 that never run backwards, whatever is done to the host's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
    start_ms: u64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { start: Instant::now(), start_ms: unix.as_millis() as u64 }
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.start_ms + self.start.elapsed().as_millis() as u64
    }
}

type Task = Box<dyn FnOnce(&mut Hub) + Send>;

/// What the hub needs from the start.
pub(crate) struct Parts {
    pub(crate) core: Core,
    pub(super) audits: Audits,
    pub(super) assemblies: Arc<Assemblies>,
    pub(crate) store: Store,
    pub(crate) dir: DataDir,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) readiness: Readiness,
    pub(crate) clock: Clock,
}

struct Session {
    number: u64,
    outbox: mpsc::UnboundedSender<ToWorker>,
}

/// An action that could not be made durable yet.
struct Blocked {
    action: Action,
    error: String,
    retry_at: Instant,
}

/// The owner of the core.
pub(crate) struct Hub {
    pub(crate) core: Core,
    audits: Audits,
    assemblies: Arc<Assemblies>,
    dir: DataDir,
    pub(crate) store: Store,
    metrics: Arc<Metrics>,
    readiness: Readiness,
    clock: Clock,
    sessions: HashMap<WorkerId, Session>,
    last_session: u64,
    /// What each worker has reported, to tell what it repeats.
    reports: HashMap<WorkerId, Reports>,
    pub(super) unstored: Unstored,
    blocked: Option<Blocked>,
    /// Answers that wait until all actions have been carried out.
    deferred: Vec<Box<dyn FnOnce() + Send>>,
    /// When a failure to write to a job's folder was last told of.
    told_of_files: Option<Instant>,
    handle: HubHandle,
    changes: watch::Sender<u64>,
    stopped: bool,
}

/// How tasks reach the hub.
#[derive(Clone)]
pub(crate) struct HubHandle {
    tasks: Sender<Task>,
    changes: watch::Receiver<u64>,
}

/// Starts the hub's thread.
pub(crate) fn start(parts: Parts) -> std::io::Result<(HubHandle, JoinHandle<()>)> {
    let (tasks, inbox) = channel();
    let (changes, changed) = watch::channel(0);
    let handle = HubHandle { tasks, changes: changed };
    let hub = Hub {
        core: parts.core,
        audits: parts.audits,
        assemblies: parts.assemblies,
        dir: parts.dir,
        store: parts.store,
        metrics: parts.metrics,
        readiness: parts.readiness,
        clock: parts.clock,
        sessions: HashMap::new(),
        last_session: 0,
        reports: HashMap::new(),
        unstored: Unstored::default(),
        blocked: None,
        deferred: Vec::new(),
        told_of_files: None,
        handle: handle.clone(),
        changes,
        stopped: false,
    };
    let thread = std::thread::Builder::new().name("hub".to_owned()).spawn(move || hub.run(&inbox))?;
    Ok((handle, thread))
}

impl HubHandle {
    /// Runs `task` on the hub and returns its result once the actions that follow from it have been carried out. While
    /// the store cannot be written, that is a refusal.
    pub(crate) async fn call<R: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Hub) -> R + Send + 'static,
    ) -> Result<R, Refusal> {
        let (answer, answered) = oneshot::channel();
        self.post(move |hub| {
            let result = task(hub);
            let done = hub.carry_out().map(|()| result).map_err(|e| {
                refuse("store", format_args!("{e}; what was asked is done as soon as it can be written"))
            });
            // The caller may have gone away.
            let _ = answer.send(done);
        });
        answered.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// Like [`Self::call`], but waits for the store however long it takes.
    pub(crate) async fn settle<R: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Hub) -> R + Send + 'static,
    ) -> Result<R, Refusal> {
        let (answer, answered) = oneshot::channel();
        self.post(move |hub| {
            let result = task(hub);
            hub.deferred.push(Box::new(move || {
                // The caller may have gone away.
                let _ = answer.send(result);
            }));
        });
        answered.await.map_err(|_| stopping())
    }

    /// What `view` sees, whether the store can be written or not.
    pub(crate) async fn look<R: Send + 'static>(
        &self,
        view: impl FnOnce(&Hub) -> R + Send + 'static,
    ) -> Result<R, Refusal> {
        let (answer, answered) = oneshot::channel();
        self.post(move |hub| {
            // The caller may have gone away.
            let _ = answer.send(view(hub));
        });
        answered.await.map_err(|_| stopping())
    }

    /// Runs `task` on the hub some time soon.
    pub(crate) fn post(&self, task: impl FnOnce(&mut Hub) + Send + 'static) {
        // After the hub's end there is nobody to do it for.
        let _ = self.tasks.send(Box::new(task));
    }

    /// Wakes up whenever something may have changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// Ends the hub's thread.
    pub(crate) fn stop(&self) {
        self.post(|hub| hub.stopped = true);
    }
}

fn stopping() -> Refusal {
    refuse("stopping", "the coordinator is stopping")
}

impl Hub {
    fn run(mut self, inbox: &Receiver<Task>) {
        let mut next_tick = Instant::now();
        while !self.stopped {
            match inbox.recv_timeout(next_tick.saturating_duration_since(Instant::now())) {
                Ok(task) => task(&mut self),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if next_tick <= Instant::now() {
                next_tick = Instant::now() + TICK;
                self.core.handle_tick(self.clock.now_ms());
                self.sweep_assemblies();
            }
            let writable = self.carry_out().is_ok();
            let audited = self.audits.write().and_then(|()| self.audits.sync_in_time());
            self.note_written(audited);
            self.readiness.set(writable && self.audits.is_written());
            self.metrics.observe(&self.core, self.clock.now_ms());
            self.changes.send_modify(|n| *n += 1);
        }
    }

    /// Drops checkpoints of which a rank that has not sent its part is gone.
    fn sweep_assemblies(&self) {
        self.assemblies.sweep(|job, generation, rank| {
            let worker = self.core.job(job).and_then(|record| record.members.get(rank));
            worker.is_some_and(|worker| self.core.is_current(*worker, job, generation))
        });
    }

    /// Does what the core asks for, in its order, and then answers those who wait for that.
    fn carry_out(&mut self) -> Result<(), String> {
        let was_blocked = self.blocked.is_some();
        let mut next = match self.blocked.take_if(|blocked| blocked.retry_at <= Instant::now()) {
            Some(blocked) => Some(blocked.action),
            None => match &self.blocked {
                Some(blocked) => return Err(blocked.error.clone()),
                None => self.core.poll_action(),
            },
        };
        while let Some(action) = next {
            if let Err(error) = self.perform(&action) {
                if !was_blocked {
                    tracing::error!("{error}; nothing new starts until it can be written");
                }
                let retry_at = Instant::now() + STORE_RETRY;
                self.blocked = Some(Blocked { action, error: error.clone(), retry_at });
                return Err(error);
            }
            next = self.core.poll_action();
        }
        if was_blocked {
            tracing::info!("the store can be written again");
        }
        self.deferred.drain(..).for_each(|answer| answer());
        Ok(())
    }

    /// What keeps this coordinator from writing things down, if something does.
    pub(super) fn unwritable(&self) -> Option<String> {
        let error = &self.blocked.as_ref()?.error;
        Some(format!("{error}; what runs goes on, and nothing new starts until it can be written"))
    }

    fn perform(&mut self, action: &Action) -> Result<(), String> {
        match action {
            Action::PersistJob(record) => {
                self.store.put_job(record).map_err(|e| e.to_string())?;
                let created = self.dir.job(record.id).create(&record.toml);
                self.note_written(created);
            }
            Action::PersistWorker(record) => self.store.put_worker(record).map_err(|e| e.to_string())?,
            Action::Send { worker, session, message } => {
                if let ToWorker::Start(assignment) = message {
                    self.audits.start(assignment).map_err(|e| e.to_string())?;
                }
                if let Some(session) = self.sessions.get(worker).filter(|s| s.number == *session) {
                    // A session that has just broken is noticed by its own task.
                    let _ = session.outbox.send(message.clone());
                }
            }
            Action::FindCheckpoint { job, generation } => self.find_checkpoint(*job, *generation),
            Action::Log { job, line } => self.log(*job, line),
        }
        Ok(())
    }

    /// Checks the job's checkpoints on a thread of its own: they may be large.
    fn find_checkpoint(&self, job: JobId, generation: Generation) {
        let (dir, handle) = (self.dir.job(job), self.handle.clone());
        let (failed, turn) = (self.handle.clone(), self.assemblies.turn(job));
        let find = move || {
            let _turn = turn.lock();
            let found = dir.checkpoint_store().and_then(|store| store.latest_good());
            handle.post(move |hub| {
                let found = found.map_err(|e| format!("its checkpoints cannot be read: {e}")).map(|latest| {
                    for refused in &latest.refused {
                        hub.log(job, &format!("warning: {refused}"));
                    }
                    latest.good.map(|manifest| manifest.info.step)
                });
                let now_ms = hub.now_ms();
                hub.core.handle_checkpoint_found(job, generation, found, now_ms);
            });
        };
        if let Err(e) = std::thread::Builder::new().name("checkpoints".to_owned()).spawn(find) {
            let error = format!("no thread to look for its checkpoints: {e}");
            failed.post(move |hub| {
                let now_ms = hub.now_ms();
                hub.core.handle_checkpoint_found(job, generation, Err(error), now_ms);
            });
        }
    }

    /// Adds a line to a job's log and to the coordinator's own.
    pub(crate) fn log(&mut self, job: JobId, line: &str) {
        tracing::info!("{job}: {line}");
        let written = self.dir.job(job).append_log(line);
        self.note_written(written);
    }

    /// Tells of failures to write to jobs' folders, but not of all: on a full disk there are many in a second.
    fn note_written(&mut self, written: Result<(), FileError>) {
        if let Err(e) = written
            && self.told_of_files.is_none_or(|at| at.elapsed() >= FILES_TOLD_EVERY)
        {
            tracing::error!("{e}; until then logs and metrics of jobs have gaps, and audits wait");
            self.told_of_files = Some(Instant::now());
        }
    }

    /// A job's checkpoint is on the disk.
    pub(super) fn checkpoint_stored(&mut self, job: JobId, step: u64) {
        self.core.handle_checkpoint_stored(job, step);
        self.metrics.checkpoints_unstored(job, 0);
        if let Some(line) = self.unstored.stored(job, step) {
            self.log(job, &line);
        }
    }

    /// A job's checkpoint could not be stored; the job goes on without it.
    pub(super) fn checkpoint_failed(&mut self, job: JobId, step: u64, error: &str) {
        if let Some(line) = self.unstored.failed(job, step, error) {
            self.log(job, &line);
        }
        self.metrics.checkpoints_unstored(job, self.unstored.row(job).map_or(0, |row| row.checkpoints));
    }

    /// The time as the core counts it.
    pub(crate) fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// Opens a session of a worker; an earlier one of the same worker gets nothing any more.
    pub(crate) fn open_session(
        &mut self,
        worker: WorkerId,
        register: Register,
    ) -> Result<(u64, mpsc::UnboundedReceiver<ToWorker>), CommandError> {
        self.last_session += 1;
        let (outbox, messages) = mpsc::unbounded_channel();
        self.core.handle_connected(worker, self.last_session, register, self.now_ms())?;
        self.reports.entry(worker).or_default().session_begins();
        self.sessions.insert(worker, Session { number: self.last_session, outbox });
        Ok((self.last_session, messages))
    }

    /// A worker's session has ended, maybe because its process has.
    pub(crate) fn close_session(&mut self, worker: WorkerId, number: u64, process_ended: bool) {
        if self.sessions.get(&worker).is_some_and(|s| s.number == number) {
            self.sessions.remove(&worker);
        }
        self.core.handle_disconnected(worker, number, process_ended, self.now_ms());
    }

    /// A worker's process listens at `port`, and its host would say so if it did not.
    pub(super) fn note_port(&mut self, worker: WorkerId, number: u64, port: Option<SocketAddr>) {
        self.core.handle_listening(worker, number, port);
    }

    /// See [`Core::absent`].
    pub(super) fn absent(&self) -> Vec<(WorkerId, SocketAddr)> {
        self.core.absent()
    }

    /// Nobody holds the port any more at which an absent worker listened.
    pub(super) fn port_closed(&mut self, worker: WorkerId, port: SocketAddr) {
        self.core.handle_port_closed(worker, port, self.now_ms());
    }

    /// Notes committed steps, without those that were told before: a worker repeats what it was not heard to say.
    fn note_steps(&mut self, job: JobId, records: &[StepRecord]) -> Result<(), FileError> {
        let new = self.audits.take(job, records)?;
        self.metrics.stepped(job, new);
        self.dir.job(job).append_steps(new)
    }

    /// Says to `heard` that one more report was taken care of, as soon as the audits say so.
    pub(crate) fn acknowledge(&mut self, heard: mpsc::UnboundedSender<u64>) {
        self.audits.acknowledge(heard);
    }

    /// Brings the audit of a job to the disk, before something that must not go beyond it.
    pub(crate) fn sync_audit(&mut self, job: JobId) -> Result<(), FileError> {
        self.audits.sync(job)
    }

    /// A worker has said something that is never repeated and need not be kept.
    pub(crate) fn hear_news(&mut self, worker: WorkerId, message: FromWorker) {
        let now_ms = self.now_ms();
        self.core.handle_message(worker, message, now_ms);
    }

    /// A worker has said something.
    pub(crate) fn hear(&mut self, worker: WorkerId, message: FromWorker) {
        let now_ms = self.now_ms();
        let repeated = self.reports.entry(worker).or_default().is_repeated(&message);
        if self.core.handle_message(worker, message.clone(), now_ms) == Reception::Stale || repeated {
            return;
        }
        let written = match &message {
            FromWorker::Steps { job, records, .. } => self.note_steps(*job, records),
            FromWorker::Metrics { job, generation, step, epoch, values } => {
                self.dir.job(*job).append_values(*generation, *step, *epoch, values)
            }
            FromWorker::Log { job, line, .. } => {
                self.log(*job, &format!("{worker}: {line}"));
                Ok(())
            }
            FromWorker::Ended { .. }
            | FromWorker::Leaving
            | FromWorker::Flight { .. }
            | FromWorker::Pace { .. }
            | FromWorker::Following { .. } => Ok(()),
        };
        self.note_written(written);
    }
}
