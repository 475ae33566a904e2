//! A rank's training: `worker/src/session` with hashes for weights.

use crate::chain::{Exchange, Key, State, contribution};
use crate::cluster::World;
use crate::network::{ConnectionId, Lane};
use crate::plan::{Breakage, Workload};
use crate::process::Process;
use crate::scheduler::Timer;
use crate::words::{Message, Part, stricter};
use lockstep_common::ids::Rank;
use lockstep_common::wire::{Assignment, FromWorker, Outcome, Position, Resumption, StepRecord, StopMode};
use lockstep_member::Start;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// What a rank is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It gets its state.
    Fetching,
    /// It connects to the other ranks.
    Connecting,
    /// It computes its part of an exchange, or waits for the others'.
    Exchanging(Exchange),
    /// All is done but a checkpoint; the others do not wait for it.
    Storing { request: u64 },
}

/// A rank at work.
pub(crate) struct Session {
    pub(crate) number: u64,
    pub(crate) assignment: Assignment,
    pub(crate) workload: Rc<Workload>,
    pub(crate) stage: Stage,
    pub(crate) state: Option<State>,
    /// The connections to the other ranks.
    pub(crate) links: BTreeMap<u32, ConnectionId>,
    /// Ranks that have left the group in good order.
    pub(crate) departed: BTreeSet<u32>,
    /// What has arrived for this exchange or the next.
    pub(crate) parts: BTreeMap<(Position, Exchange), BTreeMap<u32, Rc<Part>>>,
    /// Where the state is fetched from.
    pub(crate) fetch: crate::fetch::Fetch,
    /// How this rank was told to stop.
    told: Option<StopMode>,
    /// How it was when the step began.
    wish: Option<StopMode>,
    /// What the ranks agree on for the end of this step.
    agreed: Option<StopMode>,
    /// A checkpoint on its way that nobody waits for.
    upload: Option<u64>,
    stepped: bool,
    /// When the exchange in progress began.
    begun_ms: u64,
}

impl Session {
    pub(crate) fn rank(&self) -> u32 {
        self.assignment.rank.0
    }

    pub(crate) fn ranks(&self) -> u32 {
        self.assignment.peers.len() as u32
    }

    fn is_last(&self, position: Position) -> bool {
        position.step >= self.workload.total_steps
    }
}

/// Start and end
impl Process {
    pub(crate) fn begin(&mut self, assignment: Assignment, start: Start, world: &mut World) {
        let Some(workload) = world.workloads.get(&assignment.job).cloned() else { return };
        if let Some(old) = &self.session {
            let (job, generation) = (old.assignment.job, old.assignment.generation);
            world
                .judge
                .object(|| format!("{} begins a session in the middle of {job} {generation}", self.id));
        }
        let kept = self.kept.take().filter(|(job, _)| *job == assignment.job).map(|(_, state)| state);
        let state = match (&assignment.resume, start) {
            (Resumption::Fresh, _) => Some(State::initial()),
            (Resumption::Checkpoint { .. }, _) => None,
            (Resumption::Peers { .. }, Start::Kept) => kept,
            (Resumption::Peers { .. }, Start::Followed) => self.followed.as_ref().and_then(|f| f.copy),
            (Resumption::Peers { .. }, Start::Elsewhere) => None,
        };
        let state = state.filter(|state| match &assignment.resume {
            Resumption::Peers { position, .. } => state.position == *position,
            _ => true,
        });
        if start == Start::Followed {
            self.unfollow(world);
        }
        let number = self.number();
        self.session = Some(Session {
            number,
            assignment,
            workload,
            stage: Stage::Fetching,
            state,
            links: BTreeMap::new(),
            departed: BTreeSet::new(),
            parts: BTreeMap::new(),
            fetch: Default::default(),
            told: None,
            wish: None,
            agreed: None,
            upload: None,
            stepped: false,
            begun_ms: 0,
        });
        self.prepare(world);
    }

    pub(crate) fn ask_to_stop(&mut self, mode: StopMode) {
        if let Some(session) = &mut self.session {
            session.told = stricter(session.told, Some(mode));
        }
    }

    pub(crate) fn abort(&mut self, world: &mut World) {
        let Some(session) = &self.session else { return };
        let step = session.state.map_or(0, |s| s.position.step);
        self.end(Outcome::Stopped { step }, Some((None, "told to leave at once")), world);
    }

    pub(crate) fn fail(&mut self, culprit: Option<u32>, error: &str, world: &mut World) {
        let outcome = Outcome::Lost { error: error.to_owned(), culprit: culprit.map(Rank) };
        self.end(outcome, Some((culprit, error)), world);
    }

    /// Ends the session. The other ranks are told so if it is not in good order.
    pub(crate) fn end(&mut self, outcome: Outcome, farewell: Option<(Option<u32>, &str)>, world: &mut World) {
        let Some(session) = self.session.take() else { return };
        for connection in session.links.values() {
            if let Some((culprit, error)) = farewell {
                let message = Message::Farewell { culprit: culprit.map(Rank), error: error.to_owned() };
                world.send(*connection, self.node, Lane::Talk, message);
            }
            world.close(*connection, self.node);
        }
        for connection in std::mem::take(&mut self.followers) {
            world.close(connection, self.node);
        }
        let (job, generation) = (session.assignment.job, session.assignment.generation);
        self.kept = session.state.map(|state| (job, state));
        let held = session.state.map(|state| state.position);
        let now_ms = world.clock.now_ms();
        self.member.handle_session_ended(job, generation, outcome, held, now_ms);
    }
}

/// Steps
impl Process {
    /// All ranks are connected.
    pub(crate) fn enter(&mut self, world: &mut World) {
        let Some(session) = &mut self.session else { return };
        let Some(state) = session.state else { return };
        let first = if session.is_last(state.position) { Exchange::Digest } else { Exchange::Update };
        self.exchange(first, world);
    }

    fn exchange(&mut self, exchange: Exchange, world: &mut World) {
        let Some(session) = &mut self.session else { return };
        let Some(state) = session.state else { return };
        if exchange == Exchange::Update && state.position.phase == 0 {
            session.wish = session.told;
            session.agreed = None;
        }
        session.stage = Stage::Exchanging(exchange);
        session.begun_ms = world.clock.now_ms();
        let rank = session.assignment.rank;
        let shards = session.assignment.placement.range(rank).len() as u64;
        let compute_ms = match exchange {
            // Once nothing goes wrong any more there is nothing to see, so the rest is done quickly.
            Exchange::Update if world.calm => world.clock.between(1, 20),
            Exchange::Update => world.clock.between(1, 1 + session.workload.shard_ms) * shards.max(1),
            Exchange::Digest => 1,
        };
        let key = Key { session: session.number, position: state.position, exchange };
        self.wake(world, compute_ms, Timer::Computed(key));
    }

    /// This rank's part is ready.
    pub(crate) fn computed(&mut self, key: Key, world: &mut World) {
        let Some(session) = &mut self.session else { return };
        let Some(state) = session.state else { return };
        if session.number != key.session || session.stage != Stage::Exchanging(key.exchange) {
            return;
        }
        let (job, generation) = (session.assignment.job, session.assignment.generation);
        let shift = match world.breakage {
            Some(Breakage::ShiftedSampler) if generation.0 > 1 => 1,
            _ => 0,
        };
        let own = match key.exchange {
            Exchange::Update => session.assignment.placement.range(session.assignment.rank),
            Exchange::Digest => 0..0,
        };
        let shards = own.map(|s| (s, session.workload.samples(state.position, s, shift))).collect();
        let part = Rc::new(Part {
            job,
            generation,
            rank: session.rank(),
            position: state.position,
            exchange: key.exchange,
            shards,
            digest: state.chain,
            stop: session.wish,
            begun_ms: session.begun_ms,
        });
        if !std::mem::replace(&mut session.stepped, true) {
            world.judge.stepped(job, generation, state, world.clock.now_ms());
        }
        let of_exchange = session.parts.entry((part.position, part.exchange)).or_default();
        of_exchange.insert(part.rank, part.clone());
        for connection in session.links.values() {
            world.send(*connection, self.node, Lane::Talk, Message::Part(part.clone()));
        }
        self.advance(world);
    }

    /// Another rank's part has arrived.
    pub(crate) fn receive(&mut self, from: ConnectionId, part: Rc<Part>, world: &mut World) {
        if self.lobby.iter().any(|(waiting, ..)| *waiting == from) {
            return self.early.push((from, part));
        }
        let Some(session) = &mut self.session else { return };
        if !session.links.values().any(|link| *link == from) {
            return;
        }
        let same = part.job == session.assignment.job && part.generation == session.assignment.generation;
        if !same && world.breakage != Some(Breakage::NoFence) {
            return;
        }
        session.parts.entry((part.position, part.exchange)).or_default().insert(part.rank, part);
        self.advance(world);
    }

    /// Goes on if this rank has every rank's part.
    pub(crate) fn advance(&mut self, world: &mut World) {
        let Some(session) = &mut self.session else { return };
        let (Some(state), Stage::Exchanging(exchange)) = (session.state, session.stage) else { return };
        let key = (state.position, exchange);
        let there = session.parts.get(&key).map_or(0, BTreeMap::len);
        if there < session.ranks() as usize {
            let missing = |rank: &&u32| !session.parts.get(&key).is_some_and(|p| p.contains_key(rank));
            if let Some(gone) = session.departed.iter().find(missing).copied() {
                self.fail(Some(gone), "left in the middle of a step", world);
            }
            return;
        }
        let lax = world.breakage == Some(Breakage::NoLeaseAtCommit) || self.ignores_its_lease(world);
        if exchange == Exchange::Update && !lax {
            match self.member.lease_until_ms() {
                // The coordinator's first word is still on its way.
                None => return,
                Some(until_ms) if until_ms < world.clock.now_ms() => {
                    return self.fail(None, "the coordinator has not been heard for too long", world);
                }
                Some(_) => {}
            }
        }
        let Some(session) = &mut self.session else { return };
        let parts = session.parts.remove(&key).unwrap_or_default();
        session.parts.retain(|(position, _), _| *position >= state.position);
        match exchange {
            Exchange::Update => self.update(state, &parts, world),
            Exchange::Digest => {
                world.judge.compared(session.assignment.job, &parts);
                self.after_digest(state, world);
            }
        }
    }

    fn update(&mut self, before: State, parts: &BTreeMap<u32, Rc<Part>>, world: &mut World) {
        let Some(session) = &mut self.session else { return };
        let mut shards: Vec<_> = parts.values().flat_map(|p| &p.shards).collect();
        shards.sort_by_key(|(shard, _)| *shard);
        let gradients = contribution(shards.into_iter().map(|(shard, samples)| (*shard, samples.as_slice())));
        let (job, generation) = (session.assignment.job, session.assignment.generation);
        let after = before.after(gradients, generation, session.workload.phases);
        session.state = Some(after);
        session.agreed = parts.values().fold(session.agreed, |agreed, part| stricter(agreed, part.stop));
        world.judge.updated((self.id, session.rank()), (job, generation), (before, after), parts);
        world.trace.note(world.clock.now_ms(), &[4, self.id.0, after.chain, after.lineage], || {
            format!("{}: {job} {generation} is at {}", self.id, after.position)
        });
        self.feed_followers(before, gradients, generation, world);
        if after.position.phase > 0 {
            return self.exchange(Exchange::Update, world);
        }
        self.committed(after, world);
    }

    fn committed(&mut self, state: State, world: &mut World) {
        let Some(session) = &mut self.session else { return };
        let (job, generation, step) =
            (session.assignment.job, session.assignment.generation, state.position.step);
        let rank = session.rank();
        let record = StepRecord {
            generation,
            step,
            epoch: session.workload.epoch(Position::at(step.saturating_sub(1))) + 1,
            total_steps: session.workload.total_steps,
            samples: 16,
            seconds: 0.1,
            values: BTreeMap::new(),
            shards: Vec::new(),
        };
        let last = session.is_last(state.position);
        let due = step.is_multiple_of(session.workload.checkpoint_every);
        let agreed = session.agreed;
        self.member.handle_committed(job, generation, step);
        if rank == 0 {
            self.tell(FromWorker::Steps { job, generation, records: vec![record] });
        }
        if last || due || agreed == Some(StopMode::Checkpoint) {
            self.exchange(Exchange::Digest, world);
        } else if agreed.is_some() {
            self.end(Outcome::Stopped { step }, None, world);
        } else {
            self.exchange(Exchange::Update, world);
        }
    }

    /// The replicas are the same.
    fn after_digest(&mut self, state: State, world: &mut World) {
        let Some(session) = &mut self.session else { return };
        let (job, generation) = (session.assignment.job, session.assignment.generation);
        let last = session.is_last(state.position);
        let stops = last || session.agreed.is_some();
        let needed = last || session.agreed == Some(StopMode::Checkpoint);
        let free = session.upload.is_none_or(|request| !self.requests.contains_key(&request));
        let store = session.rank() == 0 && (needed || free);
        if !store {
            return if stops { self.end_well(state, world) } else { self.exchange(Exchange::Update, world) };
        }
        let request = self.request(world, |request| Message::Put { request, job, generation, state });
        let Some(session) = &mut self.session else { return };
        if needed {
            session.stage = Stage::Storing { request };
        } else {
            session.upload = Some(request);
            if stops { self.end_well(state, world) } else { self.exchange(Exchange::Update, world) }
        }
    }

    /// The coordinator has answered.
    pub(crate) fn answered(
        &mut self,
        request: u64,
        answer: Result<Option<State>, String>,
        world: &mut World,
    ) {
        let Some(session) = &self.session else { return };
        let last = session.state.is_some_and(|state| session.is_last(state.position));
        match (session.stage, session.state, answer) {
            (Stage::Storing { request: own }, Some(_), Err(error)) if own == request && last => {
                self.end(Outcome::Failed { error }, None, world);
            }
            (Stage::Storing { request: own }, Some(state), _) if own == request => {
                self.end_well(state, world)
            }
            (Stage::Fetching, None, answer) if session.fetch.request == Some(request) => match answer {
                Ok(state) => self.restored(state, world),
                Err(error) => self.end(Outcome::Failed { error }, None, world),
            },
            _ => {}
        }
    }

    fn end_well(&mut self, state: State, world: &mut World) {
        let Some(session) = &self.session else { return };
        let outcome = if session.is_last(state.position) {
            Outcome::Finished {
                weights_digest: format!("{:016x}", state.chain),
                step: state.position.step,
                epoch: session.workload.epochs().0,
                metrics: BTreeMap::new(),
            }
        } else {
            Outcome::Stopped { step: state.position.step }
        };
        self.end(outcome, None, world);
    }
}
