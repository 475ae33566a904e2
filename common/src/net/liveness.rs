//! Tells a dead peer from a silent one.
//!
//! A peer that is stopped or cut off for a moment must not count as dead, so idle time-outs are seconds. One that was
//! killed should be noticed sooner, and can be: its host answers a datagram to the port that nobody holds any more with
//! ICMP's "port unreachable". So a connection that should have brought a keep-alive and has not is probed.
//!
//! The probe is one byte, which is no QUIC packet and is dropped by a peer that lives. It comes from a socket of its own
//! that is connected to the peer, so that the kernel takes only an answer that quotes the probe's addresses and ports, one
//! of them random; and it counts only while the connection itself stays silent. Where a firewall drops ICMP, the idle
//! time-out remains. Where one refuses the probe itself, or a NAT that knows only the connection's own port, a peer that
//! lives is refused too: each connection is probed once at its beginning, and what is refused then proves nothing later.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How often a connection is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// How long a probe waits for its answer at least; two round trips if those are longer. A host sends one such ICMP
/// message a second to each other host, after a few at once, so a probe may well get none: what was on its way when the
/// peer died has used them up.
const PROBE: Duration = Duration::from_millis(100);

/// Waits until the peer's process is known to have ended, and returns how long it was silent before; `None` once the
/// connection has closed or is not `wanted` any more.
///
/// The peer is probed after `silence`, which should be some of its keep-alives.
pub async fn process_ended(
    connection: &quinn::Connection,
    silence: Duration,
    wanted: impl Fn() -> bool,
) -> Option<Duration> {
    let refused_at_first = refuses(connection).await;
    let first = received(connection);
    let mut heard = first;
    let mut heard_at = Instant::now();
    while connection.close_reason().is_none() && wanted() {
        let proves = !refused_at_first || heard == first;
        let probes = proves && heard_at.elapsed() >= silence;
        let refused = if probes { refuses(connection).await } else { false };
        let now = received(connection);
        if now != heard {
            (heard, heard_at) = (now, Instant::now());
        } else if refused {
            return Some(heard_at.elapsed());
        }
        if !probes {
            sleep(LOOK).await;
        }
    }
    None
}

/// Whether the host of `peer` says that nobody holds that port. The answer takes up to `patience`; none, or one that a
/// firewall swallows, means no.
pub async fn port_is_closed(peer: SocketAddr, patience: Duration) -> bool {
    probe(peer, None, patience).await.unwrap_or(false)
}

fn received(connection: &quinn::Connection) -> u64 {
    connection.stats().udp_rx.datagrams
}

/// Whether the peer's host says that nobody holds its port. Takes as long as a probe may.
async fn refuses(connection: &quinn::Connection) -> bool {
    let patience = PROBE.max(2 * connection.rtt());
    let end = Instant::now() + patience;
    let local = connection.local_ip();
    let refused = probe(connection.remote_address(), local, patience).await.unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot probe a silent peer");
        false
    });
    if !refused {
        // Also where the probe failed at once: no loop without a pause.
        sleep_until(end).await;
    }
    refused
}

async fn probe(peer: SocketAddr, local: Option<IpAddr>, patience: Duration) -> std::io::Result<bool> {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let any = if peer.is_ipv4() { [0u8; 4].into() } else { [0u16; 8].into() };
    // From the address that the connection uses, so that the probe takes the same way.
    let local = local.map_or(any, |ip| ip.to_canonical());
    let socket = UdpSocket::bind(SocketAddr::new(local, 0)).await?;
    socket.connect(peer).await?;
    socket.send(&[0]).await?;
    match timeout(patience, socket.recv(&mut [0])).await {
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
        Ok(Err(error)) => Err(error),
        // Nothing came, or something that is no answer.
        Ok(Ok(_)) | Err(_) => Ok(false),
    }
}
