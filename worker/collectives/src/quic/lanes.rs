//! The streams of a connection between two ranks, once both have said hello.

use super::lifeline::Lifeline;
use super::window::{ReceiveWindow, Windows};
use super::{close, watch};
use crate::buffer::Pool;
use crate::engine::Engine;
use crate::frame::{HEADER_LEN, Header};
use crate::transport::{Farewell, Frame, Lane, Transport};
use bytes::{BufMut, Bytes, BytesMut};
use crossbeam_channel::{Receiver, Sender, bounded};
use lockstep_common::ids::Rank;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// How long a rank that leaves waits for its last frames to arrive.
const LINGER: Duration = Duration::from_secs(5);

/// Payloads up to this size are copied behind their header, so that both leave in one write.
const JOIN_BYTES: usize = 4096;

/// The longest text of a farewell. It has to fit into one packet, or it is cut.
const FAREWELL_BYTES: usize = 900;

const LANES: [Lane; 2] = [Lane::Small, Lane::Bulk];

/// A connection whose lanes are open in both directions.
pub(crate) struct Link {
    pub(crate) rank: Rank,
    connection: quinn::Connection,
    send: [quinn::SendStream; 2],
    recv: [quinn::RecvStream; 2],
    lifeline: Lifeline,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    #[error(transparent)]
    Write(#[from] quinn::WriteError),
    #[error(transparent)]
    Read(#[from] quinn::ReadExactError),
    #[error("the peer did not open one lane of each kind")]
    Lanes,
}

impl Link {
    /// Opens this side's lanes and takes the peer's. Each begins with one byte that says which it is.
    pub(super) async fn open(
        connection: quinn::Connection,
        rank: Rank,
        lifeline: Lifeline,
    ) -> Result<Self, LinkError> {
        let send = [open_lane(&connection, Lane::Small).await?, open_lane(&connection, Lane::Bulk).await?];
        let mut recv = [None, None];
        for _ in LANES {
            let mut stream = connection.accept_uni().await?;
            let mut lane = [0];
            stream.read_exact(&mut lane).await?;
            match recv.get_mut(usize::from(lane[0])) {
                Some(place @ None) => *place = Some(stream),
                _ => return Err(LinkError::Lanes),
            }
        }
        match recv {
            [Some(small), Some(bulk)] => Ok(Self { rank, connection, send, recv: [small, bulk], lifeline }),
            _ => Err(LinkError::Lanes),
        }
    }
}

async fn open_lane(connection: &quinn::Connection, lane: Lane) -> Result<quinn::SendStream, LinkError> {
    let mut stream = connection.open_uni().await?;
    let priority = match lane {
        Lane::Small => 1,
        Lane::Bulk => 0,
    };
    // Fails only for a stream that is closed, and then the write below does too.
    let _ = stream.set_priority(priority);
    stream.write_all(&[lane as u8]).await?;
    Ok(stream)
}

/// Frames over QUIC.
pub(crate) struct QuicTransport {
    peers: Vec<Option<PeerLanes>>,
    drained: Receiver<()>,
}

struct PeerLanes {
    connection: quinn::Connection,
    queues: Mutex<Option<[UnboundedSender<Frame>; 2]>>,
}

/// The receiving ends, to be read once there is an engine.
pub(crate) struct Inboxes(Vec<LinkInbox>);

struct LinkInbox {
    rank: Rank,
    connection: quinn::Connection,
    recv: [quinn::RecvStream; 2],
    lifeline: Lifeline,
}

/// Starts the tasks that write, and hands out the streams to read.
pub(crate) fn start(links: Vec<Option<Link>>) -> (QuicTransport, Inboxes) {
    let (arrived, drained) = bounded(0);
    let mut inboxes = Vec::new();
    let peers = links.into_iter().map(|link| {
        let Link { rank, connection, send, recv, lifeline } = link?;
        let last = Arc::new(LastWriter { connection: connection.clone(), _arrived: arrived.clone() });
        let queues = send.map(|stream| {
            let (queue, frames) = unbounded_channel();
            tokio::spawn(write(stream, frames, last.clone()));
            queue
        });
        inboxes.push(LinkInbox { rank, connection: connection.clone(), recv, lifeline });
        Some(PeerLanes { connection, queues: Mutex::new(Some(queues)) })
    });
    let peers = peers.collect();
    (QuicTransport { peers, drained }, Inboxes(inboxes))
}

impl Transport for QuicTransport {
    fn send(&self, to: Rank, lane: Lane, frame: Frame) {
        let Some(peer) = self.peers.get(to.index()).and_then(Option::as_ref) else {
            return;
        };
        if let Some(queues) = &*peer.queues.lock() {
            // A closed queue means that the stream broke, which the reading side reports.
            let _ = queues[lane as usize].send(frame);
        }
    }

    fn abort(&self, farewell: &Farewell) {
        let reason = farewell.encode();
        for peer in self.peers.iter().flatten() {
            peer.connection.close(close::ABORTED, &reason);
            peer.queues.lock().take();
        }
    }

    fn leave(&self) -> Vec<Receiver<()>> {
        for peer in self.peers.iter().flatten() {
            peer.queues.lock().take();
        }
        vec![self.drained.clone()]
    }
}

/// Closes the connection when both of its lanes have been written to their end.
struct LastWriter {
    connection: quinn::Connection,
    _arrived: Sender<()>,
}

impl Drop for LastWriter {
    fn drop(&mut self) {
        self.connection.close(close::LEFT, b"");
    }
}

/// Writes a lane's frames until its queue is closed, then waits for the last to arrive. A broken stream ends
/// it early; the reading side says why.
async fn write(mut stream: quinn::SendStream, mut frames: UnboundedReceiver<Frame>, _last: Arc<LastWriter>) {
    while let Some(frame) = frames.recv().await {
        if stream.write_all_chunks(&mut chunks(frame)).await.is_err() {
            return;
        }
    }
    if stream.finish().is_ok() {
        // Whether the peer has it all, or time is up, nothing more can be done.
        let _ = tokio::time::timeout(LINGER, stream.stopped()).await;
    }
}

fn chunks(frame: Frame) -> Vec<Bytes> {
    let Frame { header, payload } = frame;
    if header.payload_len <= JOIN_BYTES {
        let mut joined = BytesMut::with_capacity(HEADER_LEN + header.payload_len);
        joined.put_slice(&header.encode());
        payload.iter().for_each(|part| joined.put_slice(part));
        return vec![joined.freeze()];
    }
    let header = Bytes::copy_from_slice(&header.encode());
    std::iter::once(header).chain(payload).collect()
}

impl Inboxes {
    /// Starts the tasks that bring arriving frames, and the peers' deaths, to `engine`. They end with it or with their
    /// connection.
    pub(crate) fn serve(self, engine: &Arc<Engine>) {
        let largest = Windows::largest();
        for LinkInbox { rank, connection, recv, lifeline } in self.0 {
            let window = Arc::new(ReceiveWindow::new(connection.clone(), largest));
            tokio::spawn(watch::watch(connection, rank, window.clone(), Arc::downgrade(engine), lifeline));
            let ended = Arc::new(AtomicU32::new(0));
            for (lane, stream) in LANES.into_iter().zip(recv) {
                let (engine, pool) = (Arc::downgrade(engine), engine.pool().clone());
                let inbox = Inbox { from: rank, lane, engine, pool, window: window.clone() };
                tokio::spawn(inbox.run(stream, ended.clone()));
            }
        }
    }
}

/// The reading end of one lane.
struct Inbox {
    from: Rank,
    lane: Lane,
    engine: Weak<Engine>,
    pool: Pool,
    window: Arc<ReceiveWindow>,
}

/// Why a lane brings nothing more.
enum End {
    /// The stream was finished at the end of a frame.
    Finished,
    Lost(quinn::ConnectionError),
    Malformed(String),
    /// This rank's group is gone.
    NobodyListens,
}

impl End {
    /// Whether the peer had sent all it had to send on this lane.
    fn is_orderly(&self) -> bool {
        match self {
            Self::Finished => true,
            Self::Lost(quinn::ConnectionError::ApplicationClosed(frame)) => frame.error_code == close::LEFT,
            _ => false,
        }
    }
}

impl Inbox {
    async fn run(self, mut stream: quinn::RecvStream, ended: Arc<AtomicU32>) {
        let end = loop {
            if let Err(end) = self.next(&mut stream).await {
                break end;
            }
        };
        let Some(engine) = self.engine.upgrade() else {
            return;
        };
        match end {
            // The other lane may still hold frames that have arrived and are not read yet.
            end if end.is_orderly() && ended.fetch_add(1, Relaxed) == 0 => {}
            end if end.is_orderly() => engine.handle_left(self.from),
            End::Finished | End::NobodyListens => {}
            End::Malformed(detail) => engine.handle_malformed(self.from, detail),
            End::Lost(quinn::ConnectionError::LocallyClosed) => {}
            End::Lost(quinn::ConnectionError::ApplicationClosed(frame)) => match frame.error_code {
                close::ABORTED => engine.handle_farewell(self.from, Farewell::decode(&frame.reason)),
                _ => engine.handle_lost(self.from, "its worker dropped the connection".to_owned()),
            },
            End::Lost(quinn::ConnectionError::TimedOut) => {
                engine.handle_lost(self.from, "its host or process has gone silent".to_owned());
            }
            End::Lost(error) => engine.handle_lost(self.from, error.to_string()),
        }
    }

    /// Brings one frame to the engine.
    async fn next(&self, stream: &mut quinn::RecvStream) -> Result<(), End> {
        let mut bytes = [0; HEADER_LEN];
        stream.read_exact(&mut bytes).await.map_err(|error| match error {
            quinn::ReadExactError::FinishedEarly(0) => End::Finished,
            error => broken(error),
        })?;
        let header = Header::decode(&bytes).map_err(|error| End::Malformed(error.to_string()))?;
        let mut payload = self.pool.take(header.payload_len);
        stream.read_exact(payload.bytes_mut()).await.map_err(broken)?;
        self.engine.upgrade().ok_or(End::NobodyListens)?.handle_frame(self.from, header, payload);
        // The engine must not be kept alive while waiting, or a dropped group could not leave.
        while let Some(freed) =
            self.engine.upgrade().ok_or(End::NobodyListens)?.early_space(self.from, self.lane)
        {
            let _pause = self.window.pause();
            freed.await;
        }
        Ok(())
    }
}

fn broken(error: quinn::ReadExactError) -> End {
    match error {
        quinn::ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => End::Lost(error),
        quinn::ReadExactError::ReadError(error) => End::Malformed(error.to_string()),
        quinn::ReadExactError::FinishedEarly(_) => End::Malformed("a stream ends inside a frame".to_owned()),
    }
}

impl Farewell {
    /// Rank at fault (all ones: unknown) and text.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let culprit = self.culprit.map_or(u32::MAX, |rank| rank.0);
        let text = &self.message.as_bytes()[..self.message.floor_char_boundary(FAREWELL_BYTES)];
        [&culprit.to_le_bytes()[..], text].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Self {
        let (culprit, text) = match bytes.split_first_chunk() {
            Some((culprit, text)) => (u32::from_le_bytes(*culprit), text),
            None => (u32::MAX, bytes),
        };
        let culprit = (culprit != u32::MAX).then_some(Rank(culprit));
        Self { culprit, message: String::from_utf8_lossy(text).into_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_farewell_survives_the_wire_and_is_cut_between_characters() {
        for culprit in [None, Some(Rank(3))] {
            let farewell = Farewell { culprit, message: "lost rank 3: süß".to_owned() };
            assert_eq!(Farewell::decode(&farewell.encode()), farewell);
        }
        let long = Farewell { culprit: None, message: "ü".repeat(1000) };
        assert_eq!(Farewell::decode(&long.encode()).message, "ü".repeat(FAREWELL_BYTES / 2));
        assert_eq!(Farewell::decode(b"ab"), Farewell { culprit: None, message: "ab".to_owned() });
    }
}
