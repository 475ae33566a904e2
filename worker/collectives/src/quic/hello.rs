//! The first words on a connection between two ranks, and where accepted connections wait for their group.

use super::close;
use super::lifeline::{Landing, Lifeline, Secret};
use lockstep_common::ids::{Generation, JobId, Rank};
use lockstep_common::net::{Role, peer_role};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The version of everything ranks say to each other.
pub const PROTOCOL_VERSION: u16 = 2;

const HELLO_MAGIC: [u8; 4] = *b"LKSH";
/// Begins the greeting of one that forms no group here, and comes for the training state.
const VISIT_MAGIC: [u8; 4] = *b"LKSV";
const WELCOME_MAGIC: [u8; 4] = *b"LKSW";
/// Magic 4, version 2, job 8, generation 8, rank 4.
const HELLO_LEN: usize = 26;
/// Magic 4, version 2, rank 4, the lifeline's secret 16.
const WELCOME_LEN: usize = 26;

/// How long a connected peer may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// How many connections of one worker may wait for groups that this worker has not been told to form yet: it has one
/// rank of a job, and dials again when a connection breaks before this side has noticed.
const EARLY_CONNECTIONS: usize = 8;

/// Why a greeting failed.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The connection broke.
    #[error("the connection broke during the greeting: {0}")]
    Lost(String),
    /// The peer does not speak this protocol.
    #[error("the peer's greeting is not one between ranks")]
    Malformed,
    /// The peer runs another version.
    #[error(
        "the peer speaks version {0} of the ranks' protocol, this worker {PROTOCOL_VERSION}: run the same release everywhere"
    )]
    Version(u16),
    /// Another rank answered.
    #[error("{actual} answered instead of {expected}")]
    WrongRank {
        /// Who was called.
        expected: Rank,
        /// Who answered.
        actual: Rank,
    },
    /// The peer said no.
    #[error("refused: {0}")]
    Refused(String),
    /// The peer has too much to do with this worker's other connections.
    #[error("refused for now: {0}")]
    Busy(String),
    /// The peer said nothing.
    #[error("no greeting within {} s", HELLO_TIMEOUT.as_secs())]
    Silent,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Forming a group.
    Group,
    /// Looking at the state of the called rank; see [`Lobby::visitors`].
    Visit,
}

/// Who dials, and for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) purpose: Purpose,
    pub(crate) job: JobId,
    pub(crate) generation: Generation,
    pub(crate) rank: Rank,
}

impl Hello {
    fn encode(self) -> [u8; HELLO_LEN] {
        let mut out = [0; HELLO_LEN];
        out[..4].copy_from_slice(match self.purpose {
            Purpose::Group => &HELLO_MAGIC,
            Purpose::Visit => &VISIT_MAGIC,
        });
        out[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        out[6..14].copy_from_slice(&self.job.0.to_le_bytes());
        out[14..22].copy_from_slice(&self.generation.0.to_le_bytes());
        out[22..].copy_from_slice(&self.rank.0.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8; HELLO_LEN]) -> Result<Self, HelloError> {
        let purpose = if bytes[..4] == VISIT_MAGIC { Purpose::Visit } else { Purpose::Group };
        let magic = if purpose == Purpose::Visit { &VISIT_MAGIC } else { &HELLO_MAGIC };
        check_version(magic, bytes)?;
        Ok(Self {
            purpose,
            job: JobId(u64::from_le_bytes(field(bytes, 6))),
            generation: Generation(u64::from_le_bytes(field(bytes, 14))),
            rank: Rank(u32::from_le_bytes(field(bytes, 22))),
        })
    }
}

fn check_version(magic: &[u8; 4], bytes: &[u8]) -> Result<(), HelloError> {
    if bytes[..4] != *magic {
        return Err(HelloError::Malformed);
    }
    match u16::from_le_bytes(field(bytes, 4)) {
        PROTOCOL_VERSION => Ok(()),
        other => Err(HelloError::Version(other)),
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

/// The dialling side: says who this is and waits until the peer has formed the same group. Returns what the peer's
/// lifeline asks for.
pub(crate) async fn introduce(
    connection: &quinn::Connection,
    me: Hello,
    expected: Rank,
) -> Result<Secret, HelloError> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(lost)?;
    send.write_all(&me.encode()).await.map_err(|error| match error {
        quinn::WriteError::ConnectionLost(error) => lost(error),
        other => HelloError::Lost(other.to_string()),
    })?;
    let mut reply = [0; WELCOME_LEN];
    read(&mut recv, &mut reply).await?;
    check_version(&WELCOME_MAGIC, &reply)?;
    let actual = Rank(u32::from_le_bytes(field(&reply, 6)));
    if actual == expected { Ok(field(&reply, 10)) } else { Err(HelloError::WrongRank { expected, actual }) }
}

/// A connection whose peer has said which rank of which group it is, and waits to be welcomed.
#[derive(Debug)]
pub struct Accepted {
    connection: quinn::Connection,
    send: quinn::SendStream,
    hello: Hello,
    /// By its certificate.
    worker: Option<Role>,
    landing: Option<Arc<Landing>>,
}

impl Accepted {
    /// Reads the greeting on a connection that the endpoint accepted.
    ///
    /// A peer of another version, or one that says something else, is told so and closed.
    async fn read(connection: quinn::Connection) -> Result<Self, HelloError> {
        let greeting = async {
            let (send, mut recv) = connection.accept_bi().await.map_err(lost)?;
            let mut bytes = [0; HELLO_LEN];
            read(&mut recv, &mut bytes).await?;
            Ok((send, Hello::decode(&bytes)?))
        };
        match tokio::time::timeout(HELLO_TIMEOUT, greeting).await.unwrap_or(Err(HelloError::Silent)) {
            Ok((send, hello)) => {
                let worker = peer_role(&connection);
                Ok(Self { connection, send, hello, worker, landing: None })
            }
            Err(error) => {
                let reason = match error {
                    HelloError::Version(theirs) => format!(
                        "this worker speaks version {PROTOCOL_VERSION} of the ranks' protocol, you {theirs}: \
                         run the same release everywhere"
                    ),
                    _ => error.to_string(),
                };
                connection.close(close::REFUSED, reason.as_bytes());
                Err(error)
            }
        }
    }

    /// The rank the peer claims.
    pub fn rank(&self) -> Rank {
        self.hello.rank
    }

    /// The group that it is about.
    pub fn about(&self) -> (JobId, Generation) {
        (self.hello.job, self.hello.generation)
    }

    /// The connection, to check its certificate.
    pub fn connection(&self) -> &quinn::Connection {
        &self.connection
    }

    /// Tells the peer why it is not wanted.
    pub fn refuse(self, reason: &str) {
        self.connection.close(close::REFUSED, reason.as_bytes());
    }

    /// Tells the peer to come again.
    fn put_off(self, reason: &str) {
        self.connection.close(close::BUSY, reason.as_bytes());
    }

    /// Answers in the name of `rank`, this worker's.
    pub(super) async fn welcome(self, rank: Rank) -> Result<(quinn::Connection, Lifeline), HelloError> {
        let landing = self.landing.as_ref();
        let (secret, lifeline) =
            landing.map_or_else(|| (Secret::default(), Lifeline::none()), |landing| landing.invite());
        Ok((self.answer(rank, secret).await?, lifeline))
    }

    /// Lets a visitor in, in the name of `rank`, this worker's.
    pub async fn let_in(self, rank: Rank) -> Result<quinn::Connection, HelloError> {
        self.answer(rank, Secret::default()).await
    }

    async fn answer(mut self, rank: Rank, secret: Secret) -> Result<quinn::Connection, HelloError> {
        let mut reply = [0; WELCOME_LEN];
        reply[..4].copy_from_slice(&WELCOME_MAGIC);
        reply[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        reply[6..10].copy_from_slice(&rank.0.to_le_bytes());
        reply[10..].copy_from_slice(&secret);
        self.send.write_all(&reply).await.map_err(|error| HelloError::Lost(error.to_string()))?;
        Ok(self.connection)
    }
}

/// Where a worker's accepted connections wait until the group they are for is being formed.
///
/// A peer may hear of a new generation before this worker does, so connections for newer generations wait;
/// those for older ones are refused.
#[derive(Debug, Default)]
pub struct Lobby {
    state: Mutex<LobbyState>,
    landing: OnceLock<Arc<Landing>>,
}

#[derive(Debug, Default)]
struct LobbyState {
    expected: HashMap<JobId, Expected>,
    early: VecDeque<Accepted>,
    visitors: Option<UnboundedSender<Accepted>>,
}

#[derive(Debug)]
struct Expected {
    generation: Generation,
    door: UnboundedSender<Accepted>,
}

impl Lobby {
    /// An empty lobby.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens on TCP, in the background of the current runtime, for what tells at once that a peer's process has ended.
    /// `address` is the worker's endpoint's: the peers know no other.
    pub fn listen(&self, address: SocketAddr) -> std::io::Result<()> {
        // The first stays.
        let _ = self.landing.set(Arc::new(Landing::listen(address)?));
        Ok(())
    }

    /// The connections for `generation` of `job`, for [`MeshConfig`](super::MeshConfig).
    /// From here on those for older generations of the job are refused.
    pub fn expect(&self, job: JobId, generation: Generation) -> UnboundedReceiver<Accepted> {
        let (door, receiver) = unbounded_channel();
        let mut state = self.state.lock();
        state.expected.insert(job, Expected { generation, door });
        for accepted in std::mem::take(&mut state.early) {
            state.admit(accepted);
        }
        receiver
    }

    /// The connections of those that come for training state and not for a group: who they are is for the caller to check.
    /// Without this they are refused.
    pub fn visitors(&self) -> UnboundedReceiver<Accepted> {
        let (door, receiver) = unbounded_channel();
        self.state.lock().visitors = Some(door);
        receiver
    }

    /// Ends what [`expect`](Self::expect) began: connections for `job` wait again.
    pub fn forget(&self, job: JobId) {
        self.state.lock().expected.remove(&job);
    }

    /// Takes in a connection that the worker's endpoint accepted.
    pub async fn handle(&self, connection: quinn::Connection) -> Result<(), HelloError> {
        let mut accepted = Accepted::read(connection).await?;
        accepted.landing = self.landing.get().cloned();
        self.state.lock().admit(accepted);
        Ok(())
    }
}

impl LobbyState {
    fn admit(&mut self, accepted: Accepted) {
        let Hello { purpose, job, generation, .. } = accepted.hello;
        if purpose == Purpose::Visit {
            let returned = match &self.visitors {
                Some(door) => door.send(accepted).err().map(|returned| returned.0),
                None => Some(accepted),
            };
            if let Some(accepted) = returned {
                accepted.refuse("this worker shows no training state");
            }
            return;
        }
        match self.expected.get(&job) {
            Some(expected) if generation == expected.generation => {
                if let Err(returned) = expected.door.send(accepted) {
                    returned.0.refuse(&format!("{generation} of {job} is formed already, or has failed"));
                }
            }
            Some(expected) if generation < expected.generation => {
                let reason = format!("{generation} of {job} is over, it is at {}", expected.generation);
                accepted.refuse(&reason);
            }
            _ => {
                // Those that the peer has given up make room first.
                self.early.retain(|early| early.connection.close_reason().is_none());
                let its: Vec<_> = (0..self.early.len())
                    .filter(|&place| self.early[place].worker == accepted.worker)
                    .collect();
                if its.len() >= EARLY_CONNECTIONS
                    && let Some(oldest) = self.early.remove(its[0])
                {
                    oldest.put_off("too many of your connections wait for groups this worker does not know");
                }
                self.early.push_back(accepted);
            }
        }
    }
}

async fn read(recv: &mut quinn::RecvStream, into: &mut [u8]) -> Result<(), HelloError> {
    recv.read_exact(into).await.map_err(|error| match error {
        quinn::ReadExactError::FinishedEarly(_) => HelloError::Malformed,
        quinn::ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => lost(error),
        quinn::ReadExactError::ReadError(other) => HelloError::Lost(other.to_string()),
    })
}

fn lost(error: quinn::ConnectionError) -> HelloError {
    match error {
        quinn::ConnectionError::ApplicationClosed(frame) if frame.error_code == close::REFUSED => {
            HelloError::Refused(String::from_utf8_lossy(&frame.reason).into_owned())
        }
        quinn::ConnectionError::ApplicationClosed(frame) if frame.error_code == close::BUSY => {
            HelloError::Busy(String::from_utf8_lossy(&frame.reason).into_owned())
        }
        other => HelloError::Lost(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_survives_the_wire_and_another_version_is_named() {
        for purpose in [Purpose::Group, Purpose::Visit] {
            let hello = Hello { purpose, job: JobId(3), generation: Generation(7), rank: Rank(2) };
            let mut bytes = hello.encode();
            assert_eq!(Hello::decode(&bytes).unwrap(), hello);
            bytes[4] = 9;
            assert!(matches!(Hello::decode(&bytes), Err(HelloError::Version(9))));
            bytes[0] = 0;
            assert!(matches!(Hello::decode(&bytes), Err(HelloError::Malformed)));
        }
    }
}
