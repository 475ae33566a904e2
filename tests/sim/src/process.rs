//! A worker's process: `worker/src/agent.rs` and what it drives, without threads.

use crate::chain::State;
use crate::cluster::World;
use crate::fetch::Followed;
use crate::network::{COORDINATOR, ConnectionId, Lane, NodeId, Purpose};
use crate::outbox::Outbox;
use crate::plan::Breakage;
use crate::scheduler::Timer;
use crate::training::Session;
use crate::words::{Message, Part};
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{FromWorker, Outcome, Position, Register, Resumption, ToWorker};
use lockstep_member::{Action, Leave, Member};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Pauses between attempts to reach a coordinator that is away.
const RECONNECT_MS: u64 = 500;

/// How long a leaving worker tries to hand in its last reports.
const FAREWELL_MS: u64 = 5_000;

/// The connection with the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Control {
    Away,
    Opening(ConnectionId),
    Open(ConnectionId),
}

/// A worker's process.
pub(crate) struct Process {
    pub(crate) id: WorkerId,
    pub(crate) node: NodeId,
    pub(crate) life: u32,
    pub(crate) member: Member,
    pub(crate) control: Control,
    pub(crate) session: Option<Session>,
    /// What the last session has left.
    pub(crate) kept: Option<(JobId, State)>,
    pub(crate) followed: Option<Followed>,
    /// Ranks that have called before their session began here.
    pub(crate) lobby: Vec<(ConnectionId, JobId, Generation, u32)>,
    /// What those have said since.
    pub(crate) early: Vec<(ConnectionId, Rc<Part>)>,
    /// Followers of the session's updates.
    pub(crate) followers: Vec<ConnectionId>,
    /// Requests that the coordinator has not answered.
    pub(crate) requests: BTreeMap<u64, Message>,
    /// Numbers sessions, requests and attempts.
    pub(crate) last: u64,
    outbox: Outbox,
    /// When this process asked for the connection that it has.
    registered_ms: u64,
    member_due_ms: Option<u64>,
    leaving: bool,
    /// Whether the process is to end now.
    pub(crate) done: bool,
}

impl Process {
    /// A process that has just started.
    pub(crate) fn start(id: WorkerId, world: &mut World) -> Self {
        let node = NodeId(id.0);
        let life = world.net.start(node, &mut world.clock);
        let attempt_ms = world.clock.between(1, 50);
        world.clock.wake((node, life), attempt_ms, Timer::Reconnect);
        Self {
            id,
            node,
            life,
            member: Member::default(),
            control: Control::Away,
            session: None,
            kept: None,
            followed: None,
            lobby: Vec::new(),
            early: Vec::new(),
            followers: Vec::new(),
            requests: BTreeMap::new(),
            last: 0,
            outbox: Outbox::default(),
            registered_ms: 0,
            member_due_ms: None,
            leaving: false,
            done: false,
        }
    }

    /// A number that this process has not used before.
    pub(crate) fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    pub(crate) fn wake(&self, world: &mut World, ms: u64, timer: Timer) {
        world.clock.wake((self.node, self.life), ms, timer);
    }

    /// A timer has run out.
    pub(crate) fn handle_timer(&mut self, timer: Timer, world: &mut World) {
        match timer {
            Timer::Reconnect => self.reconnect(world),
            Timer::Member => {
                self.member_due_ms = None;
                self.member.handle_tick(world.clock.now_ms());
            }
            Timer::Computed(key) => self.computed(key, world),
            Timer::Dial { rank, attempt } => self.dial(rank, attempt, world),
            Timer::Fetch(attempt) => self.look_for_state(attempt, world),
            Timer::Farewell => self.done = true,
            Timer::Tick | Timer::Written | Timer::WriteAgain | Timer::Background(_) => {}
        }
        self.carry_out(world);
    }

    /// A message has arrived.
    pub(crate) fn handle_message(&mut self, from: ConnectionId, message: Message, world: &mut World) {
        match message {
            Message::Welcome if self.control == Control::Opening(from) => {
                self.control = Control::Open(from);
                self.outbox.restart();
                self.member.handle_connected(self.registered_ms, world.clock.now_ms());
                self.advance(world);
                for request in self.requests.values() {
                    world.send(from, self.node, Lane::Requests, request.clone());
                }
            }
            Message::Order(order) => self.obey(*order, world),
            Message::Pong { sent_ms } => {
                self.member.handle_word(sent_ms, world.clock.now_ms());
                self.advance(world);
            }
            Message::Answer { request, answer } => {
                if self.requests.remove(&request).is_some() {
                    self.answered(request, answer, world);
                }
            }
            Message::Hello { job, generation, rank } => self.greeted(from, job, generation, rank.0, world),
            Message::Part(part) => self.receive(from, part, world),
            Message::Farewell { culprit, error } => self.handle_farewell(from, culprit, &error, world),
            Message::Ask { job, position } => self.answer_for_state(from, job, position, world),
            Message::Have(state) => self.handle_state(from, state, world),
            Message::Follow { job, generation } => self.accept_follower(from, job, generation, world),
            Message::Update { before, contribution, generation } => {
                self.follow_update(from, before, contribution, generation, world);
            }
            Message::Welcome
            | Message::Register(_)
            | Message::Report(_)
            | Message::Ping { .. }
            | Message::Put { .. }
            | Message::Get { .. }
            | Message::Closed => {}
        }
        self.carry_out(world);
    }

    /// A connection is gone; `told` if the other end said so.
    pub(crate) fn handle_lost(&mut self, connection: ConnectionId, told: bool, world: &mut World) {
        if matches!(self.control, Control::Opening(c) | Control::Open(c) if c == connection) {
            let open = matches!(self.control, Control::Open(_));
            self.control = Control::Away;
            if open {
                self.member.handle_disconnected(world.clock.now_ms());
            }
            self.wake(world, RECONNECT_MS, Timer::Reconnect);
        }
        self.lobby.retain(|(c, ..)| *c != connection);
        self.early.retain(|(c, _)| *c != connection);
        self.followers.retain(|c| *c != connection);
        self.source_lost(connection, world);
        self.link_lost(connection, told, world);
        self.carry_out(world);
    }

    /// SIGTERM.
    pub(crate) fn handle_departure(&mut self, world: &mut World) {
        self.member.handle_departure(world.clock.now_ms());
        self.carry_out(world);
    }

    fn reconnect(&mut self, world: &mut World) {
        if self.control != Control::Away {
            return;
        }
        let Some(connection) = world.net.dial(self.node, COORDINATOR, Purpose::Session) else {
            let attempt_ms = world.clock.between(10, 3_000);
            return self.wake(world, RECONNECT_MS + attempt_ms, Timer::Reconnect);
        };
        self.control = Control::Opening(connection);
        self.registered_ms = world.clock.now_ms();
        let (running, held) = self.member.register();
        let register = Register {
            host: format!("host{}", self.id.0),
            device: "cpu".to_owned(),
            threads: 1,
            host_key: None,
            addresses: Vec::new(),
            advertised: Vec::new(),
            metrics: None,
            running,
            held,
        };
        let (clock, net) = (&mut world.clock, &mut world.net);
        net.send(connection, self.node, Lane::Talk, Message::Register(Box::new(register)), clock);
    }

    fn obey(&mut self, order: ToWorker, world: &mut World) {
        if let ToWorker::Heard { reports } = order {
            return self.outbox.heard(reports);
        }
        if let ToWorker::Start(assignment) = &order {
            let position = match &assignment.resume {
                Resumption::Fresh => Position::default(),
                Resumption::Checkpoint { step } => Position::at(*step),
                Resumption::Peers { position, .. } => *position,
            };
            let kept = self.member.register().1.filter(|held| held.job == assignment.job);
            let kept = kept.map(|held| (held.generation, held.position));
            world.judge.started(self.id, assignment.job, position, kept);
            if let Some(other) =
                self.session.as_ref().map(|s| s.assignment.job).filter(|j| *j != assignment.job)
            {
                let (id, job) = (self.id, assignment.job);
                world
                    .judge
                    .object(|| format!("engaged twice: {id} is at {other} and is told to start {job}"));
            }
        }
        // A refusal is no failure, and nothing is done about it.
        let _ = self.member.handle_order(order, world.clock.now_ms());
    }

    /// Does what the membership asks for, and sends what is to be told.
    pub(crate) fn carry_out(&mut self, world: &mut World) {
        while let Some(action) = self.member.poll_action() {
            let now_ms = world.clock.now_ms();
            if !matches!(action, Action::Tell(FromWorker::Steps { .. }) | Action::Ping { .. }) {
                world.trace.note(now_ms, &[3, self.id.0], || format!("{}: {}", self.id, brief(&action)));
            }
            match action {
                Action::Begin { assignment, start } => self.begin(*assignment, start, world),
                Action::Stop { .. } if self.ignores_its_lease(world) => {}
                Action::Stop { mode } => self.ask_to_stop(mode),
                Action::Abort { .. } => self.abort(world),
                Action::Follow(following) => self.begin_to_follow(*following, world),
                Action::Unfollow => self.unfollow(world),
                Action::Drop => self.kept = None,
                Action::Tell(report) => self.outbox.tell(report),
                Action::Ping { sent_ms } => {
                    if let Control::Open(connection) = self.control {
                        world.send(connection, self.node, Lane::Requests, Message::Ping { sent_ms });
                    }
                }
                Action::Leave(Leave::Done) => {
                    self.leaving = true;
                    self.wake(world, FAREWELL_MS, Timer::Farewell);
                }
                Action::Leave(_) => self.done = true,
            }
        }
        if let Control::Open(connection) = self.control {
            while let Some(report) = self.outbox.next() {
                world.send(connection, self.node, Lane::Talk, Message::Report(Box::new(report)));
            }
        }
        self.done |= self.leaving && self.outbox.is_drained();
        if let Some(due_ms) = self.member.poll_timeout()
            && self.member_due_ms.is_none_or(|known| due_ms < known)
        {
            self.member_due_ms = Some(due_ms);
            self.wake(world, due_ms.saturating_sub(world.clock.now_ms()), Timer::Member);
        }
    }

    /// Whether it goes on without its coordinator for ever, as it must not.
    pub(crate) fn ignores_its_lease(&self, world: &World) -> bool {
        let alone = self.control == Control::Away && !self.member.is_leaving();
        alone && world.breakage == Some(Breakage::NoFence)
    }

    /// Reports what is not the membership's matter.
    pub(crate) fn tell(&mut self, report: FromWorker) {
        self.outbox.tell(report);
    }

    /// Asks something of the coordinator, as often as it takes.
    pub(crate) fn request(&mut self, world: &mut World, make: impl FnOnce(u64) -> Message) -> u64 {
        let number = self.number();
        let message = make(number);
        if let Control::Open(connection) = self.control {
            world.send(connection, self.node, Lane::Requests, message.clone());
        }
        self.requests.insert(number, message);
        number
    }
}

/// An action in a few words.
fn brief(action: &Action) -> String {
    match action {
        Action::Begin { assignment: a, start } => {
            let workers: Vec<_> = a.peers.iter().map(|p| p.worker.0).collect();
            let (job, generation, rank) = (a.job, a.generation, a.rank);
            format!("begins {job} {generation} as {rank} of {workers:?} from {:?}, {start:?}", a.resume)
        }
        Action::Follow(f) => format!("follows {} {}", f.job, f.generation),
        Action::Tell(FromWorker::Ended { job, generation, outcome, held }) => {
            let how = match outcome {
                Outcome::Finished { .. } => "finished".to_owned(),
                other => format!("{other:?}"),
            };
            format!("has ended {job} {generation}: {how}, keeps {held:?}")
        }
        other => format!("{other:?}"),
    }
}
