//! Who this worker is: a folder of its own, and the certificate in it.

use anyhow::{Context, Result, bail};
use lockstep_common::ids::WorkerId;
use lockstep_common::net::{Exchange, Identity, Role, SigningRequest, connect, enrolment_config, resolve};
use lockstep_common::token::Token;
use lockstep_common::wire::{Request, Response};
use quinn::Endpoint;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// A worker's folder, held for as long as this value lives, so that two workers on one host never share one.
pub(crate) struct Home {
    path: PathBuf,
    _lock: File,
}

impl Home {
    /// Takes the first free folder `slot-1`, `slot-2`, ... under `base`.
    pub(crate) fn claim(base: &Path) -> Result<Self> {
        for slot in 1..=1024 {
            let path = base.join(format!("slot-{slot}"));
            std::fs::create_dir_all(&path)
                .with_context(|| format!("cannot create {}; choose another --data-dir", path.display()))?;
            let lock = File::create(path.join("lock"))
                .with_context(|| format!("cannot write in {}; choose another --data-dir", path.display()))?;
            match lock.try_lock() {
                Ok(()) => return Ok(Self { path, _lock: lock }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) => bail!("cannot lock {}: {e}", path.display()),
            }
        }
        bail!("all 1024 worker slots under {} are taken", base.display())
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// The stored identity if it belongs to the wanted cluster, or else a new one in exchange for the token.
pub(crate) async fn obtain(
    endpoint: &Endpoint,
    coordinator: &str,
    token: Option<&str>,
    home: &Home,
) -> Result<Identity> {
    let stored = Identity::load(home.path(), "worker")?;
    let token = token.map(str::parse::<Token>).transpose()?;
    match (stored, token) {
        (Some(identity), None) => Ok(identity),
        (Some(identity), Some(token)) if *blake3::hash(identity.ca()).as_bytes() == token.ca => Ok(identity),
        (_, Some(token)) => enroll(endpoint, coordinator, &token, home).await,
        (None, None) => bail!("this worker is not enrolled yet: pass --token (from `coordinator token new`)"),
    }
}

/// Forgets the stored identity, for instance when the coordinator no longer knows it.
pub(crate) fn forget(home: &Home) {
    for file in ["worker.pem", "worker.key"] {
        // Absent is as good as removed.
        let _ = std::fs::remove_file(home.path().join(file));
    }
}

async fn enroll(endpoint: &Endpoint, coordinator: &str, token: &Token, home: &Home) -> Result<Identity> {
    let config = enrolment_config(token.ca)?;
    let addresses = resolve(coordinator)?;
    let connection = connect(endpoint, &config, &addresses, &Role::Coordinator.server_name()).await?;
    let signing = SigningRequest::new()?;
    let request = Request::Enroll {
        token: token.id_hex(),
        secret: token.secret,
        csr: signing.der().to_vec(),
        host: host_name(),
    };
    let ca = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>().ok())
        .and_then(|chain| chain.into_iter().find(|c| *blake3::hash(c).as_bytes() == token.ca))
        .context("the coordinator showed no certificate authority")?;
    let answer =
        Exchange::ask(&connection, &request).await.context("the coordinator refused to enrol this worker")?;
    let Response::Enrolled { certificate, worker } = answer else {
        bail!("the coordinator did not enrol this worker")
    };
    let Some(WorkerId(_)) = worker else {
        bail!("this is an operator's token; make one with `coordinator token new`")
    };
    let identity = signing.complete(certificate, ca.to_vec());
    identity.save(home.path(), "worker")?;
    connection.close(0u32.into(), b"enrolled");
    Ok(identity)
}

/// This host's name, for lists and messages.
pub(crate) fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "unknown".to_owned(), |s| s.trim().to_owned())
}
