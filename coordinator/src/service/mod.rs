//! The running coordinator.
//!
//! Connections are tasks, one each; what they decide nothing about goes to the `hub`, which owns the core.

mod absent;
mod artifacts;
mod assembly;
mod audits;
mod checkpoints;
mod enroll;
mod http;
mod hub;
mod operators;
mod requests;
mod resent;
mod session;
mod shards;
mod summary;
mod unstored;

pub(crate) use enroll::new_token;
pub(crate) use hub::HubHandle;
pub(crate) use operators::{check_job, submit};

use crate::data_dir::{DataDir, Endpoint};
use crate::metrics::Metrics;
use crate::store::{Store, StoreError};
use assembly::Assemblies;
use audits::Audits;
use hub::{Clock, Parts};
use lockstep_common::dataset::{self, DatasetError};
use lockstep_common::durable::FileError;
use lockstep_common::http::{HttpError, Readiness, process_registry};
use lockstep_common::ids::{JobId, WorkerId};
use lockstep_common::net::{Authority, Identity, NetError, Role, bind_as, explain, facing, server_config};
use lockstep_common::wire::{JobState, Refusal};
use lockstep_core::{Config, Core, Ending, JobRecord, Restored};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use thiserror::Error;

/// Why a coordinator did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// Another process has the data directory.
    #[error("data directory `{}` is in use by another coordinator{}", dir.display(), pid.map(|p| format!(" (pid {p})")).unwrap_or_default())]
    InUse {
        /// The directory.
        dir: std::path::PathBuf,
        /// The other process.
        pid: Option<u32>,
    },
    /// The store cannot be used.
    #[error(transparent)]
    Store(StoreError),
    /// Keys, certificates or the port are to blame.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The HTTP port is to blame.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The datasets cannot be opened.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// A file cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The metrics could not be registered.
    #[error("the metrics could not be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The operating system gives no thread or socket.
    #[error(
        "the operating system refused a thread or a socket: {0}; see the limits of this user (`ulimit -a`)"
    )]
    System(std::io::Error),
}

/// How to start a coordinator.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it keeps everything.
    pub dir: DataDir,
    /// Its QUIC address.
    pub listen: SocketAddr,
    /// Its HTTP address.
    pub http: SocketAddr,
    /// Which of the stored jobs it takes care of.
    pub scope: Scope,
}

/// Which of the stored jobs a coordinator takes care of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    All,
    /// Only the newest one of this very job file, if it is unfinished, or has failed and left a good checkpoint; and jobs
    /// submitted from now on. The others stay as they are.
    Job {
        /// The job file.
        toml: String,
    },
    /// Only jobs submitted from now on.
    New,
}

/// What connection tasks share.
pub(crate) struct Shared {
    pub(crate) dir: DataDir,
    pub(crate) hub: HubHandle,
    pub(crate) authority: Authority,
    pub(crate) datasets: dataset::Store,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) assemblies: Arc<Assemblies>,
}

impl Shared {
    /// Notes a refusal in the log and the metrics.
    pub(crate) fn note_refusal(&self, peer: SocketAddr, refusal: &Refusal) {
        tracing::warn!("refused {peer}: {} ({})", refusal.message, refusal.reason);
        self.metrics.refused(&refusal.reason);
    }
}

/// A refusal with its reason for the metric and its message for people.
pub(crate) fn refuse(reason: &str, message: impl ToString) -> Refusal {
    Refusal { reason: reason.to_owned(), message: message.to_string() }
}

/// A running coordinator.
pub struct Service {
    pub(crate) shared: Arc<Shared>,
    endpoint: quinn::Endpoint,
    address: SocketAddr,
    http: SocketAddr,
    hub: JoinHandle<()>,
    taken_up: Option<TakenUp>,
}

/// A job of an earlier coordinator that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenUp {
    /// The job.
    pub job: JobId,
    /// The error that had ended it, if one had.
    pub failure: Option<String>,
}

impl Service {
    /// Starts a coordinator in the current tokio runtime.
    pub async fn start(options: Options) -> Result<Self, StartError> {
        let dir = options.dir;
        let mut store = Store::open(&dir.store()).map_err(|e| match e {
            StoreError::InUse(_) => {
                StartError::InUse { dir: dir.root().to_owned(), pid: dir.endpoint().and_then(|e| e.pid) }
            }
            other => StartError::Store(other),
        })?;
        let authority = Authority::open(&dir.ca())?;
        let identity = own_identity(&authority, &dir)?;
        let datasets = dataset::Store::open(&dir.datasets())?;
        let clock = Clock::new();
        let jobs = store.jobs().map_err(StartError::Store)?;
        let workers = store.workers().map_err(StartError::Store)?;
        let (last_job, last_worker) = (JobId(jobs.last), WorkerId(workers.last));
        let (jobs, taken_up) = match &options.scope {
            Scope::All => (jobs.records, None),
            Scope::New => (Vec::new(), None),
            Scope::Job { toml } => {
                let (job, taken_up) = take_up(jobs.records, toml, &dir).unzip();
                (job.into_iter().collect(), taken_up)
            }
        };
        for job in &jobs {
            lockstep_common::durable::sweep_temporary(&dir.job(job.id).artifacts())?;
        }
        let restored = Restored { jobs, workers: workers.records, last_job, last_worker };
        let core = Core::new(Config::default(), restored, clock.now_ms());
        let running = core.jobs().filter(|job| matches!(job.state, JobState::Running | JobState::Stopping));
        let audits = Audits::open(dir.clone(), running.map(|job| job.id))?;

        let registry = process_registry();
        let metrics = Arc::new(Metrics::new(&registry)?);
        let readiness = Readiness::default();
        let endpoint = bind_as(&identity, options.listen, server_config(&identity, true)?)?;
        let address = endpoint.local_addr().map_err(StartError::System)?;
        let assemblies = Arc::new(Assemblies::default());
        let parts = Parts {
            core,
            audits,
            assemblies: assemblies.clone(),
            store,
            dir: dir.clone(),
            metrics: metrics.clone(),
            readiness: readiness.clone(),
            clock,
        };
        let (hub, thread) = hub::start(parts).map_err(StartError::System)?;
        let shared = Arc::new(Shared { dir, hub, authority, datasets, metrics, assemblies });
        tokio::spawn(absent::watch(shared.hub.clone()));
        let started = http::serve(options.http, shared.clone(), registry, readiness).await;
        let service = |http| Self {
            shared: shared.clone(),
            endpoint: endpoint.clone(),
            address,
            http,
            hub: thread,
            taken_up,
        };
        let service = match started {
            Ok(http) => service(http),
            Err(e) => {
                shared.hub.stop();
                return Err(e.into());
            }
        };
        let own = Endpoint {
            coordinator: reachable(address).to_string(),
            advertised: advertised(address).to_string(),
            http: Some(service.http),
            pid: Some(std::process::id()),
        };
        service.shared.dir.publish(&own)?;
        tokio::spawn(accept(service.endpoint.clone(), service.shared.clone()));
        Ok(service)
    }

    /// Where its QUIC endpoint is bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where other hosts reach its QUIC endpoint, as far as this one can tell.
    pub fn advertised(&self) -> SocketAddr {
        advertised(self.address)
    }

    /// Where its HTTP server is bound.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// The job that [`Scope::Job`] found.
    pub fn taken_up(&self) -> Option<&TakenUp> {
        self.taken_up.as_ref()
    }

    /// Stops. Running jobs go on without a coordinator and wait for the next one.
    pub async fn stop(self) {
        self.shared.dir.withdraw();
        self.endpoint.close(0u32.into(), b"the coordinator is stopping; it may come back");
        self.shared.hub.stop();
        let hub = self.hub;
        if tokio::task::spawn_blocking(move || hub.join()).await.is_err() {
            tracing::error!("the hub's thread panicked");
        }
        self.endpoint.wait_idle().await;
    }
}

/// The coordinator's identity; the local operator's is made beside it.
fn own_identity(authority: &Authority, dir: &DataDir) -> Result<Identity, NetError> {
    let mut identities = Vec::with_capacity(2);
    for (role, name) in [(Role::Operator, "operator"), (Role::Coordinator, "coordinator")] {
        let identity = match Identity::load(&dir.ca(), name)? {
            Some(identity) if identity.ca() == authority.certificate() => identity,
            _ => {
                let identity = authority.issue(role)?;
                identity.save(&dir.ca(), name)?;
                identity
            }
        };
        identities.push(identity);
    }
    identities.pop().ok_or_else(|| NetError::Certificate("no identity was made".to_owned()))
}

/// The newest job of this job file, if it can go on. Its workers died with its coordinator, so there are none to wait for.
fn take_up(jobs: Vec<JobRecord>, toml: &str, dir: &DataDir) -> Option<(JobRecord, TakenUp)> {
    let newest = jobs.into_iter().rev().find(|j| j.toml == toml)?;
    let failure = match (newest.state, &newest.ending) {
        (JobState::Finished | JobState::Cancelled, _) | (_, Some(Ending::Cancel)) => return None,
        (JobState::Failed, _) if has_good_checkpoint(dir, newest.id) => Some(newest.reason.clone()),
        (JobState::Failed, _) => return None,
        (_, Some(Ending::Fail { error })) => Some(error.clone()),
        _ => None,
    };
    let taken_up = TakenUp { job: newest.id, failure };
    Some((newest.requeued(), taken_up))
}

fn has_good_checkpoint(dir: &DataDir, job: JobId) -> bool {
    let found = dir.job(job).checkpoint_store().and_then(|store| store.latest_good());
    found.is_ok_and(|latest| latest.good.is_some())
}

/// An address under which this host reaches itself.
fn reachable(bound: SocketAddr) -> SocketAddr {
    let ip = match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, bound.port())
}

/// The address under which others may reach this host: the bound one, or that of the interface with the default route.
fn advertised(bound: SocketAddr) -> SocketAddr {
    /// A documentation address (RFC 5737): nothing is sent there, it only asks the routing table.
    const ELSEWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9);
    if !bound.ip().is_unspecified() {
        return bound;
    }
    SocketAddr::new(facing(ELSEWHERE).unwrap_or(Ipv4Addr::LOCALHOST.into()), bound.port())
}

async fn accept(endpoint: quinn::Endpoint, shared: Arc<Shared>) {
    while let Some(incoming) = endpoint.accept().await {
        let shared = shared.clone();
        tokio::spawn(async move {
            let peer = incoming.remote_address();
            match incoming.await {
                Ok(connection) => requests::serve(&shared, &connection).await,
                Err(e) => shared.note_refusal(peer, &refuse("handshake", explain(&e))),
            }
        });
    }
}
