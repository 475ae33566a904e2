//! Connections: what is said on them, and how they end.

use super::{
    Arrival, Connection, ConnectionId, End, Lane, Network, NodeId, Power, Purpose, Queue, Silence, pair,
};
use crate::scheduler::{Event, Scheduler};
use crate::words::Message;

/// After so long a silence QUIC gives a connection up: the coordinator's, and those between workers.
const SESSION_IDLE_MS: u64 = 6_000;
const PEER_IDLE_MS: u64 = 5_000;

impl Network {
    /// Connects two processes, if they can reach each other now.
    pub(crate) fn dial(&mut self, from: NodeId, to: NodeId, purpose: Purpose) -> Option<ConnectionId> {
        if from == to || !self.reaches(from, to) {
            return None;
        }
        let end = |node: NodeId| (node, self.hosts.get(&node).map_or(0, |host| host.life));
        let connection = Connection {
            purpose,
            torn: false,
            ends: [end(from), end(to)],
            open: [true; 2],
            lanes: Default::default(),
            silence: [None; 2],
        };
        self.last += 1;
        self.connections.insert(self.last, connection);
        Some(self.last)
    }

    /// Who is at the other end.
    pub(crate) fn peer(&self, id: ConnectionId, node: NodeId) -> Option<NodeId> {
        self.connections.get(&id)?.ends.iter().map(|e| e.0).find(|n| *n != node)
    }

    /// Sends a message; nothing happens if the sender has no such connection any more.
    pub(crate) fn send(
        &mut self,
        id: ConnectionId,
        from: NodeId,
        lane: Lane,
        message: Message,
        clock: &mut Scheduler,
    ) {
        let (Some(end), slowness) = (self.end_of(id, from), self.slowness.max(1)) else { return };
        let Some(connection) = self.connections.get_mut(&id).filter(|c| !c.torn) else { return };
        let usual = if clock.one_in(20) { 40 } else { 3 };
        let delay_ms = clock.between(1, usual) * slowness + message.transfer_ms();
        let (to, now_ms) = (1 - end, clock.now_ms());
        let queue = &mut connection.lanes[to][lane as usize];
        queue.last_at_ms = queue.last_at_ms.max(now_ms + delay_ms);
        queue.messages.push_back(message);
        clock.after(queue.last_at_ms - now_ms, Event::Deliver { connection: id, to, lane });
    }

    /// Closes the connection at `node`'s end: the other end hears of it after all that was said before.
    pub(crate) fn close(&mut self, id: ConnectionId, node: NodeId, clock: &mut Scheduler) {
        if let Some(end) = self.end_of(id, node) {
            self.send(id, node, Lane::Talk, Message::Closed, clock);
            self.let_go(id, end, clock);
        }
    }

    /// Closes all connections of a process.
    pub(super) fn close_all(&mut self, node: NodeId, clock: &mut Scheduler) {
        let ids: Vec<_> = self.connections.keys().copied().collect();
        ids.into_iter().for_each(|id| self.close(id, node, clock));
    }

    /// Breaks some connection for no reason: a part of what is on its way is lost, and both ends notice some time.
    pub(crate) fn tear(&mut self, clock: &mut Scheduler) {
        let whole = |c: &Connection| c.open == [true; 2] && !c.torn;
        let open: Vec<_> = self.connections.iter().filter(|(_, c)| whole(c)).map(|(id, _)| *id).collect();
        if open.is_empty() {
            return;
        }
        let id = clock.pick(&open);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.torn = true;
        for queue in connection.lanes.iter_mut().flatten() {
            queue.lose_tail(clock.between(0, queue.messages.len() as u64));
        }
        self.look_at(id, clock);
    }

    /// The next message of a lane, if it can arrive. One that cannot arrives when it can.
    pub(crate) fn arrive(&mut self, id: ConnectionId, to: End, lane: Lane, clock: &mut Scheduler) -> Arrival {
        let Some(connection) = self.connections.get_mut(&id) else { return Arrival::Nothing };
        let (node, life) = connection.ends[to];
        let host = self.hosts.get(&node).filter(|host| host.life == life);
        let gone = host.is_none_or(|host| matches!(host.power, Power::Down { .. }));
        if gone || !connection.open[to] {
            connection.lanes[to][lane as usize] = Queue::default();
            return Arrival::Nothing;
        }
        let cut = self.cuts.contains(&pair(connection.ends[0].0, connection.ends[1].0));
        let queue = &mut connection.lanes[to][lane as usize];
        if cut || host.is_some_and(|host| host.power == Power::Frozen) {
            queue.held = (queue.held + 1).min(queue.messages.len());
            return Arrival::Nothing;
        }
        match queue.messages.pop_front() {
            None => Arrival::Nothing,
            Some(Message::Closed) => {
                self.let_go(id, to, clock);
                Arrival::Closed(node)
            }
            Some(message) => {
                if connection.torn || !connection.open[1 - to] {
                    // It may have been the last one, after which there is silence.
                    self.look_at(id, clock);
                }
                Arrival::Message(node, message)
            }
        }
    }

    /// Whose end this is, if it gives the connection up now, for it has heard nothing for too long; and whether the other
    /// end's host has said that its process has ended.
    pub(crate) fn gives_up(
        &mut self,
        id: ConnectionId,
        end: End,
        clock: &mut Scheduler,
    ) -> Option<(NodeId, bool)> {
        let connection = self.connections.get(&id)?;
        let (node, life) = connection.ends[end];
        let (why, due_ms) = connection.silence[end]?;
        let up = self.is_up(node) && self.is_current(node, life);
        if due_ms > clock.now_ms() || !up || !connection.open[end] {
            return None;
        }
        self.let_go(id, end, clock);
        Some((node, why == Silence::Refused))
    }

    /// The end does without the connection from now on.
    fn let_go(&mut self, id: ConnectionId, end: End, clock: &mut Scheduler) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.open[end] = false;
            connection.lanes[end] = Default::default();
        }
        self.look_at(id, clock);
    }

    /// Something has changed: who hears nothing from now on, and who does again?
    pub(super) fn look(&mut self, clock: &mut Scheduler) {
        let ids: Vec<_> = self.connections.keys().copied().collect();
        ids.into_iter().for_each(|id| self.look_at(id, clock));
    }

    fn look_at(&mut self, id: ConnectionId, clock: &mut Scheduler) {
        let Some(connection) = self.connections.get(&id) else { return };
        let lives = |end: End| {
            let (node, life) = connection.ends[end];
            self.is_current(node, life) && connection.open[end]
        };
        if !lives(0) && !lives(1) {
            self.connections.remove(&id);
            return;
        }
        for end in 0..2 {
            let silence = self.silence(id, end);
            let Some(connection) = self.connections.get_mut(&id) else { return };
            let open = connection.open[end];
            match (silence, connection.silence[end]) {
                (Some(why), old) if open && old.is_none_or(|(known, _)| known != why) => {
                    let idle_ms = match connection.purpose {
                        Purpose::Session => SESSION_IDLE_MS,
                        Purpose::Ranks | Purpose::State => PEER_IDLE_MS,
                    };
                    let patience_ms = match (why, connection.purpose) {
                        // Only the coordinator asks a silent worker's host.
                        (Silence::Refused, Purpose::Session) if end == 1 => clock.between(1_000, 2_500),
                        (Silence::Deaf, _) | (Silence::Refused, Purpose::Session) => {
                            clock.between(idle_ms - 1_000, idle_ms + 500)
                        }
                        (Silence::Refused, _) => clock.between(300, 1_500),
                        (Silence::Unknown, _) => clock.between(20, 1_500),
                    };
                    let due_ms = clock.now_ms() + patience_ms;
                    let due_ms = old.map_or(due_ms, |(_, before)| before.min(due_ms)).max(clock.now_ms());
                    connection.silence[end] = Some((why, due_ms));
                    clock.after(due_ms - clock.now_ms(), Event::Silence { connection: id, end });
                }
                // Its own host slept: it looks at once.
                (Some(_), Some((_, due_ms))) if open => {
                    let wait_ms = due_ms.saturating_sub(clock.now_ms());
                    clock.after(wait_ms, Event::Silence { connection: id, end });
                }
                (None, Some(_)) => connection.silence[end] = None,
                _ => {}
            }
            self.release(id, end, clock);
        }
    }

    /// Why this end hears nothing, if it does not.
    fn silence(&self, id: ConnectionId, end: End) -> Option<Silence> {
        let connection = self.connections.get(&id)?;
        let ((own, _), (peer, life)) = (connection.ends[end], connection.ends[1 - end]);
        let host = self.hosts.get(&peer)?;
        let knows = host.life == life && connection.open[1 - end] && !connection.torn;
        match host.power {
            _ if self.cuts.contains(&pair(own, peer)) => Some(Silence::Deaf),
            Power::Down { told: true } => Some(Silence::Refused),
            Power::Down { told: false } | Power::Frozen => Some(Silence::Deaf),
            // What it has said before it let go is on its way.
            Power::Up if !knows => {
                let last_word = connection.lanes[end].iter().any(|queue| !queue.messages.is_empty());
                (!last_word).then_some(Silence::Unknown)
            }
            Power::Up => None,
        }
    }

    /// What could not arrive and now can is on its way.
    fn release(&mut self, id: ConnectionId, to: End, clock: &mut Scheduler) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let (node, _) = connection.ends[to];
        let frozen = self.hosts.get(&node).is_some_and(|host| host.power == Power::Frozen);
        if frozen || self.cuts.contains(&pair(connection.ends[0].0, connection.ends[1].0)) {
            return;
        }
        for (lane, queue) in [Lane::Talk, Lane::Requests].into_iter().zip(&mut connection.lanes[to]) {
            for _ in 0..std::mem::take(&mut queue.held) {
                queue.last_at_ms = queue.last_at_ms.max(clock.now_ms() + clock.between(1, 60));
                let wait_ms = queue.last_at_ms - clock.now_ms();
                clock.after(wait_ms, Event::Deliver { connection: id, to, lane });
            }
        }
    }
}

impl Queue {
    /// Only the first `kept` messages arrive.
    pub(super) fn lose_tail(&mut self, kept: u64) {
        self.messages.truncate(kept as usize);
        self.held = self.held.min(kept as usize);
    }
}
