//! What a group needs of whatever moves its frames.
//!
//! A transport delivers each lane's frames in order, exactly once, and calls the engine's `handle_*` methods
//! with what arrives and with what happened to the peers. It knows nothing of collectives.

use crate::frame::Header;
use bytes::Bytes;
use crossbeam_channel::Receiver;
use lockstep_common::ids::Rank;

/// Two ways to a peer, so that a large bucket never delays a small message.
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

    /// Ends all connections once everything queued has arrived; the receiver is disconnected then.
    fn leave(&self) -> Receiver<()>;
}
