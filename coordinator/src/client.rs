//! Asking a running coordinator.

use crate::data_dir::{DataDir, Endpoint};
use lockstep_common::durable::FileError;
use lockstep_common::net::{
    Exchange, Identity, NetError, Role, SigningRequest, bind, client_config, connect, enrolment_config,
    resolve,
};
use lockstep_common::token::Token;
use lockstep_common::wire::{FrameError, JobSummary, Request, Response, WorkerSummary};
use quinn::Connection;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use thiserror::Error;

/// Why a coordinator could not be asked.
#[derive(Debug, Error)]
pub enum ClientError {
    /// There is none.
    #[error(
        "no coordinator is running on `{dir}` (start one with `coordinator serve --data-dir {dir}`)",
        dir = .0.display()
    )]
    NotRunning(PathBuf),
    /// The data directory has no operator's key.
    #[error(
        "`{dir}` has no operator's certificate; run this on the coordinator's host as its user, or `coordinator \
         login` with a token from `coordinator token new --operator`",
        dir = .0.display()
    )]
    NoIdentity(PathBuf),
    /// The token is for something else.
    #[error("this token is for workers; make one with `coordinator token new --operator`")]
    WorkerToken,
    /// The directory has a coordinator of its own.
    #[error("`{dir}` is the data directory of a coordinator; log in with another --data-dir", dir = .0.display())]
    OwnCoordinator(PathBuf),
    /// A file cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The connection or the request failed.
    #[error(transparent)]
    Net(#[from] NetError),
}

/// A connection to the coordinator of a data directory.
pub struct Client {
    connection: Connection,
    // Dropping the endpoint would end the connection.
    _endpoint: quinn::Endpoint,
}

impl Client {
    /// Connects as the operator whose key is in the data directory.
    pub async fn connect(dir: &DataDir) -> Result<Self, ClientError> {
        let root = || dir.root().to_owned();
        let Endpoint { coordinator, .. } = dir.endpoint().ok_or_else(|| ClientError::NotRunning(root()))?;
        let identity =
            Identity::load(&dir.ca(), "operator")?.ok_or_else(|| ClientError::NoIdentity(root()))?;
        let addresses = resolve(&coordinator)?;
        let endpoint = bind(any_address(&addresses), None)?;
        let name = Role::Coordinator.server_name();
        let connection = connect(&endpoint, &client_config(&identity)?, &addresses, &name).await?;
        Ok(Self { connection, _endpoint: endpoint })
    }

    /// Asks for one answer.
    pub async fn ask(&self, request: &Request) -> Result<Response, ClientError> {
        Ok(Exchange::ask(&self.connection, request).await?)
    }

    /// Asks for a list, which comes in one or more answers; `part` takes its items out of each.
    async fn list<T>(
        &self,
        request: &Request,
        part: impl Fn(Response) -> Option<Vec<T>>,
    ) -> Result<Vec<T>, ClientError> {
        let mut exchange = self.open(request).await?;
        let mut items = Vec::new();
        let mut answer = exchange.answer().await;
        loop {
            match answer {
                Ok(response) => items.extend(part(response).ok_or(NetError::UnexpectedAnswer)?),
                Err(NetError::Frame(FrameError::Closed)) => return Ok(items),
                Err(e) => return Err(e.into()),
            }
            answer = exchange.next_answer().await;
        }
    }

    /// All jobs.
    pub async fn jobs(&self) -> Result<Vec<JobSummary>, ClientError> {
        let part = |response| match response {
            Response::Jobs(jobs) => Some(jobs),
            _ => None,
        };
        self.list(&Request::Jobs, part).await
    }

    /// All workers.
    pub async fn workers(&self) -> Result<Vec<WorkerSummary>, ClientError> {
        let part = |response| match response {
            Response::Workers(workers) => Some(workers),
            _ => None,
        };
        self.list(&Request::Workers, part).await
    }

    /// Asks for a stream of answers.
    pub async fn open(&self, request: &Request) -> Result<Exchange, ClientError> {
        Ok(Exchange::open(&self.connection, request).await?)
    }
}

/// Becomes an operator of a coordinator on another host: stores its address and a certificate in the data directory.
pub async fn login(dir: &DataDir, coordinator: &str, token: &Token, host: String) -> Result<(), ClientError> {
    if dir.store().exists() {
        return Err(ClientError::OwnCoordinator(dir.root().to_owned()));
    }
    let addresses = resolve(coordinator)?;
    let endpoint = bind(any_address(&addresses), None)?;
    let name = Role::Coordinator.server_name();
    let connection = connect(&endpoint, &enrolment_config(token.ca)?, &addresses, &name).await?;
    let key = SigningRequest::new()?;
    let request =
        Request::Enroll { token: token.id_hex(), secret: token.secret, csr: key.der().to_vec(), host };
    let Response::Enrolled { certificate, worker } = Exchange::ask(&connection, &request).await? else {
        return Err(NetError::UnexpectedAnswer.into());
    };
    if worker.is_some() {
        return Err(ClientError::WorkerToken);
    }
    let ca = authority_of(&connection, token).ok_or(NetError::UnexpectedAnswer)?;
    key.complete(certificate, ca).save(&dir.ca(), "operator")?;
    let (here, elsewhere) = (coordinator.to_owned(), coordinator.to_owned());
    dir.publish(&Endpoint { coordinator: here, advertised: elsewhere, http: None, pid: None })?;
    Ok(())
}

/// The CA certificate in the chain that the coordinator has shown, which the handshake checked against the token.
fn authority_of(connection: &Connection, token: &Token) -> Option<Vec<u8>> {
    let chain =
        connection.peer_identity()?.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>().ok()?;
    chain.iter().find(|c| *blake3::hash(c).as_bytes() == token.ca).map(|c| c.to_vec())
}

/// Any local address of the kind that reaches these.
fn any_address(peers: &[SocketAddr]) -> SocketAddr {
    match peers.first() {
        Some(SocketAddr::V6(_)) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        _ => ([0, 0, 0, 0], 0).into(),
    }
}
