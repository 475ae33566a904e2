//! The collectives in flight on one rank, and what happens to them.
//!
//! Transports call `handle_*`; collectives call [`Engine::send`]. No lock is held while sending or while a
//! collective computes, and the order of locks is the engine's, then a collective's.

use crate::buffer::{Buffer, Pool};
use crate::error::{CollectiveError, Moment};
use crate::flight::{Entry, Flight, FlightSnapshot, Ticket, Waiting};
use crate::frame::{Header, Stage};
use crate::inquiry::Inquiry;
use crate::numbers::Numbers;
use crate::op::Element;
use crate::progress::Progress;
use crate::shm::Neighbours;
use crate::tag::Tag;
use crate::transport::{Farewell, Frame, Lane, Transport};
use bytes::Bytes;
use crossbeam_channel::Receiver;
use lockstep_common::ids::{Generation, Rank};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

mod overdue;

use overdue::Questions;

/// How many bytes a peer may send for collectives that this rank has not started before its bulk lane is read no
/// further: two 25 MB buckets of gradients, so that a rank that is one collective behind slows nobody. The small lane
/// has as much again to itself, which no honest rank uses up.
const EARLY_BYTES: usize = 64 << 20;

/// What an early frame counts besides its payload: its header, and its places in a list and a table.
const EARLY_FRAME_BYTES: usize = 256;

/// The largest vector that is copied through the rings of a host rather than reduced where it lies: the second takes
/// two messages one after the other.
pub(crate) const NEAR_SMALL_BYTES: usize = 16 << 10;

/// Hands a complete collective's result to those who wait for it.
pub(crate) type Publish = Box<dyn FnOnce() + Send>;

/// One collective in flight.
pub(crate) trait Collective: Send + Sync {
    /// Sends this rank's part. The result if nothing remains to be received.
    fn launch(&self, engine: &Engine) -> Result<Option<Publish>, CollectiveError>;

    /// Takes in a frame. The result for the one that completes the collective.
    fn handle_frame(
        &self,
        engine: &Engine,
        header: &Header,
        payload: Buffer,
    ) -> Result<Option<Publish>, CollectiveError>;

    /// Gives the waiters an error for a result.
    fn fail(&self, error: &CollectiveError);

    /// The ranks that still have to send something, and whether they have sent a part.
    fn missing(&self) -> Vec<(Rank, bool)>;

    /// The signature that goes with its frames, and the bytes of this rank's part, for the flight record.
    fn describe(&self) -> (u8, u64);
}

/// What a group has moved so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Bytes of frames handed to the transport.
    pub bytes_sent: u64,
    /// Bytes of frames that arrived.
    pub bytes_received: u64,
    /// Collectives completed.
    pub collectives: u64,
    /// Seconds from start to completion, summed over collectives (those that overlap count each).
    pub seconds: f64,
    /// Frames of an older generation, dropped.
    pub stale_frames: u64,
}

/// The state of one rank's group.
pub(crate) struct Engine {
    rank: Rank,
    world: u32,
    generation: Generation,
    timeout: Duration,
    transport: Option<Box<dyn Transport>>,
    /// The ranks of this host, once this rank shares memory with them.
    near: OnceLock<Arc<Neighbours>>,
    pool: Pool,
    flight: Flight,
    progress: Progress,
    state: Mutex<State>,
    early_space: Arc<Notify>,
    /// Of all peers.
    early_bytes: AtomicUsize,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    collectives: AtomicU64,
    nanoseconds: AtomicU64,
    stale_frames: AtomicU64,
}

struct State {
    failed: Option<CollectiveError>,
    in_flight: HashMap<Tag, InFlight>,
    /// What has been asked about collectives in flight.
    inquiries: HashMap<Tag, Inquiry>,
    early: HashMap<Tag, Vec<(Header, Buffer)>>,
    peers: Vec<Peer>,
}

struct InFlight {
    started: Instant,
    ticket: Ticket,
    collective: Arc<dyn Collective>,
}

#[derive(Clone)]
struct Peer {
    /// When it last sent a part of a collective, or got on by its own account.
    last_heard: Instant,
    questions: Questions,
    early_bytes: usize,
    /// How many of its ways here it has ended.
    ended: u32,
    left: bool,
}

impl Engine {
    /// The engine of `rank` among `world`. `transport` is absent only in a world of one.
    pub(crate) fn new(
        rank: Rank,
        world: u32,
        generation: Generation,
        timeout: Duration,
        transport: Option<Box<dyn Transport>>,
    ) -> Arc<Self> {
        let now = Instant::now();
        let peer =
            Peer { last_heard: now, questions: Questions::new(now), early_bytes: 0, ended: 0, left: false };
        Arc::new(Self {
            rank,
            world,
            generation,
            timeout,
            transport,
            near: OnceLock::new(),
            pool: Pool::default(),
            flight: Flight::new(),
            progress: Progress::new(),
            state: Mutex::new(State {
                failed: None,
                in_flight: HashMap::new(),
                inquiries: HashMap::new(),
                early: HashMap::new(),
                peers: vec![peer; world as usize],
            }),
            early_space: Arc::new(Notify::new()),
            early_bytes: AtomicUsize::new(0),
            bytes_sent: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
            collectives: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
            stale_frames: AtomicU64::new(0),
        })
    }

    pub(crate) fn rank(&self) -> Rank {
        self.rank
    }

    /// The other ranks, starting behind this one, so that not everybody sends to rank 0 first.
    pub(crate) fn others(&self) -> impl Iterator<Item = Rank> + use<> {
        let (rank, world) = (self.rank.0, self.world);
        (1..world).map(move |d| Rank((rank + d) % world))
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The shared memory with the ranks of this host, if there is any.
    pub(crate) fn near(&self) -> Option<&Arc<Neighbours>> {
        self.near.get()
    }

    /// `len` elements of arbitrary values, in shared memory where there is some and it matters.
    pub(crate) fn numbers<T: Element>(&self, len: usize) -> Numbers<T> {
        let bytes = len * size_of::<T>();
        let near = self.near().filter(|_| bytes > NEAR_SMALL_BYTES);
        match near.and_then(|near| near.allocate(bytes)) {
            Some(block) => Numbers::shared(block),
            None => Numbers::pooled(self.pool.take(bytes)),
        }
    }

    /// Begins to share memory with the ranks that `near` has.
    pub(crate) fn attach(self: &Arc<Self>, near: Arc<Neighbours>) -> std::io::Result<()> {
        if let Some(transport) = &self.transport {
            transport.attach(&near);
        }
        // Before anything can arrive from it.
        let near = self.near.get_or_init(|| near);
        near.serve(self)
    }

    pub(crate) fn failure(&self) -> Option<CollectiveError> {
        self.state.lock().failed.clone()
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats {
            bytes_sent: self.bytes_sent.load(Relaxed),
            bytes_received: self.bytes_received.load(Relaxed),
            collectives: self.collectives.load(Relaxed),
            seconds: Duration::from_nanos(self.nanoseconds.load(Relaxed)).as_secs_f64(),
            stale_frames: self.stale_frames.load(Relaxed),
        }
    }

    /// The flight record as it is now.
    pub(crate) fn flight(&self) -> FlightSnapshot {
        let (failure, in_flight) = {
            let state = self.state.lock();
            (state.failed.clone(), state.in_flight.iter().map(|(tag, e)| e.waiting(*tag)).collect())
        };
        self.flight.snapshot(in_flight, self.progress.idle(Instant::now()), failure)
    }

    /// For how long the oldest collective has been in flight.
    pub(crate) fn oldest_wait(&self) -> Option<Duration> {
        self.state.lock().in_flight.values().map(|entry| entry.started.elapsed()).max()
    }

    /// This rank computes.
    pub(crate) fn note_progress(&self) {
        self.progress.note(Instant::now());
    }

    /// How many collectives have been entered and have ended so far.
    pub(crate) fn flight_events(&self) -> u64 {
        self.flight.events()
    }

    /// A frame arrived from `from`.
    pub(crate) fn handle_frame(&self, from: Rank, header: Header, payload: Buffer) {
        self.bytes_received.fetch_add((crate::frame::HEADER_LEN + payload.len()) as u64, Relaxed);
        if header.generation < self.generation {
            self.stale_frames.fetch_add(1, Relaxed);
            return;
        }
        if let Some(detail) = self.refuse(from, &header) {
            return self.abort(CollectiveError::Protocol { rank: from, detail });
        }
        match header.stage {
            Stage::Ask => return self.handle_question(from, header.tag),
            Stage::Waiting => return self.handle_answer(from, header.tag, &payload),
            _ => {}
        }
        let collective = {
            let mut state = self.state.lock();
            if state.failed.is_some() {
                return;
            }
            let now = Instant::now();
            state.peers[from.index()].last_heard = now;
            match state.in_flight.get(&header.tag) {
                Some(entry) => {
                    self.progress.note(now);
                    entry.collective.clone()
                }
                None => {
                    let bytes = EARLY_FRAME_BYTES + payload.len();
                    state.peers[from.index()].early_bytes += bytes;
                    self.early_bytes.fetch_add(bytes, Relaxed);
                    state.early.entry(header.tag).or_default().push((header, payload));
                    return;
                }
            }
        };
        self.advance(header.tag, collective.handle_frame(self, &header, payload));
    }

    /// A transport cannot make sense of what `from` sent.
    pub(crate) fn handle_malformed(&self, from: Rank, detail: String) {
        self.abort(CollectiveError::Protocol { rank: from, detail });
    }

    /// The connection to `from` broke.
    pub(crate) fn handle_lost(&self, from: Rank, reason: String) {
        self.abort_if(|state| {
            if state.peers[from.index()].left {
                return None;
            }
            // Where none needs it, something does soon.
            let tag = state.oldest_that_needs(from).or_else(|| state.oldest());
            let at = tag.map(Moment::In).or_else(|| self.flight.newest().map(Moment::After));
            Some(CollectiveError::PeerLost { rank: from, at, reason })
        });
    }

    /// `from` left after it had sent everything on one of the ways here: the network, or shared memory.
    pub(crate) fn handle_left(&self, from: Rank) {
        let tag = {
            let ways = self.transport.as_ref().map_or(1, |transport| transport.ways(from));
            let mut state = self.state.lock();
            let peer = &mut state.peers[from.index()];
            peer.ended += 1;
            if peer.ended < ways {
                return;
            }
            peer.left = true;
            state.oldest_that_needs(from)
        };
        if tag.is_some() {
            self.abort(CollectiveError::PeerLeft { rank: from, tag });
        }
    }

    /// `from` ended the group and said why.
    pub(crate) fn handle_farewell(&self, from: Rank, farewell: Farewell) {
        let Farewell { culprit, message } = farewell;
        self.abort(CollectiveError::Forwarded { by: from, culprit, message });
    }

    /// What to await before reading more of `lane` from `from`, if it is far ahead of this rank. Check again after it.
    pub(crate) fn early_space(&self, from: Rank, lane: Lane) -> Option<OwnedNotified> {
        if !self.is_far_ahead(from, lane) {
            return None;
        }
        let freed = self.early_space.clone().notified_owned();
        self.is_far_ahead(from, lane).then_some(freed)
    }

    /// Whether nothing more should be read of `lane` from `from` for now: it is far ahead of this rank.
    pub(crate) fn is_far_ahead(&self, from: Rank, lane: Lane) -> bool {
        let most = match lane {
            Lane::Small => 2 * EARLY_BYTES,
            Lane::Bulk => EARLY_BYTES,
        };
        // Asked at every look at a ring, and hardly ever true.
        self.early_bytes.load(Relaxed) >= most && self.state.lock().peers[from.index()].early_bytes >= most
    }

    /// Starts a collective: sends this rank's part and takes in what arrived early.
    pub(crate) fn start(&self, tag: Tag, collective: Arc<dyn Collective>) -> Result<(), CollectiveError> {
        let early = {
            let mut state = self.state.lock();
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            if state.in_flight.contains_key(&tag) {
                return Err(CollectiveError::TagInUse(tag));
            }
            let started = Instant::now();
            self.progress.note(started);
            let (signature, bytes) = collective.describe();
            let ticket = self.flight.enter(Entry { tag, signature, bytes, entered: started });
            let entry = InFlight { started, ticket, collective: collective.clone() };
            state.in_flight.insert(tag, entry);
            let early = state.early.remove(&tag).unwrap_or_default();
            for (header, payload) in &early {
                let bytes = EARLY_FRAME_BYTES + payload.len();
                state.peers[header.source.index()].early_bytes -= bytes;
                self.early_bytes.fetch_sub(bytes, Relaxed);
            }
            early
        };
        if !early.is_empty() {
            self.early_space.notify_waiters();
            if let Some(near) = self.near() {
                near.nudge();
            }
        }
        // Before this rank's own part goes out: a peer that has it may be done and leave, and must by then not be
        // missed here for what it has already sent.
        for (header, payload) in early {
            self.advance(tag, collective.handle_frame(self, &header, payload));
        }
        self.advance(tag, collective.launch(self));
        let gone = {
            let state = self.state.lock();
            let mut gone = (0..self.world).map(Rank).filter(|r| state.peers[r.index()].left);
            gone.find(|&rank| state.needs(tag, rank))
        };
        if let Some(rank) = gone {
            self.abort(CollectiveError::PeerLeft { rank, tag: Some(tag) });
        }
        Ok(())
    }

    /// Queues a frame of a collective in flight.
    pub(crate) fn send(&self, to: Rank, lane: Lane, part: Part, payload: Vec<Bytes>) {
        let payload_len = payload.iter().map(Bytes::len).sum();
        let Part { tag, signature, stage, offset, total } = part;
        let header = Header {
            generation: self.generation,
            source: self.rank,
            tag,
            signature,
            stage,
            offset,
            total,
            payload_len,
        };
        if let Some(transport) = &self.transport {
            self.bytes_sent.fetch_add((crate::frame::HEADER_LEN + payload_len) as u64, Relaxed);
            transport.send(to, lane, Frame { header, payload });
        }
    }

    /// Fails every collective, pending and future, and tells the peers. Only the first cause counts.
    pub(crate) fn abort(&self, error: CollectiveError) {
        self.abort_if(|_| Some(error));
    }

    /// The same, if there is a cause.
    fn abort_if(&self, cause: impl FnOnce(&State) -> Option<CollectiveError>) {
        let (error, in_flight) = {
            let mut state = self.state.lock();
            if state.failed.is_some() {
                return;
            }
            let Some(error) = cause(&state) else { return };
            state.failed = Some(error.clone());
            state.early.clear();
            state.peers.iter_mut().for_each(|peer| peer.early_bytes = 0);
            self.early_bytes.store(0, Relaxed);
            (error, std::mem::take(&mut state.in_flight))
        };
        tracing::debug!(rank = self.rank.0, generation = self.generation.0, %error, "group ends");
        self.flight.fail(in_flight.iter().map(|(tag, entry)| entry.waiting(*tag)).collect());
        for entry in in_flight.values() {
            entry.collective.fail(&error);
        }
        self.wake_waiter();
        self.early_space.notify_waiters();
        if let Some(transport) = &self.transport {
            transport.abort(&Farewell { culprit: error.culprit(), message: error.first_cause() });
        }
    }

    /// Leaves in good order; the receivers are disconnected when everything sent has arrived.
    pub(crate) fn leave(&self) -> Vec<Receiver<()>> {
        self.transport.as_ref().map(|transport| transport.leave()).unwrap_or_default()
    }

    /// A result has come: the thread that reads the rings may be waiting for it.
    fn wake_waiter(&self) {
        if let Some(near) = self.near() {
            near.wake_waiter();
        }
    }

    fn refuse(&self, from: Rank, header: &Header) -> Option<String> {
        if header.generation > self.generation {
            Some(format!("a frame of {} in a group of {}", header.generation, self.generation))
        } else if header.source != from {
            Some(format!("a frame in the name of {}", header.source))
        } else {
            None
        }
    }

    fn advance(&self, tag: Tag, progress: Result<Option<Publish>, CollectiveError>) {
        match progress {
            Ok(None) => {}
            Ok(Some(publish)) => {
                let entry = {
                    let mut state = self.state.lock();
                    state.inquiries.remove(&tag);
                    state.in_flight.remove(&tag)
                };
                if let Some(entry) = entry {
                    self.collectives.fetch_add(1, Relaxed);
                    let ended = Instant::now();
                    self.progress.note(ended);
                    self.flight.complete(entry.ticket, ended);
                    self.nanoseconds.fetch_add((ended - entry.started).as_nanos() as u64, Relaxed);
                }
                publish();
                self.wake_waiter();
            }
            Err(error) => self.abort(error),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.early_space.notify_waiters();
        self.leave();
    }
}

impl InFlight {
    fn waiting(&self, tag: Tag) -> Waiting {
        let (signature, bytes) = self.collective.describe();
        let missing = self.collective.missing();
        Waiting::new(Entry { tag, signature, bytes, entered: self.started }, missing)
    }
}

impl State {
    fn needs(&self, tag: Tag, rank: Rank) -> bool {
        self.in_flight
            .get(&tag)
            .is_some_and(|entry| entry.collective.missing().iter().any(|&(missing, _)| missing == rank))
    }

    fn oldest_that_needs(&self, rank: Rank) -> Option<Tag> {
        let waiting = self.in_flight.iter().filter(|(tag, _)| self.needs(**tag, rank));
        waiting.min_by_key(|(_, entry)| entry.started).map(|(tag, _)| *tag)
    }

    fn oldest(&self) -> Option<Tag> {
        self.in_flight.iter().min_by_key(|(_, entry)| entry.started).map(|(tag, _)| *tag)
    }
}

/// What part of which collective a frame carries.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    pub(crate) tag: Tag,
    pub(crate) signature: u8,
    pub(crate) stage: Stage,
    pub(crate) offset: u64,
    pub(crate) total: u64,
}

impl Part {
    /// A message about a collective, not a part of it.
    fn about(tag: Tag, stage: Stage) -> Self {
        Self { tag, signature: 0, stage, offset: 0, total: 0 }
    }
}
