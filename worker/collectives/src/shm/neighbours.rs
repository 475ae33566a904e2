//! This rank and the other ranks of its host: who reads the rings, and when.
//!
//! A thread that waits for a collective's result reads the rings itself, so that a result needs no detour over
//! another thread. While nobody waits, a background thread does, woken by the doorbell. Whoever reads has the
//! *turn*.

use super::arena::{Arena, Block, PeerArena};
use super::doorbell::{Doorbell, Sleeper};
use super::introduce::Lifeline;
use super::ring::{Consumer, Producer};
use crate::engine::Engine;
use crate::frame::{HEADER_LEN, Header};
use crate::transport::{Farewell, Frame, Lane, Transport};
use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use lockstep_common::ids::Rank;
use parking_lot::{Mutex, MutexGuard};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;

/// Frames taken from one ring before the next one has its turn.
const BATCH: usize = 16;

/// How long a rank that leaves waits for its last frames to be taken.
const LINGER: Duration = Duration::from_secs(5);

/// How long a waiter looks for frames before it sleeps. Between these bounds, halved when it was in vain and doubled
/// when not: a wake-up costs some 50 µs, and a core that looks is a core that does not compute.
const SPIN_US: std::ops::RangeInclusive<u32> = 4..=128;

/// Looks without giving up the core before the others of this host may have it.
const BUSY_LOOKS: u32 = 64;

/// First bytes of what is not a collective's frame.
const LEFT: [u8; 4] = *b"LKSX";
const FAREWELL: [u8; 4] = *b"LKSE";

/// What a rank has of another one on its host.
pub(crate) struct ChannelEnds {
    /// By [`Lane`].
    pub(crate) send: [Producer; 2],
    /// By [`Lane`].
    pub(crate) recv: [Consumer; 2],
    /// The peer's.
    pub(crate) doorbell: Doorbell,
    /// The peer's.
    pub(crate) arena: PeerArena,
}

struct Channel {
    outbox: [Mutex<Outbox>; 2],
    inbox: [Mutex<Consumer>; 2],
    /// How many of its lanes the peer has ended.
    ended: AtomicU32,
    /// The peer's process is gone.
    gone: AtomicBool,
    reported: AtomicBool,
    doorbell: Doorbell,
    arena: PeerArena,
}

struct Outbox {
    producer: Producer,
    queue: VecDeque<Queued>,
    closed: bool,
}

struct Queued {
    header: [u8; HEADER_LEN],
    payload: Vec<Bytes>,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// What was waited for is there.
    Ready,
    TimedOut,
    /// Another thread reads the rings, and will bring it.
    Elsewhere,
}

/// This rank's shared memory with the other ranks of its host.
pub(crate) struct Neighbours {
    rank: Rank,
    doorbell: Doorbell,
    arena: Arena,
    /// By rank.
    channels: Vec<Option<Channel>>,
    turn: Mutex<()>,
    /// Frames that found their ring full.
    queued: AtomicUsize,
    spin_us: AtomicU32,
    leaving: AtomicBool,
    engine: OnceLock<Weak<Engine>>,
    arrived: Mutex<Option<Sender<()>>>,
    drained: Receiver<()>,
    /// What watches over the peers' processes.
    watches: Mutex<Vec<AbortHandle>>,
}

impl Neighbours {
    /// `ends` are this rank's channels by rank; `doorbell` and `arena` its own.
    pub(crate) fn new(
        rank: Rank,
        doorbell: Doorbell,
        arena: Arena,
        ends: Vec<Option<ChannelEnds>>,
    ) -> Arc<Self> {
        let channel = |ends: ChannelEnds| Channel {
            outbox: ends
                .send
                .map(|producer| Mutex::new(Outbox { producer, queue: VecDeque::new(), closed: false })),
            inbox: ends.recv.map(Mutex::new),
            ended: AtomicU32::new(0),
            gone: AtomicBool::new(false),
            reported: AtomicBool::new(false),
            doorbell: ends.doorbell,
            arena: ends.arena,
        };
        let (arrived, drained) = bounded(0);
        Arc::new(Self {
            rank,
            doorbell,
            arena,
            channels: ends.into_iter().map(|ends| ends.map(channel)).collect(),
            turn: Mutex::new(()),
            queued: AtomicUsize::new(0),
            spin_us: AtomicU32::new(*SPIN_US.end()),
            leaving: AtomicBool::new(false),
            engine: OnceLock::new(),
            arrived: Mutex::new(Some(arrived)),
            drained,
            watches: Mutex::default(),
        })
    }

    /// Watches over the process of `rank` until this side is dropped, which ends the peer's watch.
    pub(crate) fn watch(self: &Arc<Self>, rank: Rank, lifeline: Lifeline) {
        let near = Arc::downgrade(self);
        let watch = tokio::spawn(async move {
            lifeline.broken().await;
            if let Some(near) = near.upgrade() {
                near.handle_gone(rank);
            }
        });
        self.watches.lock().push(watch.abort_handle());
    }

    /// Begins to read the rings, for `engine`.
    pub(crate) fn serve(self: &Arc<Self>, engine: &Arc<Engine>) -> std::io::Result<()> {
        if self.engine.set(Arc::downgrade(engine)).is_err() {
            return Ok(());
        }
        let (near, arrived) = (self.clone(), self.arrived.lock().take());
        std::thread::Builder::new().name(format!("shm-{}", self.rank.0)).spawn(move || {
            near.run();
            drop(arrived);
        })?;
        Ok(())
    }

    /// Whether `rank` is on this host.
    pub(crate) fn has(&self, rank: Rank) -> bool {
        self.channel(rank).is_some()
    }

    /// A block of this rank's arena, which its neighbours can read and write.
    pub(crate) fn allocate(&self, bytes: usize) -> Option<Block> {
        self.arena.allocate(bytes)
    }

    /// Whether `rank` is on this host and its arena has `bytes` at `offset`.
    pub(crate) fn reaches(&self, rank: Rank, offset: u64, bytes: usize) -> bool {
        self.channel(rank).is_some_and(|channel| channel.arena.write(offset, bytes).is_some())
    }

    /// A vector of `len` elements in `rank`'s arena. `None` if it has no such place.
    ///
    /// # Safety
    /// As long as the vector is in use, `rank` neither frees nor changes it. `offset` is a multiple of `T`'s alignment.
    pub(crate) unsafe fn vector<T: bytemuck::Pod>(
        &self,
        rank: Rank,
        offset: u64,
        len: usize,
    ) -> Option<&[T]> {
        // SAFETY: passed on to the caller.
        let bytes = unsafe { self.channel(rank)?.arena.read(offset, len.checked_mul(size_of::<T>())?) }?;
        bytemuck::try_cast_slice(bytes).ok()
    }

    /// Where `rank`'s arena has `len` elements at `offset`, to write to.
    pub(crate) fn place<T>(&self, rank: Rank, offset: u64, len: usize) -> Option<*mut T> {
        let place = self.channel(rank)?.arena.write(offset, len.checked_mul(size_of::<T>())?)?;
        Some(place.cast())
    }

    /// The process of `rank` has ended.
    pub(crate) fn handle_gone(&self, rank: Rank) {
        if let Some(channel) = self.channel(rank) {
            channel.gone.store(true, Ordering::Release);
            self.doorbell.ring();
        }
    }

    /// There may be something to read that was not before: early frames have been taken.
    pub(crate) fn nudge(&self) {
        self.doorbell.ring();
    }

    /// Wakes a thread of this rank that sleeps in [`wait`](Self::wait): a result came by another way.
    pub(crate) fn wake_waiter(&self) {
        self.doorbell.wake_waiter();
    }

    /// Reads the rings until `ready`, or for `limit`, unless another thread does.
    pub(crate) fn wait(&self, engine: &Engine, ready: impl Fn() -> bool, limit: Duration) -> Waited {
        let Some(turn) = self.turn.try_lock() else { return Waited::Elsewhere };
        self.doorbell.disarm();
        let begin = Instant::now();
        let mut quiet_since = begin;
        let mut looks = 0u32;
        let waited = loop {
            if ready() {
                break Waited::Ready;
            }
            if self.poll(engine) {
                quiet_since = Instant::now();
                looks = 0;
                continue;
            }
            looks += 1;
            let spin = self.spin_us.load(Ordering::Relaxed);
            if looks < BUSY_LOOKS {
                std::hint::spin_loop();
            } else if quiet_since.elapsed() < Duration::from_micros(u64::from(spin)) {
                std::thread::yield_now();
            } else {
                let Some(rest) = limit.checked_sub(begin.elapsed()) else { break Waited::TimedOut };
                self.spin_us.store((spin / 2).max(*SPIN_US.start()), Ordering::Relaxed);
                self.doorbell.arm(Sleeper::Waiter);
                if !ready() && !self.has_work(engine) {
                    self.doorbell.sleep(Sleeper::Waiter, Some(rest));
                }
                self.doorbell.disarm();
                quiet_since = Instant::now();
                looks = 0;
            }
        };
        if waited == Waited::Ready && looks > 0 {
            let longer = self.spin_us.load(Ordering::Relaxed).saturating_mul(2);
            self.spin_us.store(longer.min(*SPIN_US.end()), Ordering::Relaxed);
        }
        self.yield_turn(engine, turn);
        waited
    }

    /// From here on the background thread is woken for what comes.
    fn yield_turn(&self, engine: &Engine, turn: MutexGuard<'_, ()>) {
        self.doorbell.arm(Sleeper::Background);
        if self.has_work(engine) {
            self.doorbell.ring();
        }
        drop(turn);
    }

    fn run(&self) {
        let mut deadline = None;
        loop {
            let turn = self.turn.lock();
            self.doorbell.disarm();
            let engine = self.engine.get().and_then(Weak::upgrade);
            match &engine {
                Some(engine) => while self.poll(engine) {},
                None => {
                    self.flush();
                }
            }
            self.doorbell.arm(Sleeper::Background);
            let work = engine.as_ref().is_some_and(|engine| self.has_work(engine));
            drop(turn);
            // Outside the turn: the last handle on the engine may go here, and that leaves the group.
            drop(engine);
            if self.leaving.load(Ordering::Acquire) {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + LINGER);
                if self.queued.load(Ordering::Acquire) == 0 || Instant::now() >= deadline {
                    return;
                }
            }
            if !work {
                self.doorbell.sleep(Sleeper::Background, deadline.map(|_| LINGER / 50));
            }
        }
    }

    /// Brings what lies in the rings to `engine` and sends what found its ring full. Whether there was anything.
    fn poll(&self, engine: &Engine) -> bool {
        let mut moved = self.queued.load(Ordering::Acquire) > 0 && self.flush();
        for (rank, channel) in (0..).map(Rank).zip(&self.channels) {
            let Some(channel) = channel else { continue };
            for lane in [Lane::Small, Lane::Bulk] {
                if engine.is_far_ahead(rank, lane) {
                    continue;
                }
                for _ in 0..BATCH {
                    if !self.take_frame(engine, rank, channel, lane) {
                        break;
                    }
                    moved = true;
                }
            }
            let silent = || channel.inbox.iter().all(|inbox| inbox.lock().is_empty());
            let gone = channel.gone.load(Ordering::Acquire) && silent();
            // Whoever has left may end its process.
            let left = channel.ended.load(Ordering::Acquire) == 2;
            if gone && !left && !channel.reported.swap(true, Ordering::AcqRel) {
                engine.handle_lost(rank, "its process has ended".to_owned());
            }
        }
        moved
    }

    fn take_frame(&self, engine: &Engine, rank: Rank, channel: &Channel, lane: Lane) -> bool {
        let popped = channel.inbox[lane as usize].lock().pop(|header, payload| {
            let buffer = engine.pool().copy(std::iter::once(payload));
            (*header, buffer)
        });
        let popped = match popped {
            Ok(Some(popped)) => popped,
            Ok(None) => return false,
            Err(error) => {
                if !channel.reported.swap(true, Ordering::AcqRel) {
                    engine.handle_malformed(rank, error.to_string());
                }
                return false;
            }
        };
        if popped.starved {
            channel.doorbell.ring();
        }
        let (header, payload) = popped.value;
        match header[..4] {
            _ if header[..4] == LEFT => {
                if channel.ended.fetch_add(1, Ordering::AcqRel) == 1 {
                    engine.handle_left(rank);
                }
            }
            _ if header[..4] == FAREWELL => engine.handle_farewell(rank, Farewell::decode(payload.bytes())),
            _ => match Header::decode(&header) {
                Ok(header) if header.payload_len == payload.len() => {
                    engine.handle_frame(rank, header, payload)
                }
                Ok(_) => engine.handle_malformed(rank, "a frame of another length than it says".to_owned()),
                Err(error) => engine.handle_malformed(rank, error.to_string()),
            },
        }
        true
    }

    /// Whether [`poll`](Self::poll) would do something.
    fn has_work(&self, engine: &Engine) -> bool {
        let waiting = |(rank, channel): (Rank, &Option<Channel>)| {
            let Some(channel) = channel else { return false };
            let reported = channel.reported.load(Ordering::Acquire);
            let has = |lane: Lane| {
                !channel.inbox[lane as usize].lock().is_empty() && !engine.is_far_ahead(rank, lane)
            };
            let some = has(Lane::Small) || has(Lane::Bulk);
            let left = channel.ended.load(Ordering::Acquire) == 2;
            !reported && (some || channel.gone.load(Ordering::Acquire) && !left)
        };
        (0..).map(Rank).zip(&self.channels).any(waiting)
    }

    /// Sends what found its ring full, as far as there is room. Whether anything was sent.
    fn flush(&self) -> bool {
        let mut sent = false;
        for channel in self.channels.iter().flatten() {
            for outbox in &channel.outbox {
                let mut outbox = outbox.lock();
                if channel.gone.load(Ordering::Acquire) {
                    outbox.closed = true;
                    self.queued.fetch_sub(outbox.queue.len(), Ordering::AcqRel);
                    outbox.queue.clear();
                }
                let mut pushed = false;
                while let Some(Queued { header, payload }) = outbox.queue.front() {
                    let (header, payload) = (*header, payload.clone());
                    if !matches!(outbox.producer.push(&header, &payload), Ok(true)) {
                        break;
                    }
                    outbox.queue.pop_front();
                    self.queued.fetch_sub(1, Ordering::AcqRel);
                    pushed = true;
                }
                if pushed {
                    channel.doorbell.ring();
                    sent = true;
                }
            }
        }
        sent
    }

    fn push(&self, channel: &Channel, lane: Lane, header: [u8; HEADER_LEN], payload: Vec<Bytes>) {
        let mut outbox = channel.outbox[lane as usize].lock();
        if outbox.closed {
            return;
        }
        // An error means that the peer overwrote its cursor: what it sent will say so, or its death.
        if outbox.queue.is_empty() && matches!(outbox.producer.push(&header, &payload), Ok(true)) {
            drop(outbox);
            channel.doorbell.ring();
        } else {
            outbox.queue.push_back(Queued { header, payload });
            self.queued.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn channel(&self, rank: Rank) -> Option<&Channel> {
        self.channels.get(rank.index()).and_then(Option::as_ref)
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        self.watches.lock().iter().for_each(AbortHandle::abort);
    }
}

fn control(kind: [u8; 4]) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(&kind);
    header
}

impl Transport for Neighbours {
    fn send(&self, to: Rank, lane: Lane, frame: Frame) {
        if let Some(channel) = self.channel(to) {
            self.push(channel, lane, frame.header.encode(), frame.payload);
        }
    }

    fn abort(&self, farewell: &Farewell) {
        let text = Bytes::from(farewell.encode());
        for channel in self.channels.iter().flatten() {
            for (lane, outbox) in channel.outbox.iter().enumerate() {
                let mut outbox = outbox.lock();
                if outbox.closed {
                    continue;
                }
                outbox.closed = true;
                self.queued.fetch_sub(outbox.queue.len(), Ordering::AcqRel);
                outbox.queue.clear();
                if lane == Lane::Small as usize {
                    // A full ring belongs to a peer that reads nothing; it hears of the end from its own time-out.
                    let _ = outbox.producer.push(&control(FAREWELL), std::slice::from_ref(&text));
                }
            }
            channel.doorbell.ring();
        }
        // Nobody may be given memory that a peer might still write to.
        self.arena.retire();
        self.doorbell.ring();
    }

    fn leave(&self) -> Vec<Receiver<()>> {
        if !self.leaving.swap(true, Ordering::AcqRel) {
            for channel in self.channels.iter().flatten() {
                for lane in [Lane::Small, Lane::Bulk] {
                    self.push(channel, lane, control(LEFT), vec![]);
                    channel.outbox[lane as usize].lock().closed = true;
                }
            }
            self.doorbell.ring();
        }
        // Without a thread that flushes there is nothing to wait for.
        if self.engine.get().is_none() {
            self.arrived.lock().take();
        }
        vec![self.drained.clone()]
    }
}
