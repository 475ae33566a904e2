//! Looks after workers that cannot be reached and may be at work all the same, for as long as a job waits for them.
//!
//! A process that died while the coordinator was away, or cut off from it, left a closed port behind. Its host says so,
//! and the job need not wait for the end of the lease. It is believed only of addresses that are the worker's own, and
//! that did not refuse the same question while the worker was there: a NAT or a firewall may.

use super::hub::HubHandle;
use lockstep_common::ids::WorkerId;
use lockstep_common::net::port_is_closed;
use lockstep_common::wire::Register;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::JoinSet;

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(1);

/// How long a host may take to answer.
const PATIENCE: Duration = Duration::from_millis(500);

/// Looks after them until the hub has ended.
pub(super) async fn watch(hub: HubHandle) {
    while let Ok(absent) = hub.look(|hub| hub.absent()).await {
        let mut probes = JoinSet::new();
        for (worker, port) in absent {
            probes.spawn(async move { port_is_closed(port, PATIENCE).await.then_some((worker, port)) });
        }
        while let Some(probe) = probes.join_next().await {
            if let Ok(Some((worker, port))) = probe {
                hub.post(move |hub| hub.port_closed(worker, port));
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Finds out whether the host of a worker that has just connected from `peer` would say that its port is closed.
pub(super) async fn note_port(
    hub: &HubHandle,
    worker: WorkerId,
    number: u64,
    (peer, rtt): (SocketAddr, Duration),
    own: bool,
) {
    let patience = (4 * rtt).max(Duration::from_millis(100));
    let port = (own && !port_is_closed(peer, patience).await).then_some(peer);
    hub.post(move |hub| hub.note_port(worker, number, port));
}

/// Whether `peer` is an address of the worker itself, rather than one of something in between.
pub(super) fn is_own(register: &Register, peer: SocketAddr) -> bool {
    let same = |a: SocketAddr| a.ip().to_canonical() == peer.ip().to_canonical() && a.port() == peer.port();
    register.addresses.iter().any(|a| same(a.address))
}
