//! How two processes swap descriptors, and how each learns that the other is gone.
//!
//! One side binds a Unix socket with a random name and tells the other that name and a secret, over a connection
//! that is authenticated already. The name is abstract: there is no file to clean up, it ends with its process,
//! and it exists in one network namespace only. Each side proves that it knows the secret before it gets
//! descriptors; the secret itself is not sent. The socket then stays open and idle, as a [`Lifeline`].
//!
//! ```text
//! connecting                 listening
//!    │ proof ──────────────────▶ │
//!    │ ◀───── proof, sizes, descriptors
//!    │ sizes, descriptors ─────▶ │
//! ```

use super::arena::{Arena, PeerArena};
use super::doorbell::Doorbell;
use super::segment::Segment;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, timeout, timeout_at};

/// Ring segment, doorbell, arena.
const DESCRIPTORS: usize = 3;

/// Two sizes: of the ring segment and of the arena.
const SIZES_BYTES: usize = 16;

/// A connection that says nothing for this long is a stranger's: the peer's proof is its first act.
const STRANGER_PATIENCE: Duration = Duration::from_secs(1);

/// Why two ranks of one host could not share memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IntroduceError {
    #[error("shared memory: no random numbers: {0}")]
    Random(getrandom::Error),
    #[error("shared memory: cannot bind a Unix socket: {0}")]
    Bind(io::Error),
    #[error("shared memory: cannot reach the peer's Unix socket: {0}")]
    Connect(io::Error),
    #[error("shared memory: the peer did not introduce itself in time")]
    Deadline,
    #[error("shared memory: the peer's process runs as user {theirs}, this one as user {ours}")]
    User { ours: u32, theirs: u32 },
    #[error("shared memory: the process at the peer's Unix socket is another: it does not know the secret")]
    Secret,
    #[error("shared memory: the peer sent {0} descriptors instead of {DESCRIPTORS}")]
    Descriptors(usize),
    #[error("shared memory: the connection to the peer broke: {0}")]
    Broken(#[from] io::Error),
    #[error("shared memory: cannot map the peer's memory: {0}")]
    Map(io::Error),
}

/// What the listening side tells the other, in confidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Invitation {
    /// The Unix socket's abstract name is made of it.
    pub(crate) name: [u8; 16],
    pub(crate) secret: [u8; 32],
}

/// What this rank gives a peer.
pub(crate) struct Offer<'a> {
    /// Holds the rings of what this rank sends to the peer. Both sides' have the same size.
    pub(crate) ring: &'a Segment,
    /// This rank's.
    pub(crate) doorbell: &'a Doorbell,
    /// This rank's.
    pub(crate) arena: &'a Arena,
}

/// What a peer gave, checked and mapped.
pub(crate) struct Peer {
    /// Holds the rings of what the peer sends to this rank.
    pub(crate) ring: Arc<Segment>,
    /// To wake the peer.
    pub(crate) doorbell: Doorbell,
    pub(crate) arena: PeerArena,
    pub(crate) lifeline: Lifeline,
}

/// Waits for one peer.
pub(crate) struct Listener {
    socket: UnixListener,
    invitation: Invitation,
}

/// A socket on which nothing is said: the kernel closes it when the peer's process ends, however it ends.
pub(crate) struct Lifeline(UnixStream);

impl Invitation {
    /// A leading zero byte makes a name abstract.
    fn address(&self) -> String {
        format!("\0lockstep-{:032x}", u128::from_be_bytes(self.name))
    }

    fn proof(&self, side: Side) -> blake3::Hash {
        let side: &[u8] = match side {
            Side::Connecting => b"lockstep shared memory: connecting",
            Side::Listening => b"lockstep shared memory: listening",
        };
        blake3::keyed_hash(&self.secret, side)
    }
}

#[derive(Clone, Copy)]
enum Side {
    Connecting,
    Listening,
}

impl Listener {
    /// Binds a socket with a name that nobody can guess. Needs a tokio runtime.
    pub(crate) fn bind() -> Result<Self, IntroduceError> {
        let mut invitation = Invitation { name: [0; 16], secret: [0; 32] };
        getrandom::fill(&mut invitation.name).map_err(IntroduceError::Random)?;
        getrandom::fill(&mut invitation.secret).map_err(IntroduceError::Random)?;
        let socket = UnixListener::bind(invitation.address()).map_err(IntroduceError::Bind)?;
        Ok(Self { socket, invitation })
    }

    /// To be sent to the peer.
    pub(crate) fn invitation(&self) -> &Invitation {
        &self.invitation
    }

    /// Waits for the peer and swaps descriptors with it. Strangers, whom anybody on this host may send, are
    /// turned away and waited past.
    pub(crate) async fn accept(self, offer: &Offer<'_>, deadline: Instant) -> Result<Peer, IntroduceError> {
        let meet = async {
            loop {
                let (mut stream, _) = self.socket.accept().await?;
                match timeout(STRANGER_PATIENCE, self.recognise(&mut stream)).await {
                    Ok(Ok(())) => return self.swap(stream, offer).await,
                    Ok(Err(refusal)) => tracing::warn!(%refusal, "turned away a connection to shared memory"),
                    Err(_) => tracing::warn!("turned away a silent connection to shared memory"),
                }
            }
        };
        timeout_at(deadline, meet).await.unwrap_or(Err(IntroduceError::Deadline))
    }

    async fn recognise(&self, stream: &mut UnixStream) -> Result<(), IntroduceError> {
        check_user(stream)?;
        check_proof(stream, self.invitation.proof(Side::Connecting)).await
    }

    async fn swap(&self, mut stream: UnixStream, offer: &Offer<'_>) -> Result<Peer, IntroduceError> {
        stream.write_all(self.invitation.proof(Side::Listening).as_bytes()).await?;
        send(&stream, offer).await?;
        receive(stream, offer).await
    }
}

/// Answers an invitation: swaps descriptors with the peer that listens.
pub(crate) async fn connect(
    invitation: &Invitation,
    offer: &Offer<'_>,
    deadline: Instant,
) -> Result<Peer, IntroduceError> {
    let meet = async {
        let mut stream = UnixStream::connect(invitation.address()).await.map_err(IntroduceError::Connect)?;
        check_user(&stream)?;
        stream.write_all(invitation.proof(Side::Connecting).as_bytes()).await?;
        check_proof(&mut stream, invitation.proof(Side::Listening)).await?;
        send(&stream, offer).await?;
        receive(stream, offer).await
    };
    timeout_at(deadline, meet).await.unwrap_or(Err(IntroduceError::Deadline))
}

/// The kernel vouches for who is at the other end.
fn check_user(stream: &UnixStream) -> Result<(), IntroduceError> {
    let (ours, theirs) = (rustix::process::geteuid().as_raw(), stream.peer_cred()?.uid());
    if ours == theirs { Ok(()) } else { Err(IntroduceError::User { ours, theirs }) }
}

async fn check_proof(stream: &mut UnixStream, expected: blake3::Hash) -> Result<(), IntroduceError> {
    let mut proof = [0; blake3::OUT_LEN];
    stream.read_exact(&mut proof).await?;
    // blake3's hashes compare in constant time.
    if blake3::Hash::from_bytes(proof) == expected { Ok(()) } else { Err(IntroduceError::Secret) }
}

async fn send(stream: &UnixStream, offer: &Offer<'_>) -> Result<(), IntroduceError> {
    let mut sizes = [0; SIZES_BYTES];
    sizes[..8].copy_from_slice(&(offer.ring.len() as u64).to_le_bytes());
    sizes[8..].copy_from_slice(&offer.arena.bytes().to_le_bytes());
    let descriptors = [offer.ring.fd(), offer.doorbell.fd(), offer.arena.fd()];
    let sent = stream.async_io(Interest::WRITABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("no room for descriptors"));
        }
        Ok(rustix::net::sendmsg(stream, &[IoSlice::new(&sizes)], &mut control, SendFlags::NOSIGNAL)?)
    });
    // A Unix socket's buffer is empty now and far larger than this.
    if sent.await? == SIZES_BYTES { Ok(()) } else { Err(io::Error::from(io::ErrorKind::WriteZero).into()) }
}

async fn receive(stream: UnixStream, offer: &Offer<'_>) -> Result<Peer, IntroduceError> {
    let mut sizes = [0; SIZES_BYTES];
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    let mut have = 0;
    while have < SIZES_BYTES {
        let got = stream.async_io(Interest::READABLE, || {
            // What does not fit in here is closed by the kernel, what is not expected by the vector's drop.
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let iov = &mut [IoSliceMut::new(&mut sizes[have..])];
            let got = rustix::net::recvmsg(&stream, iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    descriptors.extend(rights);
                }
            }
            let cut = got.flags.contains(ReturnFlags::CTRUNC);
            if cut { Err(io::Error::other("more descriptors than expected")) } else { Ok(got.bytes) }
        });
        match got.await? {
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            bytes => have += bytes,
        }
    }
    let word = |from: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&sizes[from..from + 8]);
        u64::from_le_bytes(bytes)
    };
    let (ring_bytes, arena_bytes) = (word(0), word(8));
    let [ring, doorbell, arena] = <[OwnedFd; DESCRIPTORS]>::try_from(descriptors)
        .map_err(|wrong| IntroduceError::Descriptors(wrong.len()))?;
    if ring_bytes != offer.ring.len() as u64 {
        let what = format!("its rings take {ring_bytes} bytes, ours {}", offer.ring.len());
        return Err(IntroduceError::Map(io::Error::new(io::ErrorKind::InvalidData, what)));
    }
    Ok(Peer {
        ring: Arc::new(Segment::open(ring, offer.ring.len()).map_err(IntroduceError::Map)?),
        doorbell: Doorbell::open(doorbell).map_err(IntroduceError::Map)?,
        arena: PeerArena::open(arena, arena_bytes).map_err(IntroduceError::Map)?,
        lifeline: Lifeline(stream),
    })
}

impl Lifeline {
    /// Ends when the peer's process has ended, or has dropped its end.
    pub(crate) async fn broken(&self) {
        let mut unexpected = [0; 64];
        loop {
            if self.0.readable().await.is_err() {
                return;
            }
            match self.0.try_read(&mut unexpected) {
                Ok(0) => return,
                // Nothing should be said here, but words are a sign of life.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }
}
