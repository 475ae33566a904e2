//! Random events against workers that behave as real ones do, and what must hold whatever happens.

use crate::world::{World, finished, job, stopped};
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{FromWorker, JobState, Outcome, Running, StopMode, ToWorker};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const WORKERS: u64 = 4;

#[derive(Clone, Debug)]
enum Event {
    Submit { min: u32, max: u32 },
    Cancel(u64),
    Pause(u64),
    Resume(u64),
    Connect(u64),
    Cut(u64),
    Kill(u64),
    Leave(u64),
    Step(u64),
    Finish(u64),
    Lose(u64),
    Fail(u64),
    Deliver,
    Obey(u64),
    Find,
    Pass(u64),
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    let worker = || 1..=WORKERS;
    let job = || 1..5u64;
    prop_oneof![
        3 => (1..=4u32, 0..3u32).prop_map(|(min, more)| Event::Submit { min, max: min + more }),
        1 => job().prop_map(Event::Cancel),
        1 => job().prop_map(Event::Pause),
        2 => job().prop_map(Event::Resume),
        8 => worker().prop_map(Event::Connect),
        4 => worker().prop_map(Event::Cut),
        2 => worker().prop_map(Event::Kill),
        1 => worker().prop_map(Event::Leave),
        4 => worker().prop_map(Event::Step),
        4 => worker().prop_map(Event::Finish),
        3 => worker().prop_map(Event::Lose),
        1 => worker().prop_map(Event::Fail),
        8 => Just(Event::Deliver),
        8 => worker().prop_map(Event::Obey),
        6 => Just(Event::Find),
        3 => (1..30_000u64).prop_map(Event::Pass),
        1 => Just(Event::Restart),
    ]
}

/// What a worker process knows.
#[derive(Default)]
struct Process {
    connected: bool,
    running: Option<Running>,
    told_to_stop: bool,
    outbox: Vec<FromWorker>,
}

struct Cluster {
    world: World,
    processes: BTreeMap<u64, Process>,
    generations: BTreeMap<JobId, Generation>,
    started: BTreeSet<(JobId, Generation, u32)>,
    ended: BTreeMap<JobId, JobState>,
}

impl Cluster {
    fn new() -> Self {
        let mut world = World::new();
        world.enroll(WORKERS);
        Self {
            world,
            processes: (1..=WORKERS).map(|w| (w, Process::default())).collect(),
            generations: BTreeMap::new(),
            started: BTreeSet::new(),
            ended: BTreeMap::new(),
        }
    }

    fn process(&mut self, worker: u64) -> &mut Process {
        self.processes.get_mut(&worker).unwrap()
    }

    fn apply(&mut self, event: &Event) {
        let now_ms = self.world.now_ms;
        match *event {
            Event::Submit { min, max } => self.world.submit(job(min, max)),
            // Refusals are answers too.
            Event::Cancel(job) => drop(self.world.core.cancel(JobId(job), now_ms)),
            Event::Pause(job) => drop(self.world.core.pause(JobId(job), now_ms)),
            Event::Resume(job) => {
                // Only one that has failed is resumed after its end.
                let failed = self.ended.get(&JobId(job)) == Some(&JobState::Failed);
                let resumed = self.world.core.resume(JobId(job), now_ms).is_ok();
                if resumed && self.ended.remove(&JobId(job)).is_some() {
                    assert!(failed, "j{job} was resumed after its end");
                }
            }
            Event::Connect(worker) => self.connect(worker),
            Event::Cut(worker) => self.cut(worker),
            Event::Kill(worker) => {
                self.cut(worker);
                *self.process(worker) = Process::default();
            }
            Event::Leave(worker) => self.say(worker, FromWorker::Leaving),
            Event::Step(worker) => self.step(worker),
            Event::Finish(worker) => self.end(worker, finished("same")),
            Event::Lose(worker) => {
                self.end(worker, Outcome::Lost { error: "peer".to_owned(), culprit: None })
            }
            Event::Fail(worker) => self.end(worker, Outcome::Failed { error: "bad".to_owned() }),
            Event::Deliver => self.deliver(),
            Event::Obey(worker) => self.obey(worker),
            Event::Find => self.world.find(Some(1)),
            Event::Pass(ms) => self.world.pass(ms),
            Event::Restart => {
                (1..=WORKERS).for_each(|worker| self.cut(worker));
                let world = std::mem::replace(&mut self.world, World::new());
                self.world = world.restart();
            }
        }
        self.world.pump();
    }

    fn connect(&mut self, worker: u64) {
        let process = self.process(worker);
        if process.connected {
            return;
        }
        process.connected = true;
        let running = process.running;
        let outbox = std::mem::take(&mut process.outbox);
        self.world.register(worker, running);
        outbox.into_iter().for_each(|message| self.world.say(worker, message));
    }

    fn cut(&mut self, worker: u64) {
        self.process(worker).connected = false;
        self.world.cut(worker);
    }

    fn say(&mut self, worker: u64, message: FromWorker) {
        let process = self.process(worker);
        if process.connected {
            self.world.say(worker, message);
        } else {
            process.outbox.push(message);
        }
    }

    fn step(&mut self, worker: u64) {
        let process = self.process(worker);
        let Some(running) = &mut process.running else { return };
        running.step += 1;
        let running = *running;
        if running.rank.0 == 0 && self.process(worker).connected {
            self.world.step(worker, running.job, running.generation.0, running.step);
        }
    }

    fn end(&mut self, worker: u64, outcome: Outcome) {
        let process = self.process(worker);
        process.told_to_stop = false;
        let Some(running) = process.running.take() else { return };
        self.say(
            worker,
            FromWorker::Ended { job: running.job, generation: running.generation, outcome, held: None },
        );
    }

    /// The step in progress is over: a worker that was told to stop does.
    fn obey(&mut self, worker: u64) {
        let process = self.process(worker);
        if let Some(running) = process.running.filter(|_| process.told_to_stop) {
            self.end(worker, stopped(running.step));
        }
    }

    fn deliver(&mut self) {
        for (WorkerId(worker), message) in self.world.inbox() {
            match message {
                ToWorker::Start(start) => {
                    let busy = self.process(worker).running;
                    assert!(
                        busy.is_none(),
                        "w{worker} starts {} {} in the middle of {busy:?}",
                        start.job,
                        start.generation
                    );
                    assert_eq!(start.placement.shards(), 8);
                    assert_eq!(start.placement.world_size() as usize, start.peers.len());
                    assert_eq!(start.peers[start.rank.index()].worker, WorkerId(worker));
                    let place = (start.job, start.generation, start.rank.0);
                    assert!(self.started.insert(place), "{place:?} started twice");
                    let running =
                        Running { job: start.job, generation: start.generation, rank: start.rank, step: 1 };
                    self.process(worker).running = Some(running);
                }
                ToWorker::Stop { job, generation, mode } => {
                    let running = self.process(worker).running;
                    if let Some(running) = running.filter(|r| (r.job, r.generation) == (job, generation)) {
                        if mode == StopMode::Checkpoint && running.rank.0 == 0 {
                            self.world.core.handle_checkpoint_stored(job, running.step);
                        }
                        self.process(worker).told_to_stop = true;
                    }
                }
                ToWorker::Follow(_) | ToWorker::Release { .. } => {}
                ToWorker::Heard { .. } => {
                    panic!("acknowledging reports is the shell's business")
                }
                ToWorker::Dismiss { .. } => {
                    self.cut(worker);
                    *self.process(worker) = Process::default();
                }
            }
        }
    }

    fn check(&mut self) {
        for job in self.world.core.jobs() {
            let newest = self.generations.entry(job.id).or_default();
            assert!(job.generation >= *newest, "{} went from {newest} back to {}", job.id, job.generation);
            if !job.members.is_empty() {
                *newest = job.generation; // Workers have heard of it.
            }
            if let Some(state) = self.ended.get(&job.id) {
                assert_eq!(job.state, *state, "{} had ended", job.id);
            } else if job.state.is_final() {
                self.ended.insert(job.id, job.state);
            }
            assert_eq!(job.members.is_empty(), !matches!(job.state, JobState::Running | JobState::Stopping));
            let distinct: BTreeSet<_> = job.members.iter().collect();
            assert_eq!(distinct.len(), job.members.len());
        }
    }

    /// All workers are there and do as they are told: then every job gets to its end.
    fn calm_down(&mut self) {
        for worker in 1..=WORKERS {
            self.connect(worker); // Says what it still had to say, such as that it leaves.
            self.cut(worker);
        }
        for _ in 0..200 {
            for worker in 1..=WORKERS {
                self.connect(worker);
            }
            self.world.find(Some(1));
            self.deliver();
            for worker in 1..=WORKERS {
                self.obey(worker);
                self.end(worker, finished("same"));
            }
            self.world.pass(1_000);
            self.check();
        }
        for job in self.world.core.jobs() {
            let resting = job.state.is_final() || job.state == JobState::Paused;
            assert!(resting, "{} is still {}: {}\n{:#?}", job.id, job.state, job.reason, self.world.trace);
        }
        for worker in self.world.core.workers() {
            assert_eq!(
                worker.activity.as_str(),
                "idle",
                "{:?} is engaged in {:?}",
                worker.record.id,
                worker.engaged
            );
        }
    }
}

proptest! {
    #[test]
    fn whatever_happens_workers_have_one_job_generations_grow_and_jobs_end(
        events in proptest::collection::vec(event(), 1..80),
    ) {
        let mut cluster = Cluster::new();
        for event in &events {
            cluster.apply(event);
            cluster.check();
        }
        cluster.calm_down();
    }
}
