//! Connections between workers: accepting them, and forming a generation's group.

use crate::state::station::Station;
use lockstep_collectives::quic::{
    Lobby, MeshConfig, Notices, Peer, Visit, transport_config, verify_by_certificate,
};
use lockstep_collectives::{CollectiveError, Group};
use lockstep_common::ids::{Generation, JobId, Rank};
use lockstep_common::job::{CollectiveSpec, Reduction};
use lockstep_common::net::{Role, explain};
use lockstep_common::wire::Assignment;
use quinn::{ClientConfig, Endpoint};
use std::sync::Arc;
use std::time::Duration;

/// How long other ranks may prepare (fetch a checkpoint and their first samples) before they connect. A rank that
/// dies meanwhile is noticed by the coordinator, which then ends the wait.
const PREPARATION: Duration = Duration::from_secs(900);

/// How long another worker may take to let a visitor in: it may hear later of a new generation.
const VISIT: Duration = Duration::from_secs(40);

#[derive(Clone)]
pub(crate) struct Mesh {
    endpoint: Endpoint,
    client_config: ClientConfig,
    lobby: Arc<Lobby>,
    station: Arc<Station>,
}

impl Mesh {
    /// Accepts other workers on `endpoint`, in the background of the current runtime.
    pub(crate) fn listen(endpoint: Endpoint, mut client_config: ClientConfig) -> Self {
        client_config.transport_config(Arc::new(transport_config()));
        let lobby = Arc::new(Lobby::new());
        if let Err(error) = endpoint.local_addr().and_then(|address| lobby.listen(address)) {
            tracing::warn!(
                "cannot listen on this worker's port over TCP: {error}; other ranks may notice its death some seconds late"
            );
        }
        let station = Station::start(lobby.visitors());
        let mesh = Self { endpoint: endpoint.clone(), client_config, lobby: lobby.clone(), station };
        tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let lobby = lobby.clone();
                tokio::spawn(async move {
                    let from = incoming.remote_address();
                    match incoming.await {
                        Ok(connection) => {
                            if let Err(error) = lobby.handle(connection).await {
                                tracing::warn!("refused a worker's connection from {from}: {error}");
                            }
                        }
                        Err(error) => tracing::warn!("refused a connection from {from}: {}", explain(&error)),
                    }
                });
            }
        });
        mesh
    }

    /// Where this worker shows its training state.
    pub(crate) fn station(&self) -> &Arc<Station> {
        &self.station
    }

    /// A way to the desks of other workers, for `rank` of a generation.
    pub(crate) fn visit(&self, (job, generation): (JobId, Generation), rank: Rank) -> Visit {
        Visit {
            endpoint: self.endpoint.clone(),
            client_config: self.client_config.clone(),
            job,
            generation,
            rank,
            verify_peer: verify_by_certificate(),
            timeout: VISIT,
        }
    }

    /// Connects the ranks of `assignment`.
    pub(crate) async fn group(
        &self,
        assignment: &Assignment,
        reduction: Reduction,
        collective: &CollectiveSpec,
        notices: Notices,
    ) -> Result<Group, CollectiveError> {
        let placement = assignment.placement.clone();
        if assignment.peers.len() == 1 {
            return Group::solo(placement, reduction);
        }
        let incoming = self.lobby.expect(assignment.job, assignment.generation);
        let peers = assignment.peers.iter().filter(|p| p.rank != assignment.rank);
        let config = MeshConfig {
            endpoint: self.endpoint.clone(),
            client_config: self.client_config.clone(),
            job: assignment.job,
            generation: assignment.generation,
            rank: assignment.rank,
            peers: peers.map(peer).collect(),
            placement,
            reduction,
            backend: collective.backend,
            timeout: Duration::from_secs_f64(collective.timeout_s),
            connect_timeout: PREPARATION,
            incoming,
            verify_peer: verify_by_certificate(),
            notices,
        };
        let group = Group::connect(config).await;
        self.lobby.forget(assignment.job);
        group
    }
}

/// Another worker as the collectives know it.
pub(crate) fn peer(peer: &lockstep_common::wire::Peer) -> Peer {
    Peer {
        rank: peer.rank,
        worker: peer.worker,
        addresses: peer.addresses.clone(),
        server_name: Role::Worker(peer.worker).server_name(),
    }
}
