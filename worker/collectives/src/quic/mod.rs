//! Ranks on different hosts, one QUIC connection per pair.
//!
//! The lower rank of a pair dials. Each side then opens two streams, one for small messages and one for bulk,
//! that last as long as the group, so no collective waits for a handshake or a stream's opening.

mod dial;
mod hello;
mod lanes;
mod lifeline;
mod pace;
mod watch;
mod window;

pub use dial::Visit;
pub use hello::{Accepted, HelloError, Lobby, PROTOCOL_VERSION};
pub(crate) use lanes::{Inboxes, QuicTransport};

use crate::error::CollectiveError;
use hello::{Hello, Purpose};
use lanes::Link;
use lifeline::Lifeline;
use lockstep_common::ids::{Generation, JobId, Rank, WorkerId};
use lockstep_common::job::{Backend, Reduction};
use lockstep_common::net::{Role, peer_role};
use lockstep_common::placement::Placement;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use window::Windows;

/// How a connection between ranks ends, as the application's close code.
pub(crate) mod close {
    use quinn::VarInt;
    /// Everything sent has arrived.
    pub(crate) const LEFT: VarInt = VarInt::from_u32(1);
    /// The connection is not wanted.
    pub(crate) const REFUSED: VarInt = VarInt::from_u32(2);
    /// The group failed; the reason holds a farewell.
    pub(crate) const ABORTED: VarInt = VarInt::from_u32(3);
    /// The connection is not wanted now, but another one later.
    pub(crate) const BUSY: VarInt = VarInt::from_u32(4);
}

/// Says whether a connection's certificate is that of the worker it should be.
pub type VerifyPeer = Arc<dyn Fn(&quinn::Connection, WorkerId) -> bool + Send + Sync>;

/// The check by the name in the certificate that the cluster's CA has signed.
pub fn verify_by_certificate() -> VerifyPeer {
    Arc::new(|connection, worker| peer_role(connection) == Some(Role::Worker(worker)))
}

/// Another rank of the group.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its rank.
    pub rank: Rank,
    /// The worker that has this rank.
    pub worker: WorkerId,
    /// Where it listens, the preferred address first.
    pub addresses: Vec<SocketAddr>,
    /// The name its certificate has to be valid for.
    pub server_name: String,
}

/// Told, in a line for people, what is wrong with the ways between ranks: a peer that does not answer yet, or only at an
/// address that it does not prefer.
pub type Notices = Arc<dyn Fn(&str) + Send + Sync>;

/// All that a rank needs to join its group.
pub struct MeshConfig {
    /// The worker's endpoint, which dials; what it accepts goes to a [`Lobby`].
    pub endpoint: quinn::Endpoint,
    /// Mutual TLS, with [`transport_config`].
    pub client_config: quinn::ClientConfig,
    /// The job.
    pub job: JobId,
    /// The generation of the job.
    pub generation: Generation,
    /// This rank.
    pub rank: Rank,
    /// All other ranks.
    pub peers: Vec<Peer>,
    /// Which rank owns which logical shards.
    pub placement: Placement,
    /// The order of addition.
    pub reduction: Reduction,
    /// What ranks of one host talk through.
    pub backend: Backend,
    /// How long to wait for a silent peer in every collective, and for one none of whose addresses answers.
    pub timeout: Duration,
    /// How long the peers may take to come: each prepares before it connects.
    pub connect_timeout: Duration,
    /// The connections from lower ranks, from [`Lobby::expect`].
    pub incoming: UnboundedReceiver<Accepted>,
    /// The check of a peer's certificate, done on both sides: [`verify_by_certificate`].
    pub verify_peer: VerifyPeer,
    /// Told of trouble on the way.
    pub notices: Notices,
}

/// Transport parameters for connections between ranks.
///
/// - The MTU starts at QUIC's 1200 bytes and is probed up to what a jumbo Ethernet frame holds.
/// - The windows are the largest that the kernel's receive buffer allows, until the round trip is known (`window.rs`).
/// - Congestion control of our own (`pace.rs`): Cubic collapses at 1% loss, and quinn's BBR keeps too little on its way
///   where round trips are shorter than a thread's wait for a core.
/// - A peer is gone after 5 s without a packet, twenty keep-alives; sooner if its host says so (`lifeline.rs`,
///   `watch.rs`).
pub fn transport_config() -> quinn::TransportConfig {
    /// Less the headers of IPv4 and UDP.
    const JUMBO_BYTES: u16 = 9000 - 28;
    const IDLE_MS: u32 = 5000;
    let Windows { stream, connection } = Windows::largest();
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(JUMBO_BYTES);
    let mut config = quinn::TransportConfig::default();
    config
        .initial_mtu(1200)
        .mtu_discovery_config(Some(discovery))
        .stream_receive_window(stream.into())
        .receive_window(connection.into())
        .send_window(connection.into())
        .initial_rtt(Duration::from_millis(50))
        .keep_alive_interval(Some(watch::KEEP_ALIVE))
        .max_idle_timeout(Some(quinn::VarInt::from_u32(IDLE_MS).into()))
        .congestion_controller_factory(Arc::new(pace::PaceConfig));
    config
}

/// Connects to all peers and opens the lanes.
pub(crate) async fn establish(config: MeshConfig) -> Result<(QuicTransport, Inboxes), CollectiveError> {
    check(&config)?;
    let deadline = Instant::now() + config.connect_timeout;
    let patience = dial::Patience { deadline, unreachable: config.timeout, notices: config.notices };
    let me =
        Hello { purpose: Purpose::Group, job: config.job, generation: config.generation, rank: config.rank };
    let (lower, higher): (Vec<_>, Vec<_>) = config.peers.into_iter().partition(|p| p.rank < config.rank);
    let mut tasks = JoinSet::new();
    for peer in higher {
        let (endpoint, tls) = (config.endpoint.clone(), config.client_config.clone());
        let (verify, patience) = (config.verify_peer.clone(), patience.clone());
        tasks.spawn(async move {
            let rank = peer.rank;
            let (connection, lifeline) = dial::dial(endpoint, tls, peer, me, verify, patience).await?;
            open(connection, rank, lifeline, deadline).await
        });
    }
    let verify = config.verify_peer;
    tasks.spawn(accept(config.rank, lower, config.incoming, verify, deadline));
    let world = config.placement.world_size() as usize;
    let mut links: Vec<_> = (0..world).map(|_| None).collect();
    while let Some(joined) = tasks.join_next().await {
        let opened = joined.unwrap_or_else(|error| {
            Err(CollectiveError::Config(format!("a task that connects ranks ended early: {error}")))
        })?;
        for link in opened {
            let place = link.rank.index();
            links[place] = Some(link);
        }
    }
    Ok(lanes::start(links))
}

fn check(config: &MeshConfig) -> Result<(), CollectiveError> {
    let mut ranks: Vec<_> = config.peers.iter().map(|peer| peer.rank).chain([config.rank]).collect();
    ranks.sort_unstable();
    if ranks.into_iter().eq((0..config.placement.world_size()).map(Rank)) {
        return Ok(());
    }
    Err(CollectiveError::Config(format!(
        "{} and its {} peers are not the {} ranks of the placement",
        config.rank,
        config.peers.len(),
        config.placement.world_size()
    )))
}

async fn accept(
    me: Rank,
    lower: Vec<Peer>,
    mut incoming: UnboundedReceiver<Accepted>,
    verify: VerifyPeer,
    deadline: Instant,
) -> Result<Vec<Link>, CollectiveError> {
    let mut links: Vec<Link> = Vec::with_capacity(lower.len());
    loop {
        let Some(missing) = lower.iter().find(|peer| links.iter().all(|link| link.rank != peer.rank)) else {
            return Ok(links);
        };
        let failed =
            |detail: &str| CollectiveError::Connect { rank: missing.rank, detail: detail.to_owned() };
        let accepted = match timeout_at(deadline, incoming.recv()).await {
            Ok(Some(accepted)) => accepted,
            Ok(None) => return Err(failed("this worker accepts no connections any more")),
            Err(_) => return Err(failed("it has not dialled this rank in time")),
        };
        let Some(peer) = lower.iter().find(|peer| peer.rank == accepted.rank()) else {
            accepted.refuse("not a rank that dials this one");
            continue;
        };
        if !verify(accepted.connection(), peer.worker) {
            tracing::warn!(rank = peer.rank.0, worker = %peer.worker, "refused a rank with another worker's certificate");
            accepted.refuse("not the expected worker");
            continue;
        }
        let rank = peer.rank;
        let opened = match timeout_at(deadline, accepted.welcome(me)).await {
            Ok(Ok((connection, lifeline))) => {
                tracing::info!("{rank} -> {me}: dialled from {}", connection.remote_address());
                open(connection, rank, lifeline, deadline).await
            }
            Ok(Err(error)) => Err(failed(&error.to_string())),
            Err(_) => Err(failed("time ran out while greeting it")),
        };
        // A dialler whose first attempt broke comes again; the newer connection is the live one.
        match opened {
            Ok(opened) => {
                links.retain(|link| link.rank != rank);
                links.extend(opened);
            }
            Err(error) => {
                tracing::warn!(rank = rank.0, %error, "a rank's connection broke while greeting it")
            }
        }
    }
}

async fn open(
    connection: quinn::Connection,
    rank: Rank,
    lifeline: Lifeline,
    deadline: Instant,
) -> Result<Vec<Link>, CollectiveError> {
    let failed = |detail: String| CollectiveError::Connect { rank, detail };
    match timeout_at(deadline, Link::open(connection, rank, lifeline)).await {
        Ok(opened) => opened.map(|link| vec![link]).map_err(|error| failed(error.to_string())),
        Err(_) => Err(failed("time ran out while opening its lanes".to_owned())),
    }
}
