//! The cluster as a whole: hands each event to whom it concerns.

use crate::chaos::{Chaos, Misfortune};
use crate::hub::Hub;
use crate::judge::Judge;
use crate::network::{Arrival, COORDINATOR, ConnectionId, Lane, Network, NodeId};
use crate::plan::{Breakage, Plan, Setup, Workload};
use crate::process::Process;
use crate::scheduler::{Event, Scheduler, Timer};
use crate::store::Store;
use crate::trace::Trace;
use crate::words::Message;
use lockstep_common::ids::{JobId, WorkerId};
use lockstep_common::wire::JobState;
use std::collections::BTreeMap;
use std::rc::Rc;

/// How long after the last misfortune every job must have finished: some time-outs, a lease, and the quick rest of it.
const PATIENCE_MS: u64 = 240_000;

/// What all processes share: the world around them, and who looks at it.
pub(crate) struct World {
    pub(crate) clock: Scheduler,
    pub(crate) net: Network,
    pub(crate) judge: Judge,
    pub(crate) trace: Trace,
    pub(crate) workloads: BTreeMap<JobId, Rc<Workload>>,
    pub(crate) breakage: Option<Breakage>,
    /// The coordinator dies in the middle of a write.
    pub(crate) doomed: bool,
    /// Nothing goes wrong any more.
    pub(crate) calm: bool,
}

impl World {
    pub(crate) fn send(&mut self, connection: ConnectionId, from: NodeId, lane: Lane, message: Message) {
        self.net.send(connection, from, lane, message, &mut self.clock);
    }

    pub(crate) fn close(&mut self, connection: ConnectionId, at: NodeId) {
        self.net.close(connection, at, &mut self.clock);
    }

    /// The worker at the other end of one of the coordinator's connections.
    pub(crate) fn worker_at(&self, connection: ConnectionId) -> Option<WorkerId> {
        self.net.peer(connection, COORDINATOR).map(|node| WorkerId(node.0))
    }
}

/// What became of a seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The plan.
    pub plan: Plan,
    /// What was not as it must be, if something was.
    pub breach: Option<String>,
    /// A hash of all that happened.
    pub trace_hash: String,
    /// All that happened, in words, where asked for.
    pub lines: Vec<String>,
    /// How much happened.
    pub events: u64,
    /// The simulated time.
    pub simulated_ms: u64,
    /// Generations that made at least one update.
    pub generations: u64,
    /// Committed steps that were done again.
    pub recomputed: u64,
}

/// Lives through a plan.
pub fn run(plan: Plan) -> Report {
    Cluster::new(plan, false).run(plan)
}

/// Lives through a plan and tells of it.
pub fn run_traced(plan: Plan) -> Report {
    Cluster::new(plan, true).run(plan)
}

/// All processes, dead and alive.
pub(crate) struct Cluster {
    pub(crate) world: World,
    pub(crate) hub: Option<Hub>,
    pub(crate) store: Store,
    pub(crate) processes: BTreeMap<WorkerId, Process>,
    /// All workers that have enrolled.
    pub(crate) workers: Vec<WorkerId>,
    /// What the wall clock shows beyond the time that has passed.
    pub(crate) wall_offset_ms: u64,
    /// Events of processes that are stopped.
    asleep: BTreeMap<NodeId, Vec<Event>>,
    chaos: Chaos,
    jobs: usize,
}

impl Cluster {
    fn new(plan: Plan, in_words: bool) -> Self {
        let setup = Setup::new(plan.seed);
        let mut world = World {
            clock: Scheduler::new(plan.seed),
            net: Network::default(),
            judge: Judge::default(),
            trace: Trace::new(in_words),
            workloads: BTreeMap::new(),
            breakage: plan.breakage,
            doomed: false,
            calm: false,
        };
        let mut store = Store::default();
        let wall_offset_ms = 1_700_000_000_000;
        let mut hub = Hub::start(&store, wall_offset_ms, &mut world);
        for _ in 0..setup.workers {
            hub.enroll(&mut store, &mut world);
        }
        let jobs = setup.jobs.len();
        let chaos = Chaos::new(plan.seed, &setup, &mut world.clock);
        for job in setup.jobs {
            hub.submit(Rc::new(job), &mut store, &mut world);
        }
        hub.new_disk = false;
        Self {
            world,
            hub: Some(hub),
            store,
            processes: BTreeMap::new(),
            workers: Vec::new(),
            wall_offset_ms,
            asleep: BTreeMap::new(),
            chaos,
            jobs,
        }
    }

    fn run(mut self, plan: Plan) -> Report {
        let mut deadline_ms = u64::MAX;
        self.after_event();
        while self.world.judge.breach().is_none() && !self.is_done() {
            let Some(event) = self.world.clock.next() else { break };
            if self.world.calm && deadline_ms == u64::MAX {
                deadline_ms = self.world.clock.now_ms() + PATIENCE_MS;
            }
            if self.world.clock.now_ms() > deadline_ms {
                let waiting = self.describe();
                self.world.judge.object(|| format!("endless wait: nothing is wrong any more, but {waiting}"));
                break;
            }
            self.handle(event);
            self.after_event();
        }
        Report {
            plan,
            breach: self.world.judge.breach().map(str::to_owned),
            trace_hash: self.world.trace.hash(),
            events: self.world.trace.events(),
            simulated_ms: self.world.clock.now_ms(),
            generations: self.world.judge.generations,
            recomputed: self.world.judge.recomputed,
            lines: self.world.trace.into_lines(),
        }
    }

    fn is_done(&self) -> bool {
        let Some(hub) = &self.hub else { return false };
        hub.core.jobs().count() == self.jobs && hub.core.jobs().all(|job| job.state.is_final())
    }

    fn describe(&self) -> String {
        let Some(hub) = &self.hub else { return "there is no coordinator".to_owned() };
        let jobs = hub.core.jobs().filter(|job| job.state != JobState::Finished);
        let jobs = jobs
            .map(|j| format!("{} {} is {} at step {}: {}", j.id, j.generation, j.state, j.step, j.reason));
        let workers = hub.core.workers().map(|w| {
            let stage = self.processes.get(&w.record.id).map(|p| p.session.as_ref().map(|s| s.stage));
            format!("{} {} {:?} {stage:?}", w.record.id, w.activity.as_str(), w.engaged)
        });
        jobs.chain(workers).collect::<Vec<_>>().join("; ")
    }

    fn handle(&mut self, event: Event) {
        let node = match &event {
            Event::Timer { node, life, .. } if self.world.net.is_current(*node, *life) => Some(*node),
            Event::Timer { .. } => return,
            _ => None,
        };
        if let Some(node) = node.filter(|node| self.world.net.is_frozen(*node)) {
            return self.asleep.entry(node).or_default().push(event);
        }
        match event {
            Event::Timer { node, timer, .. } => self.wake(node, timer),
            Event::Deliver { connection, to, lane } => {
                match self.world.net.arrive(connection, to, lane, &mut self.world.clock) {
                    Arrival::Message(node, message) => self.deliver(node, connection, message),
                    Arrival::Closed(node) => self.lose(node, connection, true, false),
                    Arrival::Nothing => {}
                }
            }
            Event::Silence { connection, end } => {
                if let Some((node, ended)) = self.world.net.gives_up(connection, end, &mut self.world.clock) {
                    self.lose(node, connection, false, ended);
                }
            }
            Event::Chaos(number) => {
                if let Some(misfortune) = self.chaos.take(number) {
                    self.befall(misfortune);
                }
            }
        }
    }

    fn wake(&mut self, node: NodeId, timer: Timer) {
        if node == COORDINATOR {
            if let Some(hub) = &mut self.hub {
                hub.handle_timer(timer, &mut self.store, &mut self.world);
            }
        } else if let Some(process) = self.processes.get_mut(&WorkerId(node.0)) {
            process.handle_timer(timer, &mut self.world);
        }
    }

    fn deliver(&mut self, node: NodeId, connection: ConnectionId, message: Message) {
        let now_ms = self.world.clock.now_ms();
        self.world.trace.note(now_ms, &[1, node.0, connection], || format!("to {node}: {}", message.brief()));
        if node == COORDINATOR {
            if let Some(hub) = &mut self.hub {
                hub.handle_message(connection, message, &mut self.store, &mut self.world);
            }
        } else if let Some(process) = self.processes.get_mut(&WorkerId(node.0)) {
            process.handle_message(connection, message, &mut self.world);
        }
    }

    fn lose(&mut self, node: NodeId, connection: ConnectionId, told: bool, ended: bool) {
        let peer = self.world.net.peer(connection, node);
        let now_ms = self.world.clock.now_ms();
        self.world.trace.note(now_ms, &[2, node.0, connection], || {
            let peer = peer.map_or("somebody".to_owned(), |peer| peer.to_string());
            format!("{node}: {peer} {}", if told { "has hung up" } else { "is not heard any more" })
        });
        if node == COORDINATOR {
            if let Some(hub) = &mut self.hub {
                hub.handle_lost(connection, ended, &mut self.store, &mut self.world);
            }
        } else if let Some(process) = self.processes.get_mut(&WorkerId(node.0)) {
            process.handle_lost(connection, told, &mut self.world);
        }
    }

    /// Processes that have left are gone, and those that have enrolled start.
    fn after_event(&mut self) {
        if std::mem::take(&mut self.world.doomed) {
            self.kill_coordinator();
            let away_ms = self.world.clock.between(200, 20_000);
            self.later(away_ms, Misfortune::StartCoordinator);
        }
        if let Some(hub) = &mut self.hub {
            for worker in std::mem::take(&mut hub.enrolled) {
                self.workers.push(worker);
                let process = Process::start(worker, &mut self.world);
                self.processes.insert(worker, process);
            }
        }
        let done: Vec<_> = self.processes.values().filter(|p| p.done).map(|p| p.id).collect();
        for worker in done {
            self.processes.remove(&worker);
            self.world.net.exit(NodeId(worker.0), &mut self.world.clock);
            self.note(|| format!("{worker} has left"));
            let away_ms = self.world.clock.between(500, 15_000);
            self.later(away_ms, Misfortune::Start(worker));
        }
    }

    /// Has something happen after so many milliseconds.
    pub(crate) fn later(&mut self, ms: u64, misfortune: Misfortune) {
        self.chaos.later(ms, misfortune, &mut self.world.clock);
    }

    pub(crate) fn note(&mut self, words: impl FnOnce() -> String) {
        self.world.trace.note(self.world.clock.now_ms(), &[6], words);
    }

    pub(crate) fn kill_coordinator(&mut self) {
        if let Some(mut hub) = self.hub.take() {
            self.note(|| "the coordinator is killed".to_owned());
            hub.die(&mut self.store, &mut self.world);
            self.world.net.kill(COORDINATOR, true, &mut self.world.clock);
            self.asleep.remove(&COORDINATOR);
        }
    }

    pub(crate) fn start_coordinator(&mut self) {
        if self.hub.is_none() {
            self.note(|| "the coordinator starts".to_owned());
            let wall_ms = self.wall_offset_ms + self.world.clock.now_ms();
            self.hub = Some(Hub::start(&self.store, wall_ms, &mut self.world));
        }
    }

    pub(crate) fn kill(&mut self, worker: WorkerId, told: bool) {
        if self.processes.remove(&worker).is_some() {
            self.note(|| format!("{worker} is killed"));
            self.world.net.kill(NodeId(worker.0), told, &mut self.world.clock);
            self.asleep.remove(&NodeId(worker.0));
        }
    }

    pub(crate) fn start(&mut self, worker: WorkerId) {
        if !self.processes.contains_key(&worker) && self.workers.contains(&worker) {
            self.note(|| format!("{worker} starts"));
            let process = Process::start(worker, &mut self.world);
            self.processes.insert(worker, process);
        }
    }

    pub(crate) fn freeze(&mut self, node: NodeId) {
        self.note(|| format!("{node} is stopped"));
        self.world.net.freeze(node, true, &mut self.world.clock);
    }

    pub(crate) fn thaw(&mut self, node: NodeId) {
        if !self.world.net.is_frozen(node) {
            return;
        }
        self.note(|| format!("{node} goes on"));
        self.world.net.freeze(node, false, &mut self.world.clock);
        // Whatever has become due meanwhile happens in any order.
        for event in self.asleep.remove(&node).unwrap_or_default() {
            let wait_ms = self.world.clock.between(0, 60);
            self.world.clock.after(wait_ms, event);
        }
    }

    /// All that was wrong is mended, and nothing goes wrong any more.
    pub(crate) fn calm_down(&mut self) {
        self.note(|| "all is well from now on".to_owned());
        self.world.calm = true;
        self.chaos.end();
        self.world.net.slowness = 1;
        self.world.net.recover(&mut self.world.clock);
        (self.store.records_full, self.store.checkpoints_full) = (false, false);
        self.thaw(COORDINATOR);
        self.start_coordinator();
        for worker in self.workers.clone() {
            self.thaw(NodeId(worker.0));
            self.start(worker);
        }
        if let Some(hub) = &mut self.hub {
            hub.doom = None;
            hub.pause(false, &mut self.store, &mut self.world);
        }
        // A pause that was under way ends later.
        for ms in [20_000, 60_000, 120_000] {
            self.later(ms, Misfortune::Resume);
        }
    }
}
