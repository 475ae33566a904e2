//! How a replica gets its state: from a checkpoint, from a peer, or by following a job's updates.

use crate::chain::State;
use crate::cluster::World;
use crate::network::{ConnectionId, Lane, NodeId, Purpose};
use crate::plan::Breakage;
use crate::process::Process;
use crate::scheduler::Timer;
use crate::training::Stage;
use crate::words::Message;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{Following, Position, Resumption};

/// Pauses between attempts to get a state.
const RETRY_MS: u64 = 300;

/// Attempts after which a rank gives its sources up.
const ATTEMPTS: u64 = 20;

/// Where a session's state comes from.
#[derive(Default)]
pub(crate) struct Fetch {
    /// The coordinator is asked for a checkpoint.
    pub(crate) request: Option<u64>,
    /// A peer is asked.
    connection: Option<ConnectionId>,
    attempts: u64,
}

/// A job that is followed.
pub(crate) struct Followed {
    job: JobId,
    generation: Generation,
    sources: Vec<WorkerId>,
    connection: Option<ConnectionId>,
    attempts: u64,
    told: bool,
    pub(crate) copy: Option<State>,
}

/// A rank
impl Process {
    /// Gets the session's state, if it has none.
    pub(crate) fn prepare(&mut self, world: &mut World) {
        let Some(session) = &self.session else { return };
        if session.state.is_some() {
            return self.connect(world);
        }
        match session.assignment.resume {
            Resumption::Checkpoint { step } => {
                let (job, generation) = (session.assignment.job, session.assignment.generation);
                let request = self.request(world, |request| Message::Get { request, job, generation, step });
                if let Some(session) = &mut self.session {
                    session.fetch.request = Some(request);
                }
            }
            Resumption::Peers { .. } => self.look_for_state(session.number, world),
            Resumption::Fresh => {}
        }
    }

    /// The checkpoint has arrived.
    pub(crate) fn restored(&mut self, state: Option<State>, world: &mut World) {
        let Some(session) = &mut self.session else { return };
        session.state = state;
        self.connect(world);
    }

    /// Asks the next source: as the rank, or the follower, that has this number.
    pub(crate) fn look_for_state(&mut self, number: u64, world: &mut World) {
        if self.followed.is_some() && self.session.is_none() {
            return self.look_for_feed(world);
        }
        let Some(session) = self.session.as_mut().filter(|s| s.number == number) else { return };
        if session.stage != Stage::Fetching || session.state.is_some() || session.fetch.connection.is_some() {
            return;
        }
        let Resumption::Peers { position, sources } = &session.assignment.resume else { return };
        let mut peers: Vec<_> = sources.iter().copied().collect();
        let mut wanted = Some(*position);
        if world.breakage == Some(Breakage::WrongReplica) {
            peers =
                session.assignment.peers.iter().map(|p| p.rank).filter(|r| !sources.contains(r)).collect();
            peers.extend(sources);
            wanted = None;
        }
        peers.retain(|rank| *rank != session.assignment.rank);
        let attempt = session.fetch.attempts;
        session.fetch.attempts += 1;
        let source = peers.get(attempt as usize % peers.len().max(1)).copied();
        let worker = source.and_then(|rank| session.assignment.peers.get(rank.index())).map(|p| p.worker);
        let (Some(source), Some(worker)) = (source, worker) else {
            return self.fail(None, "nobody has the state", world);
        };
        if attempt >= ATTEMPTS {
            return self.fail(Some(source.0), "does not hand over its state", world);
        }
        let job = session.assignment.job;
        match world.net.dial(self.node, NodeId(worker.0), Purpose::State) {
            Some(connection) => {
                session.fetch.connection = Some(connection);
                world.send(connection, self.node, Lane::Talk, Message::Ask { job, position: wanted });
            }
            None => self.wake(world, RETRY_MS, Timer::Fetch(number)),
        }
    }

    /// A peer has answered.
    pub(crate) fn handle_state(&mut self, from: ConnectionId, state: Option<State>, world: &mut World) {
        if let Some(followed) = self.followed.as_mut().filter(|f| f.connection == Some(from)) {
            match state {
                Some(state) => {
                    followed.copy = Some(state);
                    self.tell_followed();
                }
                None => self.retry_feed(world),
            }
            return;
        }
        let Some(session) = self.session.as_mut().filter(|s| s.fetch.connection == Some(from)) else {
            return;
        };
        session.fetch.connection = None;
        world.close(from, self.node);
        let Resumption::Peers { position, .. } = session.assignment.resume else { return };
        match state {
            Some(state) => {
                // What was asked for is what came, unless that is what is broken.
                session.state = Some(State { position, ..state });
                self.connect(world);
            }
            None => {
                let number = session.number;
                self.wake(world, RETRY_MS, Timer::Fetch(number));
            }
        }
    }

    /// A connection is gone over which a state was to come.
    pub(crate) fn source_lost(&mut self, connection: ConnectionId, world: &mut World) {
        if self.followed.as_ref().is_some_and(|f| f.connection == Some(connection)) {
            return self.retry_feed(world);
        }
        let Some(session) = self.session.as_mut().filter(|s| s.fetch.connection == Some(connection)) else {
            return;
        };
        session.fetch.connection = None;
        let number = session.number;
        self.wake(world, RETRY_MS, Timer::Fetch(number));
    }
}

/// A source
impl Process {
    /// Somebody asks for the state of a job.
    pub(crate) fn answer_for_state(
        &mut self,
        from: ConnectionId,
        job: JobId,
        position: Option<Position>,
        world: &mut World,
    ) {
        let of_session = self.session.as_ref().filter(|s| s.assignment.job == job).and_then(|s| s.state);
        let kept = self.kept.filter(|(of, _)| *of == job).map(|(_, state)| state);
        let suits = |state: &State| position.is_none_or(|wanted| state.position == wanted);
        let state = of_session.or(kept).filter(suits);
        world.send(from, self.node, Lane::Talk, Message::Have(state));
    }

    /// Somebody wants to follow.
    pub(crate) fn accept_follower(
        &mut self,
        from: ConnectionId,
        job: JobId,
        generation: Generation,
        world: &mut World,
    ) {
        let of = |a: &lockstep_common::wire::Assignment| a.job == job && a.generation == generation;
        let state = self.session.as_ref().filter(|s| of(&s.assignment)).and_then(|s| s.state);
        world.send(from, self.node, Lane::Talk, Message::Have(state));
        if state.is_some() {
            self.followers.push(from);
        }
    }

    /// An update has been made: those who follow make it too.
    pub(crate) fn feed_followers(
        &mut self,
        before: State,
        contribution: u64,
        generation: Generation,
        world: &mut World,
    ) {
        for connection in &self.followers {
            let message = Message::Update { before: before.position, contribution, generation };
            world.send(*connection, self.node, Lane::Talk, message);
        }
    }
}

/// A follower
impl Process {
    pub(crate) fn begin_to_follow(&mut self, following: Following, world: &mut World) {
        self.unfollow(world);
        self.followed = Some(Followed {
            job: following.job,
            generation: following.generation,
            sources: following.sources.iter().map(|p| p.worker).collect(),
            connection: None,
            attempts: 0,
            told: false,
            copy: None,
        });
        self.look_for_feed(world);
    }

    pub(crate) fn unfollow(&mut self, world: &mut World) {
        if let Some(connection) = self.followed.take().and_then(|f| f.connection) {
            world.close(connection, self.node);
        }
    }

    fn look_for_feed(&mut self, world: &mut World) {
        let Some(followed) = &mut self.followed else { return };
        if followed.connection.is_some() || followed.sources.is_empty() {
            return;
        }
        if followed.attempts >= ATTEMPTS {
            // It gives up, and heals at the switch.
            return self.tell_followed();
        }
        followed.attempts += 1;
        let source = world.clock.pick(&followed.sources);
        let (job, generation) = (followed.job, followed.generation);
        match world.net.dial(self.node, NodeId(source.0), Purpose::State) {
            Some(connection) => {
                followed.connection = Some(connection);
                world.send(connection, self.node, Lane::Talk, Message::Follow { job, generation });
            }
            None => self.wake(world, RETRY_MS, Timer::Fetch(0)),
        }
    }

    fn retry_feed(&mut self, world: &mut World) {
        if let Some(followed) = &mut self.followed
            && let Some(connection) = followed.connection.take()
        {
            world.close(connection, self.node);
            self.wake(world, RETRY_MS, Timer::Fetch(0));
        }
    }

    fn tell_followed(&mut self) {
        if let Some(followed) = &mut self.followed
            && !std::mem::replace(&mut followed.told, true)
        {
            let position = followed.copy.map_or(Position::default(), |copy| copy.position);
            self.member.handle_followed(followed.job, followed.generation, position);
        }
    }

    /// The source has made an update.
    pub(crate) fn follow_update(
        &mut self,
        from: ConnectionId,
        before: Position,
        contribution: u64,
        generation: Generation,
        world: &mut World,
    ) {
        let Some(followed) = self.followed.as_mut().filter(|f| f.connection == Some(from)) else { return };
        let Some(phases) = world.workloads.get(&followed.job).map(|w| w.phases) else { return };
        followed.copy = followed
            .copy
            .filter(|copy| copy.position == before)
            .map(|copy| copy.after(contribution, generation, phases));
    }
}
