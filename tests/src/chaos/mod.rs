//! Chaos on real processes: programs are killed, stopped and cut off in the midst of jobs, and the jobs must end as if
//! nothing had happened.
//!
//! [`schedule`] draws from a seed what happens when; [`stage`] has the processes and does it to them; [`watch`] looks
//! on. Jobs of a [`workload`] follow one another for as long as there are events. At the end [`verdict`] compares
//! every job with its undisturbed run and looks for what was left behind, and [`figures`] tells how long recoveries
//! took. Everything is seen from outside: command lines, their JSON, files, signals.

pub mod account;
pub mod actors;
pub mod disk;
pub mod figures;
pub mod schedule;
pub mod stage;
pub mod verdict;
pub mod watch;
pub mod workload;

use crate::process::Process;
use account::Account;
use schedule::{Event, Extent, Kind};
use stage::Stage;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};
use verdict::Leftovers;
use watch::{Seen, Watch};
use workload::{Task, Workload};

/// Between two looks at everything.
const TICK: Duration = Duration::from_millis(10);

/// A job that gets no further for so long, and twice as long as a whole undisturbed run takes on this machine, is stuck.
const STUCK: Duration = Duration::from_secs(120);

/// After the last event and the last job, how long it may take until every program is where it is to be.
const SETTLING: Duration = Duration::from_secs(60);

/// How long a program may take to leave in good order.
const LEAVING: Duration = Duration::from_secs(30);

/// What is wanted of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Of the schedule.
    pub seed: u64,
    /// How many events, or for how long.
    pub extent: Extent,
    /// The mean time between events.
    pub mean: Duration,
    /// What is trained meanwhile.
    pub workload: Workload,
    /// Whether to spread the workers over several hosts, where that is allowed.
    pub hosts: bool,
}

/// An event that has been tried.
#[derive(Clone, Debug)]
pub struct Happened {
    /// The event.
    pub event: Event,
    /// When it was really tried, from the run's beginning.
    pub at: Duration,
    /// The one worker that it concerned.
    pub worker: Option<String>,
    /// Why it could not be done.
    pub skipped: Option<&'static str>,
}

/// A job under chaos.
pub struct Trial {
    /// Its id.
    pub id: String,
    /// What it trained.
    pub task: Task,
    /// When it was submitted.
    pub submitted: Duration,
    /// When that was seen to be over.
    pub ended: Duration,
    /// How it ended.
    pub end: End,
    /// What was seen of it.
    pub seen: Seen,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was done to its last step.
    Finished,
    /// It was done, but found no room for its last checkpoint, and said so: that is a job's own failure.
    NoRoom,
    /// Otherwise, or not at all.
    Unfinished,
}

impl End {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::NoRoom => "found no room for its last checkpoint",
            Self::Unfinished => "did not finish",
        }
    }
}

/// Runs the schedule to its end and the jobs to theirs. `tell` is told in a line of what goes on.
pub fn run(options: &Options, tell: &dyn Fn(&str)) -> Account {
    let Options { seed, extent, mean, workload, .. } = *options;
    let undisturbed: BTreeMap<_, _> =
        [Task::Classify, Task::Gan].map(|task| (task, workload.undisturbed(task))).into();
    tell("the undisturbed runs are done");
    let before = Leftovers::of_this_host();
    let clock = Instant::now();
    let stage = Stage::open(workload.place(), options.hosts, clock.elapsed());
    let events = schedule::draw(seed, extent, mean, workload.timeout());
    let mut drive = Drive {
        clock,
        workload,
        stage,
        todo: events.into(),
        began: None,
        happened: Vec::new(),
        trials: Vec::new(),
        failures: Vec::new(),
        job: Job::None,
        task: Task::Classify,
        patience: undisturbed.values().map(|run| 2 * run.took).max().unwrap_or_default().max(STUCK),
    };
    while drive.step(tell) {
        std::thread::sleep(TICK);
    }
    let Drive { mut stage, happened, trials, mut failures, .. } = drive;
    for trial in &trials {
        failures.extend(verdict::of_trial(trial, &undisturbed[&trial.task]));
    }
    let spread = stage.hosts.is_some();
    let small_disk = stage.has_disk();
    let audited = verdict::audit(&trials, &stage, &mut failures);
    failures.extend(verdict::of_ends(stage.close(LEAVING)));
    failures.extend(verdict::of_exits(&stage.history.exits));
    failures.extend(verdict::of_programs(&stage));
    failures.extend(verdict::of_leftovers(&stage, &before));
    let figures = figures::measure(&trials, &happened, &stage, workload.timeout());
    Account {
        options: options.clone(),
        took: clock.elapsed(),
        spread,
        small_disk,
        audited,
        began: drive.began.unwrap_or_default(),
        happened,
        trials,
        failures,
        figures,
        stage,
    }
}

/// The job of the moment.
enum Job {
    /// None: the next one may be submitted.
    None,
    /// One is being submitted, or asked for because its submission may or may not have succeeded.
    Submitting { process: Process, asked: bool },
    /// One is there.
    Watched { id: String, submitted: Duration, watch: Box<Watch> },
}

struct Drive {
    clock: Instant,
    workload: Workload,
    stage: Stage,
    todo: VecDeque<Event>,
    /// The first committed step.
    began: Option<Duration>,
    happened: Vec<Happened>,
    trials: Vec<Trial>,
    failures: Vec<String>,
    job: Job,
    task: Task,
    /// A job that gets no further for so long is stuck.
    patience: Duration,
}

impl Drive {
    /// Looks at everything once; whether there is more to do.
    fn step(&mut self, tell: &dyn Fn(&str)) -> bool {
        let now = self.clock.elapsed();
        self.stage.tend(now);
        while let Some(event) = self.due(now) {
            self.perform(event, now);
        }
        match std::mem::replace(&mut self.job, Job::None) {
            Job::None => return self.begin(now),
            Job::Submitting { process, asked } => self.submitted(process, asked, now),
            Job::Watched { id, submitted, watch } => self.look(id, submitted, watch, now, tell),
        }
        self.failures.is_empty()
    }

    /// The next event, if its time has come.
    fn due(&mut self, now: Duration) -> Option<Event> {
        let at = self.began? + self.todo.front()?.at;
        (at <= now).then(|| self.todo.pop_front()).flatten()
    }

    fn perform(&mut self, event: Event, now: Duration) {
        let furthest = match &self.job {
            Job::Watched { watch, .. } => watch.furthest(),
            _ => 0,
        };
        let seated = event.kind.seat().and_then(|seat| self.stage.seated(seat));
        let skipped = self.stage.perform(&event.kind, furthest, now).err();
        let worker = match event.kind {
            Kind::Join { seat } => self.stage.seated(seat),
            _ => seated,
        };
        self.happened.push(Happened { event, at: now, worker, skipped });
    }

    /// The next job, if there are events left for it or not each task has had one; whether there is more to do.
    fn begin(&mut self, now: Duration) -> bool {
        if self.todo.is_empty() && self.trials.len() >= 2 {
            let settled = self.trials.last().is_some_and(|last| now > last.ended + SETTLING);
            return !self.stage.is_quiet() && !settled;
        }
        if self.stage.is_served() {
            let id = self.next_id();
            self.stage.prepare(&id);
            let job = self.stage.place.job_file(self.workload.job(self.task));
            let submit = self.stage.operator(&["submit", &job.to_string_lossy(), "--json"]);
            self.job = Job::Submitting { process: Process::start(submit), asked: false };
        }
        true
    }

    fn next_id(&self) -> String {
        format!("j{}", self.trials.len() + 1)
    }

    fn submitted(&mut self, mut process: Process, asked: bool, now: Duration) {
        let id = self.next_id();
        match process.status() {
            None => self.job = Job::Submitting { process, asked },
            Some(status) if status.success() => {
                let watch = Box::new(Watch::new(self.stage.place.job_dir(&id).join("metrics.jsonl"), now));
                self.job = Job::Watched { id, submitted: now, watch };
            }
            // The coordinator may have died between the submission and its answer.
            Some(_) if !asked => {
                let process = Process::start(self.stage.operator(&["status", &id, "--json"]));
                self.job = Job::Submitting { process, asked: true };
            }
            Some(_) => {}
        }
    }

    fn look(
        &mut self,
        id: String,
        submitted: Duration,
        mut watch: Box<Watch>,
        now: Duration,
        tell: &dyn Fn(&str),
    ) {
        watch.read(now);
        if self.stage.is_served() {
            let restarted =
                self.stage.history.restarts.last().map_or(Duration::ZERO, |(_, started)| *started);
            watch.ask(now, restarted, || self.stage.operator(&["status", &id, "--json"]));
        }
        if watch.furthest() > 0 {
            self.began.get_or_insert(now);
        }
        let report = watch.seen.report.as_ref();
        let (state, reason) = report.map_or(("", ""), |report| (&report.state, &report.reason));
        let end = match state {
            "finished" => End::Finished,
            "failed" if reason.contains("No space left on device") => End::NoRoom,
            "failed" | "cancelled" | "paused" => {
                self.failures.push(format!("{id} is {state}: {reason}"));
                End::Unfinished
            }
            _ if now > watch.progressed() + self.patience => {
                let (step, seconds) = (watch.furthest(), self.patience.as_secs());
                self.failures.push(format!("{id} is {state}, and {seconds} s without a step beyond {step}"));
                End::Unfinished
            }
            _ => {
                self.job = Job::Watched { id, submitted, watch };
                return;
            }
        };
        watch.read(now);
        let (task, seen) = (self.task, std::mem::take(&mut watch.seen));
        let generations = seen.report.as_ref().map_or(0, |report| report.generation);
        let events = self.happened.iter().filter(|h| h.at >= submitted && h.skipped.is_none()).count();
        let seconds = (now - submitted).as_secs_f64();
        let (at, words) = (now.as_secs_f64(), end.words());
        tell(&format!(
            "{at:6.1} s: {id} {words} after {seconds:.1} s, {generations} generations, {events} events"
        ));
        if end != End::Unfinished {
            self.failures.extend(verdict::of_checkpoints(&id, &self.stage));
        }
        self.trials.push(Trial { id, task, submitted, ended: now, end, seen });
        self.task = self.task.next();
    }
}
