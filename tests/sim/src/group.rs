//! How ranks find each other, and how they lose each other.

use crate::cluster::World;
use crate::network::{ConnectionId, Lane, NodeId, Purpose};
use crate::plan::Breakage;
use crate::process::Process;
use crate::scheduler::Timer;
use crate::training::Stage;
use crate::words::Message;
use lockstep_common::ids::{Generation, JobId, Rank};

/// Pauses between attempts to reach another rank.
const REDIAL_MS: u64 = 300;

impl Process {
    /// The state is there: connects to the other ranks. Of two, the one with the greater number dials.
    pub(crate) fn connect(&mut self, world: &mut World) {
        let Some(session) = &mut self.session else { return };
        session.stage = Stage::Connecting;
        let (job, generation, number) =
            (session.assignment.job, session.assignment.generation, session.number);
        for rank in 0..session.rank() {
            self.dial(rank, number, world);
        }
        let waiting: Vec<_> =
            self.lobby.extract_if(.., |(_, j, g, _)| (*j, *g) == (job, generation)).collect();
        for (connection, job, generation, rank) in waiting {
            self.greeted(connection, job, generation, rank, world);
        }
        self.enter_if_complete(world);
    }

    /// Tries to reach a rank, in the session of this number.
    pub(crate) fn dial(&mut self, rank: u32, number: u64, world: &mut World) {
        let Some(session) = self.session.as_mut().filter(|s| s.number == number) else { return };
        if session.stage != Stage::Connecting || session.links.contains_key(&rank) {
            return;
        }
        let Some(peer) = session.assignment.peers.get(rank as usize) else { return };
        let Some(connection) = world.net.dial(self.node, NodeId(peer.worker.0), Purpose::Ranks) else {
            let attempt_ms = world.clock.between(10, 1_000);
            return self.wake(world, REDIAL_MS + attempt_ms, Timer::Dial { rank, attempt: number });
        };
        session.links.insert(rank, connection);
        let (job, generation, own) =
            (session.assignment.job, session.assignment.generation, session.assignment.rank);
        world.send(connection, self.node, Lane::Talk, Message::Hello { job, generation, rank: own });
        self.enter_if_complete(world);
    }

    /// Another rank has called.
    pub(crate) fn greeted(
        &mut self,
        connection: ConnectionId,
        job: JobId,
        generation: Generation,
        rank: u32,
        world: &mut World,
    ) {
        let Some(session) = self.session.as_mut().filter(|s| s.assignment.job == job) else {
            return self.lobby.push((connection, job, generation, rank));
        };
        let own = session.assignment.generation;
        let welcome = generation == own || world.breakage == Some(Breakage::NoFence);
        if generation > own || welcome && session.stage == Stage::Fetching {
            return self.lobby.push((connection, job, generation, rank));
        }
        if !welcome || session.stage != Stage::Connecting {
            return world.close(connection, self.node);
        }
        if let Some(old) = session.links.insert(rank, connection) {
            world.close(old, self.node);
        }
        for (from, part) in self.early.extract_if(.., |(from, _)| *from == connection).collect::<Vec<_>>() {
            self.receive(from, part, world);
        }
        self.enter_if_complete(world);
    }

    fn enter_if_complete(&mut self, world: &mut World) {
        let Some(session) = &self.session else { return };
        if session.stage == Stage::Connecting && session.links.len() as u32 == session.ranks() - 1 {
            self.enter(world);
        }
    }

    /// A rank has said that the group is over.
    pub(crate) fn handle_farewell(
        &mut self,
        from: ConnectionId,
        culprit: Option<Rank>,
        error: &str,
        world: &mut World,
    ) {
        let Some(session) = &self.session else { return };
        if session.links.values().any(|link| *link == from) && !matches!(session.stage, Stage::Storing { .. })
        {
            self.fail(culprit.map(|rank| rank.0), error, world);
        }
    }

    /// A connection is gone that may have led to a rank.
    pub(crate) fn link_lost(&mut self, connection: ConnectionId, told: bool, world: &mut World) {
        let Some(session) = &mut self.session else { return };
        let link = session.links.iter().find(|(_, link)| **link == connection).map(|(rank, _)| *rank);
        let Some(rank) = link else { return };
        session.links.remove(&rank);
        match session.stage {
            Stage::Fetching | Stage::Storing { .. } => {}
            Stage::Connecting => {
                let number = session.number;
                if rank < session.rank() {
                    self.wake(world, REDIAL_MS, Timer::Dial { rank, attempt: number });
                }
            }
            Stage::Exchanging(_) if told => {
                session.departed.insert(rank);
                self.advance(world);
            }
            Stage::Exchanging(_) => self.fail(Some(rank), "has not been heard of", world),
        }
    }
}
