//! Time, chance, and what happens next.

use crate::chain::Key;
use crate::network::{ConnectionId, End, Lane, NodeId};
use lockstep_common::rng::Stream;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

/// Something that is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The next message of a lane arrives at an end.
    Deliver { connection: ConnectionId, to: End, lane: Lane },
    /// An end may have been waiting in vain for too long.
    Silence { connection: ConnectionId, end: End },
    /// Something that a process has set a timer for.
    Timer { node: NodeId, life: u32, timer: Timer },
    /// The plan's next misfortune, or its undoing.
    Chaos(usize),
}

/// What a process wakes up for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    /// The coordinator looks at its timers.
    Tick,
    /// The coordinator's disk has done what it was told to.
    Written,
    /// The coordinator tries its disk again.
    WriteAgain,
    /// A search for checkpoints, or a checkpoint on its way to the disk, is done.
    Background(u64),
    /// A worker tries to reach its coordinator.
    Reconnect,
    /// A worker's membership wants to be told of the time.
    Member,
    /// A rank has computed its part of what it is at.
    Computed(Key),
    /// A rank tries to reach another one.
    Dial { rank: u32, attempt: u64 },
    /// A rank or follower looks for somebody to fetch its state from.
    Fetch(u64),
    /// A leaving worker stops waiting for its last reports to be heard.
    Farewell,
}

/// The queue of events, the clock and the source of all chance.
pub(crate) struct Scheduler {
    now_ms: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Event>,
    last: u64,
    chance: Stream,
}

impl Scheduler {
    pub(crate) fn new(seed: u64) -> Self {
        let chance = Stream::new(seed, "simulation", &[]);
        Self { now_ms: 0, queue: BinaryHeap::new(), events: BTreeMap::new(), last: 0, chance }
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// Has `event` happen after so many milliseconds, behind what happens then already.
    pub(crate) fn after(&mut self, ms: u64, event: Event) {
        self.last += 1;
        self.events.insert(self.last, event);
        self.queue.push(Reverse((self.now_ms + ms, self.last)));
    }

    /// Has a process wake up after so many milliseconds.
    pub(crate) fn wake(&mut self, (node, life): (NodeId, u32), ms: u64, timer: Timer) {
        self.after(ms, Event::Timer { node, life, timer });
    }

    /// The next event; the clock moves on to it.
    pub(crate) fn next(&mut self) -> Option<Event> {
        let Reverse((at_ms, number)) = self.queue.pop()?;
        self.now_ms = at_ms;
        self.events.remove(&number)
    }

    /// Uniform in `low..=high`.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.chance.below(high - low + 1)
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.chance.below(n) == 0
    }

    /// One of them; there must be one.
    pub(crate) fn pick<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.chance.below(all.len() as u64) as usize].clone()
    }
}
