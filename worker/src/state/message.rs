//! What a visitor and a desk say to each other: one stream for each question.

use super::pack::{Manifest, StateId};
use super::update::UpdateHead;
use lockstep_common::wire::{FrameError, Position, read_frame, write_frame};
use quinn::{Connection, RecvStream, SendStream};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

/// How long a question may take to arrive.
const QUESTION: Duration = Duration::from_secs(5);

/// The most bytes that a ledger may have: above what one hands on.
const MAX_LEDGER_BYTES: u32 = 32 << 20;

/// A visitor's question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Ask {
    /// From a rank of the generation: the state that this rank starts from.
    State,
    /// One chunk of a state.
    Chunk {
        /// The state.
        of: StateId,
        /// Which.
        chunk: u32,
    },
    /// From one that wants to join: a state, and then the updates that follow it, as [`News`].
    Follow,
}

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// To [`Ask::State`] and [`Ask::Follow`]. The ledger's bytes come after it.
    State {
        /// The state's.
        manifest: Manifest,
        /// How many.
        ledger_bytes: u32,
    },
    /// To [`Ask::Chunk`]. The chunk's bytes come after it.
    Chunk,
    /// What was asked for is not here, or not any more.
    NotHere {
        /// Why.
        reason: String,
    },
}

/// What a follower hears after its state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum News {
    /// A phase has been applied. The gradients' bytes come after it.
    Update {
        /// The rest of it.
        head: Box<UpdateHead>,
        /// How far the rank is that tells.
        newest: Position,
    },
    /// The generation has ended here; there are no more updates.
    End,
    /// This follower was too slow.
    Overflow,
}

/// A stream that can be read from in frames and bytes.
pub(super) struct Question {
    pub(super) send: SendStream,
    pub(super) recv: RecvStream,
}

impl Question {
    /// Asks.
    pub(super) async fn ask(connection: &Connection, ask: &Ask) -> Result<Self, FrameError> {
        let (mut send, recv) = connection.open_bi().await.map_err(lost)?;
        write_frame(&mut send, ask).await?;
        // The desk reads one question a stream.
        let _ = send.finish();
        Ok(Self { send, recv })
    }

    /// Hears a question.
    pub(super) async fn hear(connection: &Connection) -> Result<(Self, Ask), FrameError> {
        let (send, mut recv) = connection.accept_bi().await.map_err(lost)?;
        let ask = timeout(QUESTION, read_frame(&mut recv)).await;
        let ask = ask.unwrap_or(Err(FrameError::Closed))?;
        Ok((Self { send, recv }, ask))
    }

    /// The answer.
    pub(super) async fn answer(&mut self) -> Result<Answer, FrameError> {
        read_frame(&mut self.recv).await
    }

    /// The ledger that follows an answer.
    pub(super) async fn ledger(&mut self, bytes: u32) -> Result<Vec<u8>, FrameError> {
        if bytes > MAX_LEDGER_BYTES {
            return Err(FrameError::TooLarge { bytes: bytes as usize });
        }
        self.bytes(bytes as usize).await
    }

    /// So many bytes; memory grows with what has arrived.
    pub(super) async fn bytes(&mut self, bytes: usize) -> Result<Vec<u8>, FrameError> {
        let mut buffer = Vec::new();
        (&mut self.recv).take(bytes as u64).read_to_end(&mut buffer).await?;
        if buffer.len() < bytes {
            return Err(FrameError::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(buffer)
    }
}

fn lost(error: quinn::ConnectionError) -> FrameError {
    FrameError::Io(error.into())
}
