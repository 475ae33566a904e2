//! The UDP socket under an endpoint.
//!
//! QUIC's cost per packet is mostly the kernel's cost per system call, so what quinn sends in bursts of ten packets is
//! gathered into the largest writes that segmentation offload takes.

use parking_lot::Mutex;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};
use std::fmt;
use std::future::Future;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::sync::Notify;

/// Wanted socket buffers: two windows of a bulk stream, doubled, because a received packet holds up to twice its
/// length in kernel memory.
const BUFFER_BYTES: usize = 16 << 20;

/// The largest datagram taken: a jumbo Ethernet frame's.
pub(super) const MAX_DATAGRAM_BYTES: u16 = 9000;

/// The most bytes of one write: what an IP packet can hold, less the headers of IPv6 and UDP.
const WRITE_BYTES: usize = 65_487;

/// The most segments of one write in all kernels that have segmentation offload.
const WRITE_SEGMENTS: usize = 64;

/// How many writes are received in one go. More would not stay in a core's cache until they are decrypted.
const RECEIVE_BATCH: usize = 8;

/// Opens a socket with buffers as large as the kernel grants.
pub(super) fn open(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // A smaller grant is no error: without the privilege to go beyond it, `net.core.*mem_max` is the limit.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES).is_err() {
        let _ = socket.set_recv_buffer_size(BUFFER_BYTES);
    }
    if rustix::net::sockopt::set_socket_send_buffer_size_force(&socket, BUFFER_BYTES).is_err() {
        let _ = socket.set_send_buffer_size(BUFFER_BYTES);
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// How many bytes of packets the receive buffer of an endpoint's socket holds on this machine.
///
/// The kernel counts its own overhead, up to as much as the packets themselves, and reports twice what it grants.
pub fn receive_buffer_bytes() -> io::Result<usize> {
    Ok(open(SocketAddr::from(([127, 0, 0, 1], 0)))?.recv_buffer_size()? / 2)
}

/// A socket that gathers bursts to the same peer into large writes.
pub(super) struct GatheringSocket {
    io: tokio::net::UdpSocket,
    state: UdpSocketState,
    gathered: Mutex<Gathered>,
    /// Set while the kernel's send buffer is full.
    full: AtomicBool,
    /// Wakes the task that writes what no further burst has completed, or ends it.
    leftover: Arc<Notify>,
}

/// Segments that wait to be written.
#[derive(Default)]
struct Gathered {
    batch: Option<Batch>,
    bytes: Vec<u8>,
    /// How many of the bytes have been written.
    written: usize,
}

/// What the segments of one write have in common.
#[derive(Clone, Copy, PartialEq)]
struct Batch {
    destination: SocketAddr,
    source: Option<IpAddr>,
    ecn: Option<EcnCodepoint>,
    segment: usize,
}

impl Batch {
    fn of(transmit: &Transmit<'_>) -> Self {
        Self {
            destination: transmit.destination,
            source: transmit.src_ip,
            ecn: transmit.ecn,
            segment: transmit.segment_size.unwrap_or(transmit.contents.len()).max(1),
        }
    }

    /// The bytes of the largest write.
    fn most(&self) -> usize {
        (WRITE_BYTES / self.segment).clamp(1, WRITE_SEGMENTS) * self.segment
    }
}

impl Gathered {
    fn left(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Whether `batch` can go on behind what is here: only the last segment of a write may be short.
    fn takes(&self, batch: Batch) -> bool {
        self.left() == 0
            || self.batch == Some(batch)
                && self.left() < batch.most()
                && self.left().is_multiple_of(batch.segment)
    }

    fn add(&mut self, batch: Batch, contents: &[u8]) {
        if self.written > 0 {
            self.bytes.drain(..self.written);
            self.written = 0;
        }
        self.batch = Some(batch);
        self.bytes.extend_from_slice(contents);
    }
}

impl GatheringSocket {
    /// Wraps a bound, non-blocking socket. Needs a tokio runtime.
    pub(super) fn start(socket: Socket) -> io::Result<Arc<Self>> {
        let socket = std::net::UdpSocket::from(socket);
        let state = UdpSocketState::new((&socket).into())?;
        let leftover = Arc::new(Notify::new());
        let socket = Arc::new(Self {
            io: tokio::net::UdpSocket::from_std(socket)?,
            state,
            gathered: Mutex::default(),
            full: AtomicBool::new(false),
            leftover: leftover.clone(),
        });
        tokio::spawn(write_leftovers(Arc::downgrade(&socket), leftover));
        Ok(socket)
    }

    /// Writes what is gathered; unless `all`, only in writes of full size.
    fn write(&self, gathered: &mut Gathered, all: bool) -> io::Result<()> {
        let Some(batch) = gathered.batch else {
            return Ok(());
        };
        while gathered.left() >= if all { 1 } else { batch.most() } {
            let end = gathered.bytes.len().min(gathered.written + batch.most());
            let contents = &gathered.bytes[gathered.written..end];
            self.write_now(&Transmit {
                destination: batch.destination,
                ecn: batch.ecn,
                contents,
                segment_size: (contents.len() > batch.segment).then_some(batch.segment),
                src_ip: batch.source,
            })?;
            gathered.written = end;
        }
        if gathered.left() == 0 {
            gathered.bytes.clear();
            gathered.written = 0;
        }
        Ok(())
    }

    fn write_now(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let result = self.io.try_io(Interest::WRITABLE, || self.state.send((&self.io).into(), transmit));
        if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
            self.full.store(true, Relaxed);
        }
        result
    }

    /// A future that is ready when the kernel takes more.
    async fn writable(self: Arc<Self>) -> io::Result<()> {
        self.io.writable().await?;
        self.full.store(false, Relaxed);
        Ok(())
    }
}

impl Drop for GatheringSocket {
    fn drop(&mut self) {
        self.leftover.notify_one();
    }
}

/// Writes what waits once the runtime's thread has nothing else to do: until then, more may be gathered.
async fn write_leftovers(socket: Weak<GatheringSocket>, leftover: Arc<Notify>) {
    loop {
        leftover.notified().await;
        tokio::task::yield_now().await;
        let Some(socket) = socket.upgrade() else {
            return;
        };
        loop {
            let result = socket.write(&mut socket.gathered.lock(), true);
            match result {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if socket.clone().writable().await.is_err() {
                        break;
                    }
                }
                _ => break,
            }
        }
    }
}

impl AsyncUdpSocket for GatheringSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let batch = Batch::of(transmit);
        let mut gathered = self.gathered.lock();
        if !gathered.takes(batch) {
            self.write(&mut gathered, true)?;
        }
        if gathered.left() == 0 && transmit.segment_size.is_none() {
            return self.write_now(transmit);
        }
        gathered.add(batch, transmit.contents);
        // A burst of fewer or shorter packets than it could have is the last for now.
        let last = !transmit.contents.len().is_multiple_of(batch.segment) || transmit.segment_size.is_none();
        match self.write(&mut gathered, last) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => {
                if gathered.left() > 0 {
                    self.leftover.notify_one();
                }
                Ok(())
            }
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let batch = bufs.len().min(RECEIVE_BATCH);
        loop {
            ready!(self.io.poll_recv_ready(cx))?;
            let received = self
                .io
                .try_io(Interest::READABLE, || self.state.recv((&self.io).into(), &mut bufs[..batch], meta));
            // An error is a peer's answer to an earlier packet, which concerns one of many connections at most.
            if let Ok(received) = received {
                return Poll::Ready(Ok(received));
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        // quinn sizes its buffers by this times the largest datagram: a whole write of the peer has to fit.
        usize::from(u16::MAX).div_ceil(usize::from(MAX_DATAGRAM_BYTES))
    }
}

impl fmt::Debug for GatheringSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatheringSocket").field("io", &self.io).finish_non_exhaustive()
    }
}

/// One task's wait for space in the kernel's send buffer.
struct Writable {
    socket: Arc<GatheringSocket>,
    waiting: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>>,
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.waiting.is_none() && !self.socket.full.load(Relaxed) {
            return Poll::Ready(Ok(()));
        }
        let socket = self.socket.clone();
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(socket.writable()));
        let result = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(result)
    }
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writable").finish_non_exhaustive()
    }
}
