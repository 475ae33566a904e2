//! The data directory: where everything of one coordinator lies.
//!
//! ```text
//! ca/             the cluster's authority, the coordinator's and the local operator's identity
//! lockstep.redb   jobs, workers, tokens
//! endpoint.json   where the running coordinator can be reached
//! datasets/       imported datasets
//! jobs/j1/        a job's file, log, metrics, checkpoints and artifacts
//! workers/        the local workers of `coordinator run`
//! ```

use crate::jobs_dir::JobDir;
use lockstep_common::durable::{self, FileError};
use lockstep_common::ids::JobId;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// A data directory.
#[derive(Clone, Debug)]
pub struct DataDir {
    root: PathBuf,
}

/// How the running coordinator of a data directory is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// `HOST:PORT` of its QUIC endpoint, from this host.
    pub coordinator: String,
    /// The same for other hosts, as far as this one can tell.
    pub advertised: String,
    /// Its HTTP server, if it is on this host.
    pub http: Option<SocketAddr>,
    /// Its process, if it is on this host.
    pub pid: Option<u32>,
}

impl DataDir {
    /// The directory `root`, which is created if it is missing.
    pub fn open(root: &Path) -> Result<Self, FileError> {
        durable::create_dir_all(root)?;
        let root = std::path::absolute(root).map_err(FileError::on("find", root))?;
        Ok(Self { root })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of keys and certificates.
    pub fn ca(&self) -> PathBuf {
        self.root.join("ca")
    }

    /// The file of the durable store.
    pub fn store(&self) -> PathBuf {
        self.root.join("lockstep.redb")
    }

    /// The folder of datasets.
    pub fn datasets(&self) -> PathBuf {
        self.root.join("datasets")
    }

    /// The folder of a local worker.
    pub fn worker(&self, number: u32) -> PathBuf {
        self.root.join("workers").join(format!("local-{number}"))
    }

    /// A job's folder.
    pub fn job(&self, id: JobId) -> JobDir {
        JobDir::new(self.root.join("jobs").join(id.to_string()))
    }

    /// Says where the coordinator is.
    pub fn publish(&self, endpoint: &Endpoint) -> Result<(), FileError> {
        let json = serde_json::to_vec_pretty(endpoint).unwrap_or_default();
        durable::write_atomic_private(&self.endpoint_path(), &json)
    }

    /// Takes back what [`Self::publish`] said.
    pub fn withdraw(&self) {
        if let Err(e) = std::fs::remove_file(self.endpoint_path()) {
            tracing::debug!("{}: {e}", self.endpoint_path().display());
        }
    }

    /// Where the coordinator is; `None` if none runs on this directory.
    pub fn endpoint(&self) -> Option<Endpoint> {
        let json = std::fs::read(self.endpoint_path()).ok()?;
        let endpoint: Endpoint = serde_json::from_slice(&json).ok()?;
        // A killed coordinator could not withdraw it.
        let alive = endpoint.pid.is_none_or(|pid| Path::new("/proc").join(pid.to_string()).exists());
        alive.then_some(endpoint)
    }

    fn endpoint_path(&self) -> PathBuf {
        self.root.join("endpoint.json")
    }
}
