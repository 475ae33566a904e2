//! Workers with certificates of one CA, each with an endpoint on the loopback interface.

use lockstep_collectives::quic::{Lobby, MeshConfig, Peer, transport_config, verify_by_certificate};
use lockstep_collectives::{CollectiveError, Group};
use lockstep_common::ids::{Generation, JobId, Rank, WorkerId};
use lockstep_common::job::{Backend, Reduction};
use lockstep_common::net::{self, Authority, Role};
use lockstep_common::placement::Placement;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;

pub(crate) const JOB: JobId = JobId(1);
pub(crate) const GENERATION: Generation = Generation(4);

/// One worker. Its runtime is its own, so that it can die alone.
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) runtime: Runtime,
    pub(crate) endpoint: quinn::Endpoint,
    pub(crate) client_config: quinn::ClientConfig,
    pub(crate) lobby: Arc<Lobby>,
}

/// `count` workers, w10, w11, and so on.
pub(crate) fn workers(count: u32) -> Vec<Worker> {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path()).unwrap();
    (0..count).map(|i| worker(&authority, WorkerId(10 + u64::from(i)))).collect()
}

/// The worker `id`.
pub(crate) fn worker(authority: &Authority, id: WorkerId) -> Worker {
    let identity = authority.issue(Role::Worker(id)).unwrap();
    let transport = Arc::new(transport_config());
    let mut server_config = net::server_config(&identity, false).unwrap();
    server_config.transport_config(transport.clone());
    let mut client_config = net::client_config(&identity).unwrap();
    client_config.transport_config(transport);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let lobby = Arc::new(Lobby::new());
    let endpoint = runtime.block_on(async {
        let endpoint = net::bind(SocketAddr::from(([127, 0, 0, 1], 0)), Some(server_config)).unwrap();
        lobby.listen(endpoint.local_addr().unwrap()).unwrap();
        tokio::spawn(serve(endpoint.clone(), lobby.clone()));
        endpoint
    });
    Worker { id, runtime, endpoint, client_config, lobby }
}

async fn serve(endpoint: quinn::Endpoint, lobby: Arc<Lobby>) {
    while let Some(incoming) = endpoint.accept().await {
        let lobby = lobby.clone();
        tokio::spawn(async move {
            if let Ok(connection) = incoming.await {
                // A refusal is what some tests look for, on the other side.
                let _ = lobby.handle(connection).await;
            }
        });
    }
}

impl Worker {
    pub(crate) fn peer(&self, rank: u32) -> Peer {
        Peer {
            rank: Rank(rank),
            worker: self.id,
            addresses: vec![self.endpoint.local_addr().unwrap()],
            server_name: Role::Worker(self.id).server_name(),
        }
    }

    pub(crate) fn config(
        &self,
        rank: u32,
        peers: Vec<Peer>,
        placement: &Placement,
        timeout: Duration,
    ) -> MeshConfig {
        MeshConfig {
            endpoint: self.endpoint.clone(),
            client_config: self.client_config.clone(),
            job: JOB,
            generation: GENERATION,
            rank: Rank(rank),
            peers,
            placement: placement.clone(),
            reduction: Reduction::Exact,
            backend: Backend::Quic,
            timeout,
            connect_timeout: timeout,
            incoming: self.lobby.expect(JOB, GENERATION),
            notices: Arc::new(|_| {}),
            verify_peer: verify_by_certificate(),
        }
    }

    pub(crate) fn connect(&self, config: MeshConfig) -> Result<Group, CollectiveError> {
        self.runtime.block_on(Group::connect(config))
    }
}

/// Connects `workers`, in order of rank.
pub(crate) fn mesh(workers: &[Worker], placement: &Placement, timeout: Duration) -> Vec<Group> {
    let peers: Vec<_> = workers.iter().zip(0..).map(|(worker, rank)| worker.peer(rank)).collect();
    std::thread::scope(|scope| {
        let connecting: Vec<_> = workers
            .iter()
            .zip(0..)
            .map(|(worker, rank)| {
                let others = peers.iter().filter(|peer| peer.rank != Rank(rank)).cloned().collect();
                let config = worker.config(rank, others, placement, timeout);
                scope.spawn(move || worker.connect(config).unwrap())
            })
            .collect();
        connecting.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
