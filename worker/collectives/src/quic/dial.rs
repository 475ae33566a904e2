//! Reaching another rank under one of its addresses.

use super::hello::{self, Hello, HelloError, Purpose};
use super::lifeline::Lifeline;
use super::{Notices, Peer, VerifyPeer, close};
use crate::error::CollectiveError;
use lockstep_common::ids::{Generation, JobId, Rank};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// The first wait before a peer's addresses are tried again; it doubles up to ten times as much.
const RETRY: Duration = Duration::from_millis(50);

/// How long one address may take: several round trips of any link a group can live on.
const DIAL_TIMEOUT: Duration = Duration::from_secs(3);

/// The head start of each address over the next one, as long as a round trip around the world.
const STAGGER: Duration = Duration::from_millis(250);

/// For how long a peer is dialled, and who hears how that goes.
#[derive(Clone)]
pub(super) struct Patience {
    /// Until when a peer that answers may prepare.
    pub(super) deadline: Instant,
    /// How long none of its addresses may answer: its worker listens before it is given a job.
    pub(super) unreachable: Duration,
    pub(super) notices: Notices,
}

/// Connects to `peer` and waits until it has formed the same group.
pub(super) async fn dial(
    endpoint: quinn::Endpoint,
    tls: quinn::ClientConfig,
    peer: Peer,
    me: Hello,
    verify: VerifyPeer,
    Patience { deadline, unreachable, notices }: Patience,
) -> Result<(quinn::Connection, Lifeline), CollectiveError> {
    let failed = |detail: String| CollectiveError::Connect { rank: peer.rank, detail };
    let mut last = "time ran out".to_owned();
    let mut pause = RETRY;
    let mut silent_since = Instant::now();
    let mut told = false;
    while Instant::now() < deadline {
        let until = deadline.min(silent_since + unreachable);
        match dial_any(&endpoint, &tls, &peer, until).await {
            Err(reason) if Instant::now() >= silent_since + unreachable => {
                let seconds = unreachable.as_secs_f64();
                return Err(failed(format!("it cannot be reached: {reason}; tried for {seconds:.1} s")));
            }
            Err(reason) => {
                if !std::mem::replace(&mut told, true) {
                    let seconds = unreachable.as_secs_f64();
                    let (from, to) = (me.rank, peer.rank);
                    tracing::warn!("cannot reach {to}: {reason}; trying for {seconds:.1} s");
                    notices(&format!("{from} cannot reach {to}: {reason}; it tries for {seconds:.1} s"));
                }
                last = reason;
            }
            Ok(Reached { address, connection, passed_over }) => {
                if !verify(&connection, peer.worker) {
                    connection.close(close::REFUSED, b"not the expected worker");
                    return Err(failed(format!("{address} is not {}, by its certificate", peer.worker)));
                }
                match timeout_at(deadline, hello::introduce(&connection, me, peer.rank)).await {
                    Ok(Ok(secret)) => {
                        if me.purpose == Purpose::Visit {
                            return Ok((connection, Lifeline::none()));
                        }
                        tell((me.rank, peer.rank), address, &connection, &passed_over, &notices);
                        return Ok((connection, Lifeline::to(address, secret)));
                    }
                    Ok(Err(HelloError::Lost(reason) | HelloError::Busy(reason))) => {
                        last = format!("{address}: {reason}");
                    }
                    Ok(Err(error)) => return Err(failed(format!("{address}: {error}"))),
                    Err(_) => last = format!("{address}: connected, but it has not formed this group"),
                }
                silent_since = Instant::now();
                told = false;
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(RETRY * 10);
    }
    Err(failed(last))
}

/// A call on a rank of a group that the caller is not in.
pub struct Visit {
    /// The caller's endpoint.
    pub endpoint: quinn::Endpoint,
    /// Mutual TLS, with [`transport_config`](super::transport_config).
    pub client_config: quinn::ClientConfig,
    /// The job.
    pub job: JobId,
    /// The generation of the called group.
    pub generation: Generation,
    /// The caller's rank in that generation; any other number if it has none.
    pub rank: Rank,
    /// The check of the called rank's certificate: [`verify_by_certificate`](super::verify_by_certificate).
    pub verify_peer: VerifyPeer,
    /// How long the called rank may take to answer.
    pub timeout: Duration,
}

impl Visit {
    /// Connects to `peer`, whose [`Lobby::visitors`](super::Lobby::visitors) has let the caller in.
    pub async fn call(&self, peer: Peer) -> Result<quinn::Connection, CollectiveError> {
        let (job, generation, rank) = (self.job, self.generation, self.rank);
        let me = Hello { purpose: Purpose::Visit, job, generation, rank };
        let (endpoint, tls) = (self.endpoint.clone(), self.client_config.clone());
        let patience = Patience {
            deadline: Instant::now() + self.timeout,
            unreachable: self.timeout,
            notices: Arc::new(|_| {}),
        };
        let (connection, _) = dial(endpoint, tls, peer, me, self.verify_peer.clone(), patience).await?;
        Ok(connection)
    }
}

/// A peer's address that answered.
struct Reached {
    address: SocketAddr,
    connection: quinn::Connection,
    /// Those that it prefers to this one, and what became of them.
    passed_over: Vec<String>,
}

/// Says which way the two ranks' data goes: a fall to a slower network must not go unnoticed.
fn tell(
    (me, peer): (Rank, Rank),
    address: SocketAddr,
    connection: &quinn::Connection,
    passed_over: &[String],
    notices: &Notices,
) {
    let local = connection.local_ip().map(|ip| format!(" from {}", ip.to_canonical())).unwrap_or_default();
    if passed_over.is_empty() {
        tracing::info!("{me} -> {peer} over {address}, the preferred address{local}");
        return;
    }
    let line = format!(
        "{me} -> {peer} over {address}{local}, not the preferred address: {}; see that it can be reached, or choose another \
         with --advertise",
        passed_over.join("; ")
    );
    tracing::warn!("{line}");
    notices(&line);
}

/// Dials all of the peer's addresses, each a little after the one before, `until` some time, and takes the first that
/// answers.
async fn dial_any(
    endpoint: &quinn::Endpoint,
    tls: &quinn::ClientConfig,
    peer: &Peer,
    until: Instant,
) -> Result<Reached, String> {
    let mut attempts = JoinSet::new();
    for (place, &address) in peer.addresses.iter().enumerate() {
        let (endpoint, tls, name) = (endpoint.clone(), tls.clone(), peer.server_name.clone());
        attempts.spawn(async move {
            sleep(STAGGER * place as u32).await;
            (place, dial_address(&endpoint, &tls, address, &name).await)
        });
    }
    let mut reasons: Vec<_> =
        peer.addresses.iter().map(|address| format!("{address} has not answered")).collect();
    while let Ok(Some(attempt)) = timeout_at(until, attempts.join_next()).await {
        match attempt {
            Ok((place, Ok(connection))) => {
                reasons.truncate(place);
                return Ok(Reached { address: peer.addresses[place], connection, passed_over: reasons });
            }
            Ok((place, Err(reason))) => reasons[place] = format!("{}: {reason}", peer.addresses[place]),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    Err(if reasons.is_empty() { "it has no address".to_owned() } else { reasons.join("; ") })
}

async fn dial_address(
    endpoint: &quinn::Endpoint,
    tls: &quinn::ClientConfig,
    address: SocketAddr,
    server_name: &str,
) -> Result<quinn::Connection, String> {
    let connecting =
        endpoint.connect_with(tls.clone(), address, server_name).map_err(|error| error.to_string())?;
    match timeout(DIAL_TIMEOUT, connecting).await {
        Ok(connected) => connected.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {} s", DIAL_TIMEOUT.as_secs())),
    }
}
