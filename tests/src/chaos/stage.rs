//! The coordinator and the workers of a chaos run, and what the schedule does to them.
//!
//! Like an operator's service manager the stage starts a program again that has ended by itself; what ended so is
//! kept for the verdict.

use crate::chaos::actors::Actor;
use crate::chaos::disk::SmallDisk;
use crate::chaos::schedule::{Deed, Fault, HOSTS, Kind, SEATS, WORKERS};
use crate::chaos::verdict::was_killed;
use crate::hosts::{FIRST, Hosts, Way};
use crate::place::Place;
use crate::process::{Ended, Process, command};
use crate::wait::{until, within};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

/// In the environment of every process of a run, so that each can be found again.
pub const MARK: &str = "LOCKSTEP_CHAOS_RUN";

/// Before a program that has ended by itself is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(500);

/// How long a command of the operator may take.
const COMMAND_TIME: Duration = Duration::from_secs(20);

/// Everything that runs.
pub struct Stage {
    // Programs before what they use, for the order of dropping.
    /// The coordinator.
    pub coordinator: Actor,
    coordinator_back: Option<Duration>,
    seats: [Option<Worker>; SEATS],
    past: Vec<Actor>,
    disk: Option<SmallDisk>,
    /// The hosts, if there are several.
    pub hosts: Option<Hosts>,
    /// The coordinator's data directory.
    pub place: Place,
    /// The value of [`MARK`].
    pub mark: String,
    listen: String,
    token: String,
    joined: usize,
    due: Vec<(Duration, Undo)>,
    /// What has happened.
    pub history: History,
}

/// What has happened to programs.
#[derive(Default)]
pub struct History {
    /// Workers that died without a word.
    pub deaths: Vec<Death>,
    /// Processes that ended by themselves.
    pub exits: Vec<Exit>,
    /// Faults that struck: when, and which.
    pub struck: Vec<(Duration, Fault)>,
    /// Workers that were killed and never came back.
    pub lost: Vec<String>,
    /// When the coordinator was killed and when it was started again.
    pub restarts: Vec<(Duration, Duration)>,
}

/// A worker that died without a word.
#[derive(Clone, Debug)]
pub struct Death {
    /// When.
    pub at: Duration,
    /// The worker's name.
    pub worker: String,
}

/// A process that ended by itself.
#[derive(Clone, Debug)]
pub struct Exit {
    /// When.
    pub at: Duration,
    /// The program's name.
    pub who: String,
    /// How.
    pub status: ExitStatus,
    /// Whether it had been told to.
    pub asked: bool,
    /// How long it had run.
    pub ran: Duration,
    /// Its last line.
    pub line: String,
}

struct Worker {
    actor: Actor,
    mood: Mood,
    armed: Option<Fault>,
}

/// What is wanted of a worker.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Running,
    /// It is down until then.
    Away(Duration),
    /// It has been told to leave, and comes back not before then, if it does.
    Leaving(Option<Duration>),
}

enum Undo {
    ContinueWorker(String),
    ContinueCoordinator,
    FreeDisk,
    Heal(usize, Way),
}

impl Stage {
    /// Starts the coordinator and the first workers; over several hosts and with a disk of its own for checkpoints
    /// where that is allowed.
    pub fn open(place: Place, hosts: bool, now: Duration) -> Self {
        let logs = place.file("logs");
        for folder in [&logs, &place.file("tmp")] {
            fs::create_dir_all(folder).expect("a folder of the run");
        }
        let hosts = hosts.then(|| Hosts::new(1 + HOSTS)).flatten();
        let address = if hosts.is_some() { FIRST } else { "127.0.0.1" };
        let mark = place.file("").display().to_string();
        let mut stage = Self {
            coordinator: Actor::new("coordinator".to_owned(), &logs),
            coordinator_back: None,
            seats: Default::default(),
            past: Vec::new(),
            disk: SmallDisk::mount(&place.file("disk")),
            hosts,
            place,
            mark,
            listen: format!("{address}:0"),
            token: String::new(),
            joined: 0,
            due: Vec::new(),
            history: History::default(),
        };
        stage.start_coordinator(now);
        let serving = || stage.ask(&["jobs", "--json"]).filter(|ended| ended.status.success());
        until("the coordinator to serve", serving);
        let endpoint = fs::read_to_string(stage.place.dir().join("endpoint.json")).expect("endpoint.json");
        let endpoint: Value = serde_json::from_str(&endpoint).expect("endpoint.json is JSON");
        stage.listen = endpoint["coordinator"].as_str().expect("the coordinator's address").to_owned();
        let token = stage.ask(&["token", "new", "--uses", "100000", "--ttl", "2d"]).expect("a token").ok();
        stage.token = token.stdout.trim().to_owned();
        (0..WORKERS).for_each(|seat| stage.seat(seat, now));
        let idle = || Some(stage.ask(&["workers", "--json"])?.stdout.matches("\"idle\"").count());
        until("the workers to join", || (idle()? == WORKERS).then_some(()));
        stage
    }

    /// Whether checkpoints have a disk of their own.
    pub fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Whether the coordinator can answer, as far as the schedule goes.
    pub fn is_served(&self) -> bool {
        self.coordinator.is_running() && !self.coordinator.is_stopped()
    }

    /// Whether everything that has been disturbed is as it was before, and every worker there that is to be.
    pub fn is_quiet(&self) -> bool {
        let quiet = |w: &Worker| w.actor.is_running() && w.mood == Mood::Running;
        self.due.is_empty() && self.is_served() && self.seats.iter().flatten().all(quiet)
    }

    /// All programs that ever ran.
    pub fn programs(&self) -> impl Iterator<Item = &Actor> {
        let seated = self.seats.iter().flatten().map(|worker| &worker.actor);
        [&self.coordinator].into_iter().chain(self.past.iter()).chain(seated)
    }

    /// The command `coordinator ARGS` as the operator types it on the coordinator's host.
    pub fn operator(&self, args: &[&str]) -> Command {
        let mut command = self.place.command();
        command.args(args);
        self.on_host(None, command)
    }

    /// Runs an operator's command; `None` if it does not end.
    pub fn ask(&self, args: &[&str]) -> Option<Ended> {
        Process::start(self.operator(args)).wait_for(COMMAND_TIME)
    }

    /// Gives job `id`, before it is submitted, the small disk for its checkpoints.
    pub fn prepare(&self, id: &str) {
        let Some(disk) = &self.disk else { return };
        let folder = self.place.job_dir(id);
        fs::create_dir_all(&folder).expect("the job's folder");
        let link = folder.join("checkpoints");
        if !link.exists() {
            std::os::unix::fs::symlink(disk.folder(id), link).expect("a link to the small disk");
        }
    }

    fn on_host(&self, host: Option<usize>, mut command: Command) -> Command {
        command.env(MARK, &self.mark).env("TMPDIR", self.place.file("tmp")).env("NO_COLOR", "1");
        match &self.hosts {
            // The first host is the coordinator's.
            Some(hosts) => hosts.on(host.map_or(1, |host| 2 + host), &command),
            None => command,
        }
    }

    fn start_coordinator(&mut self, now: Duration) {
        let command = self.operator(&["serve", "--listen", &self.listen, "--http", "127.0.0.1:0"]);
        self.coordinator.start(command, now);
    }

    /// Starts a worker that has not been there before on an empty seat.
    fn seat(&mut self, seat: usize, now: Duration) {
        self.joined += 1;
        let actor = Actor::new(format!("worker-{}", self.joined), &self.place.file("logs"));
        self.seats[seat] = Some(Worker { actor, mood: Mood::Running, armed: None });
        self.start_worker(seat, None, now);
    }

    /// Starts the process of a seat's worker, with a fault armed for a step of the job.
    fn start_worker(&mut self, seat: usize, fault: Option<(Fault, u64)>, now: Duration) {
        let Some(worker) = &self.seats[seat] else { return };
        let mut join = command("worker");
        let ip = if self.hosts.is_some() { "0.0.0.0" } else { "127.0.0.1" };
        join.args(["join", "--coordinator", &self.listen, "--threads", "1", "--metrics", "127.0.0.1:0"]);
        join.args(["--listen", &format!("{ip}:0"), "--data-dir"]).arg(self.folder(worker.actor.name()));
        join.env("LOCKSTEP_TOKEN", &self.token);
        if let Some((fault, furthest)) = fault {
            join.env("LOCKSTEP_FAULTS", fault.armed(furthest));
        }
        let join = self.on_host(Some(seat % HOSTS), join);
        let Some(worker) = &mut self.seats[seat] else { return };
        worker.actor.start(join, now);
        worker.mood = Mood::Running;
        worker.armed = fault.map(|(fault, _)| fault);
    }

    /// All workers that ever joined.
    pub fn workers(&self) -> impl Iterator<Item = String> {
        (1..=self.joined).map(|number| format!("worker-{number}"))
    }

    /// The data directory of a worker.
    pub fn folder(&self, worker: &str) -> PathBuf {
        self.place.file(worker)
    }

    /// Who sits there.
    pub fn seated(&self, seat: usize) -> Option<String> {
        self.seats[seat].as_ref().map(|worker| worker.actor.name().to_owned())
    }

    /// Makes an event happen; `furthest` is the furthest step of the running job that is known. Returns the reason if
    /// it could not.
    pub fn perform(&mut self, kind: &Kind, furthest: u64, now: Duration) -> Result<(), &'static str> {
        match *kind {
            Kind::Kill { seat, fault: Some(fault), .. } => {
                self.kill_worker(seat, now)?;
                self.start_worker(seat, Some((fault, furthest)), now);
            }
            Kind::Kill { seat, away, fault: None } => {
                self.kill_worker(seat, now)?.mood = Mood::Away(now + away);
            }
            Kind::Replace { seat } => {
                self.kill_worker(seat, now)?;
                if let Some(Worker { actor, .. }) = self.seats[seat].take() {
                    self.history.lost.push(actor.name().to_owned());
                    self.past.push(actor);
                }
                self.seat(seat, now);
            }
            Kind::Stop { seat, still } => {
                let worker = self.running(seat)?;
                worker.actor.signal(libc::SIGSTOP);
                let name = worker.actor.name().to_owned();
                self.due.push((now + still, Undo::ContinueWorker(name)));
            }
            Kind::Leave { seat, away } => {
                let worker = self.running(seat)?;
                worker.actor.signal(libc::SIGTERM);
                worker.mood = Mood::Leaving(away.map(|away| now + away));
            }
            Kind::Join { seat } if self.seats[seat].is_none() => self.seat(seat, now),
            Kind::Join { .. } => return Err("the seat is still taken"),
            Kind::KillCoordinator { away } => {
                if !self.coordinator.is_running() {
                    return Err("it is not running");
                }
                self.kill_coordinator(now, away);
            }
            Kind::StopCoordinator { still } => {
                if !self.is_served() {
                    return Err("it is not running");
                }
                self.coordinator.signal(libc::SIGSTOP);
                self.due.push((now + still, Undo::ContinueCoordinator));
            }
            Kind::KillWorkers { away } => self.kill_workers(now, away),
            Kind::PowerCut { away } => {
                self.kill_coordinator(now, away);
                self.kill_workers(now, away);
            }
            Kind::DiskFull { lasts } => {
                self.disk.as_ref().ok_or("a disk of its own needs root")?.fill();
                self.due.push((now + lasts, Undo::FreeDisk));
            }
            Kind::Cut { host, way, lasts } => {
                let hosts = self.hosts.as_ref().ok_or("several hosts need root and iproute2")?;
                if !hosts.cut(2 + host, way) {
                    return Err("nft is missing");
                }
                self.due.push((now + lasts, Undo::Heal(host, way)));
            }
        }
        Ok(())
    }

    fn running(&mut self, seat: usize) -> Result<&mut Worker, &'static str> {
        let running = |worker: &&mut Worker| worker.actor.is_running() && worker.mood == Mood::Running;
        self.seats[seat].as_mut().filter(running).ok_or("no worker runs there")
    }

    fn kill_worker(&mut self, seat: usize, now: Duration) -> Result<&mut Worker, &'static str> {
        let worker = self.running(seat)?;
        worker.actor.strike();
        worker.actor.reap();
        let name = worker.actor.name().to_owned();
        self.history.deaths.push(Death { at: now, worker: name });
        self.seats[seat].as_mut().ok_or("no worker runs there")
    }

    fn kill_workers(&mut self, now: Duration, away: Duration) {
        let mut workers: Vec<_> = self.seats.iter_mut().flatten().collect();
        workers.retain(|worker| worker.actor.is_running() && worker.mood == Mood::Running);
        workers.iter_mut().for_each(|worker| worker.actor.strike());
        for worker in workers {
            worker.actor.reap();
            worker.mood = Mood::Away(now + away);
            self.history.deaths.push(Death { at: now, worker: worker.actor.name().to_owned() });
        }
    }

    fn kill_coordinator(&mut self, now: Duration, away: Duration) {
        if self.coordinator.is_running() {
            self.coordinator.strike();
            self.coordinator.reap();
            self.coordinator_back = Some(now + away);
            self.history.restarts.push((now, now + away));
        }
    }

    /// Undoes what is due, and sees to programs that have ended or have been struck.
    pub fn tend(&mut self, now: Duration) {
        let (due, later) = std::mem::take(&mut self.due).into_iter().partition(|(at, _)| *at <= now);
        self.due = later;
        due.into_iter().for_each(|(_, undo): (_, Undo)| self.undo(undo));
        if self.coordinator_back.is_some_and(|at| at <= now) {
            self.coordinator_back = None;
            if let Some(restart) = self.history.restarts.last_mut() {
                restart.1 = now;
            }
            self.start_coordinator(now);
        }
        if let Some(status) = self.coordinator.ended() {
            let exit = exit(&self.coordinator, status, false, now);
            self.history.exits.push(exit);
            self.coordinator_back = Some(now + RESTART_PAUSE);
        }
        (0..SEATS).for_each(|seat| self.tend_worker(seat, now));
    }

    fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::ContinueWorker(name) => {
                let mut seated = self.seats.iter().flatten();
                if let Some(worker) = seated.find(|worker| worker.actor.name() == name) {
                    worker.actor.signal(libc::SIGCONT);
                }
            }
            Undo::ContinueCoordinator => self.coordinator.signal(libc::SIGCONT),
            Undo::FreeDisk => self.disk.iter().for_each(SmallDisk::free),
            Undo::Heal(host, way) => {
                let healed = self.hosts.as_ref().is_some_and(|hosts| hosts.heal(2 + host, way));
                assert!(healed, "host {host}'s network cannot be healed");
            }
        }
    }

    fn tend_worker(&mut self, seat: usize, now: Duration) {
        let Some(worker) = &mut self.seats[seat] else { return };
        let name = worker.actor.name().to_owned();
        if let Some(fault) =
            worker.armed.filter(|fault| fault.deed == Deed::Stop && worker.actor.is_stopped())
        {
            worker.armed = None;
            self.history.struck.push((now, fault));
            self.due.push((now + fault.still(), Undo::ContinueWorker(name.clone())));
        }
        let ended = worker.actor.ended();
        let struck = worker.armed.filter(|fault| fault.deed == Deed::Kill && ended.is_some_and(was_killed));
        match (worker.mood, ended) {
            (Mood::Running, Some(_)) if struck.is_some() => {
                worker.mood = Mood::Away(now + RESTART_PAUSE);
                self.history.struck.extend(struck.map(|fault| (now, fault)));
                self.history.deaths.push(Death { at: now, worker: name });
            }
            (Mood::Running, Some(status)) => {
                worker.mood = Mood::Away(now + RESTART_PAUSE);
                self.history.exits.push(exit(&worker.actor, status, false, now));
            }
            (Mood::Leaving(back), Some(status)) => {
                // A fault may strike on the way out.
                match struck {
                    Some(fault) => {
                        self.history.struck.push((now, fault));
                        self.history.deaths.push(Death { at: now, worker: name });
                    }
                    None => self.history.exits.push(exit(&worker.actor, status, true, now)),
                }
                match back {
                    Some(back) => worker.mood = Mood::Away(back.max(now)),
                    None => self.past.extend(self.seats[seat].take().map(|worker| worker.actor)),
                }
            }
            (Mood::Away(until), _) if until <= now => self.start_worker(seat, None, now),
            _ => {}
        }
    }

    /// Ends everything in good order; returns how that went, by name.
    pub fn close(&mut self, limit: Duration) -> Vec<(String, Option<ExitStatus>)> {
        let mut ends = Vec::new();
        let workers = self.seats.iter_mut().flatten();
        // A second signal would end at once those who are on their way out.
        let mut workers: Vec<_> =
            workers.map(|w| (!matches!(w.mood, Mood::Leaving(_)), &mut w.actor)).collect();
        for actors in [&mut workers[..], &mut [(true, &mut self.coordinator)]] {
            let untold = actors.iter().filter(|(is_untold, _)| *is_untold);
            untold.for_each(|(_, actor)| actor.signal(libc::SIGTERM));
            for (_, actor) in actors {
                let end = within(limit, || actor.ended());
                ends.push((actor.name().to_owned(), end));
            }
        }
        ends
    }
}

impl Fault {
    /// As the worker's environment has it, whatever rank it is given. Not every step has a checkpoint, a heal or a copy:
    /// there it is the first one.
    fn armed(&self, furthest: u64) -> String {
        let verb = match self.deed {
            Deed::Kill => "kill",
            Deed::Stop => "stop",
            Deed::Flip => "flip",
        };
        match self.point {
            "checkpoint" | "heal" | "copy" => format!("{verb}:phase={}", self.point),
            point => format!("{verb}:step={},phase={point}", furthest + self.steps_ahead),
        }
    }

    /// How long a worker that has stopped itself stands still.
    pub(super) fn still(&self) -> Duration {
        Duration::from_millis(100 * self.steps_ahead)
    }
}

fn exit(actor: &Actor, status: ExitStatus, asked: bool, at: Duration) -> Exit {
    let line = actor.said().lines().next_back().unwrap_or_default().to_owned();
    let ran = at.saturating_sub(actor.started());
    Exit { at, who: actor.name().to_owned(), status, asked, ran, line }
}
