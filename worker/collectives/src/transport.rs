//! What a group needs of whatever moves its frames.
//!
//! A transport delivers each lane's frames in order, exactly once, and calls the engine's `handle_*` methods
//! with what arrives and with what happened to the peers. It knows nothing of collectives.

use crate::frame::Header;
use crate::shm::Neighbours;
use bytes::Bytes;
use crossbeam_channel::Receiver;
use lockstep_common::ids::Rank;
use std::sync::{Arc, OnceLock};

/// Two ways to a peer, so that a large bucket does not hold up a small message: it is passed on before what the bucket
/// has not yet put on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Batch norm, commits, anything of one frame.
    Small,
    /// Pieces of large payloads.
    Bulk,
}

/// A frame to send. The payload is given in parts so that none has to be copied together.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) payload: Vec<Bytes>,
}

/// Why a group ended, as told to its peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Farewell {
    pub(crate) culprit: Option<Rank>,
    pub(crate) message: String,
}

/// Moves frames to the other ranks of a group.
pub(crate) trait Transport: Send + Sync {
    /// Queues a frame and returns at once. A frame to a peer that is gone is dropped: the engine hears of the
    /// loss by itself.
    fn send(&self, to: Rank, lane: Lane, frame: Frame);

    /// Ends all connections at once and tells the peers why.
    fn abort(&self, farewell: &Farewell);

    /// Ends all connections once everything queued has arrived; the receivers are disconnected then.
    fn leave(&self) -> Vec<Receiver<()>>;

    /// By how many ways frames of `peer` may come: it has left when it has ended all of them.
    fn ways(&self, _peer: Rank) -> u32 {
        1
    }

    /// From now on, frames to the ranks that `near` has travel through it.
    fn attach(&self, _near: &Arc<Neighbours>) {}
}

/// A network, and shared memory with those ranks that are on this host.
pub(crate) struct Mixed {
    far: Box<dyn Transport>,
    near: OnceLock<Arc<Neighbours>>,
}

impl Mixed {
    pub(crate) fn new(far: Box<dyn Transport>) -> Self {
        Self { far, near: OnceLock::new() }
    }
}

impl Transport for Mixed {
    fn send(&self, to: Rank, lane: Lane, frame: Frame) {
        match self.near.get().filter(|near| near.has(to)) {
            Some(near) => near.send(to, lane, frame),
            None => self.far.send(to, lane, frame),
        }
    }

    fn abort(&self, farewell: &Farewell) {
        if let Some(near) = self.near.get() {
            near.abort(farewell);
        }
        self.far.abort(farewell);
    }

    fn leave(&self) -> Vec<Receiver<()>> {
        let near = self.near.get().map(|near| near.leave());
        near.into_iter().flatten().chain(self.far.leave()).collect()
    }

    fn ways(&self, peer: Rank) -> u32 {
        if self.near.get().is_some_and(|near| near.has(peer)) { 2 } else { 1 }
    }

    fn attach(&self, near: &Arc<Neighbours>) {
        // The first stays: there is one shared memory per group.
        let _ = self.near.set(near.clone());
    }
}
