//! The fake network: connections between processes, whose messages arrive late, in bursts or never.
//!
//! A connection's lane is ordered, as a QUIC stream is; lanes of different connections, and different lanes of one, are
//! not ordered among each other. Nothing is lost on a connection that lives. A connection dies when an end closes it, when
//! its host says that its process is gone, or when one end has heard nothing for too long; the two ends notice at different
//! times.

mod connections;

use crate::scheduler::Scheduler;
use crate::words::Message;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A process's place: 0 is the coordinator, any other number a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeId(pub(crate) u64);

/// Where the coordinator runs.
pub(crate) const COORDINATOR: NodeId = NodeId(0);

pub(crate) type ConnectionId = u64;

/// One of the two ends of a connection: 0 has dialled.
pub(crate) type End = usize;

/// One of the ordered lanes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// The session with the coordinator, or what ranks say.
    Talk = 0,
    /// Requests and their answers.
    Requests = 1,
}

/// What a connection is for; it decides how soon a silent peer is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A worker's with its coordinator.
    Session,
    /// Two ranks'.
    Ranks,
    /// Handing over state.
    State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Power {
    Up,
    Frozen,
    /// Whether the host answers for it that nobody is there.
    Down {
        told: bool,
    },
}

struct Host {
    life: u32,
    power: Power,
}

#[derive(Default)]
struct Queue {
    messages: VecDeque<Message>,
    /// Messages whose time to arrive has come while they could not.
    held: usize,
    last_at_ms: u64,
}

/// Why an end hears nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    /// Packets get lost, or nobody sends any.
    Deaf,
    /// The host answers that nobody has the port.
    Refused,
    /// The process that is there does not know the connection.
    Unknown,
}

struct Connection {
    purpose: Purpose,
    /// Whether nothing that is said from now on arrives.
    torn: bool,
    ends: [(NodeId, u32); 2],
    open: [bool; 2],
    lanes: [[Queue; 2]; 2],
    silence: [Option<(Silence, u64)>; 2],
}

/// What has arrived, and at whom.
pub(crate) enum Arrival {
    Message(NodeId, Message),
    /// The other end has closed the connection.
    Closed(NodeId),
    Nothing,
}

/// All hosts and what connects them.
#[derive(Default)]
pub(crate) struct Network {
    hosts: BTreeMap<NodeId, Host>,
    cuts: BTreeSet<(NodeId, NodeId)>,
    connections: BTreeMap<ConnectionId, Connection>,
    last: ConnectionId,
    /// How many times slower than usual messages are.
    pub(crate) slowness: u64,
}

fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}

/// Hosts
impl Network {
    /// A process starts; returns which life of its place this is.
    pub(crate) fn start(&mut self, node: NodeId, clock: &mut Scheduler) -> u32 {
        let life = self.hosts.get(&node).map_or(1, |host| host.life + 1);
        self.hosts.insert(node, Host { life, power: Power::Up });
        self.look(clock);
        life
    }

    /// A process dies at once. Of what it has sent, a part is on the wire; the rest is lost.
    pub(crate) fn kill(&mut self, node: NodeId, told: bool, clock: &mut Scheduler) {
        let Some(host) = self.hosts.get_mut(&node) else { return };
        host.power = Power::Down { told };
        let life = host.life;
        for connection in self.connections.values_mut() {
            let Some(end) = connection.ends.iter().position(|e| *e == (node, life)) else { continue };
            connection.open[end] = false;
            let reachable = !self.cuts.contains(&pair(connection.ends[0].0, connection.ends[1].0));
            for queue in &mut connection.lanes[1 - end] {
                let sent = queue.messages.len() as u64;
                queue.lose_tail(if reachable { clock.between(0, sent) } else { 0 });
            }
        }
        self.look(clock);
    }

    /// A process ends in good order: what it has sent arrives.
    pub(crate) fn exit(&mut self, node: NodeId, clock: &mut Scheduler) {
        self.close_all(node, clock);
        if let Some(host) = self.hosts.get_mut(&node) {
            host.power = Power::Down { told: true };
        }
        self.look(clock);
    }

    /// A process stops computing, or goes on.
    pub(crate) fn freeze(&mut self, node: NodeId, frozen: bool, clock: &mut Scheduler) {
        if let Some(host) = self.hosts.get_mut(&node) {
            host.power = match (host.power, frozen) {
                (Power::Up, true) => Power::Frozen,
                (Power::Frozen, false) => Power::Up,
                (power, _) => power,
            };
        }
        self.look(clock);
    }

    /// Cuts or mends the way between two hosts.
    pub(crate) fn cut(&mut self, a: NodeId, b: NodeId, cut: bool, clock: &mut Scheduler) {
        if cut {
            self.cuts.insert(pair(a, b));
        } else {
            self.cuts.remove(&pair(a, b));
        }
        self.look(clock);
    }

    /// Mends all ways.
    pub(crate) fn recover(&mut self, clock: &mut Scheduler) {
        self.cuts.clear();
        self.look(clock);
    }

    /// Whether a process is there and computes.
    pub(crate) fn is_up(&self, node: NodeId) -> bool {
        self.hosts.get(&node).is_some_and(|host| host.power == Power::Up)
    }

    /// Whether a process is there, at work or stopped.
    pub(crate) fn lives(&self, node: NodeId) -> bool {
        self.hosts.get(&node).is_some_and(|host| !matches!(host.power, Power::Down { .. }))
    }

    /// Whether a process is there and is stopped.
    pub(crate) fn is_frozen(&self, node: NodeId) -> bool {
        self.hosts.get(&node).is_some_and(|host| host.power == Power::Frozen)
    }

    /// Whether this life of the place is the present one.
    pub(crate) fn is_current(&self, node: NodeId, life: u32) -> bool {
        self.lives(node) && self.hosts.get(&node).is_some_and(|host| host.life == life)
    }

    /// Whether a packet from one to the other arrives now.
    pub(crate) fn reaches(&self, a: NodeId, b: NodeId) -> bool {
        self.is_up(a) && self.is_up(b) && !self.cuts.contains(&pair(a, b))
    }

    /// The end of a connection that `node`'s present process has, if it still has it.
    pub(crate) fn end_of(&self, id: ConnectionId, node: NodeId) -> Option<End> {
        let connection = self.connections.get(&id)?;
        let life = self.hosts.get(&node)?.life;
        connection.ends.iter().position(|e| *e == (node, life)).filter(|end| connection.open[*end])
    }
}

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => f.write_str("the coordinator"),
            worker => write!(f, "w{worker}"),
        }
    }
}
