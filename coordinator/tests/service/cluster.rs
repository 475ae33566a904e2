//! A coordinator on a temporary data directory, and peers that talk to it.

use lockstep_common::checkpoint::{CheckpointInfo, OPTIMIZER_FILE, WEIGHTS_FILE, encode_tensors};
use lockstep_common::dataset;
use lockstep_common::digest::{TensorBytes, blake3_hex, weights_digest};
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::net::{
    Exchange, Identity, NetError, Role, SigningRequest, bind, client_config, connect, enrolment_config,
};
use lockstep_common::token::Token;
use lockstep_common::wire::{
    Assignment, CheckpointPart, FromWorker, JobSummary, PartFile, Register, Request, Response, Running,
    ToWorker, TokenPurpose, read_frame, write_frame,
};
use lockstep_coordinator::client::Client;
use lockstep_coordinator::data_dir::DataDir;
use lockstep_coordinator::service::{Options, Scope, Service};
use quinn::{Connection, Endpoint};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub(crate) const JOB: &str = r#"
name = "tiny"
task = "classify"
seed = 1
steps = 4
global_batch = 8
logical_shards = 4

[model]
name = "nin"
widths = "mnist"
classes = 10

[data]
train = "tiny/train"

[optimizer]
name = "sgd"
lr = 0.1
"#;

/// Nothing that these tests wait for takes this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Cluster {
    pub(crate) folder: TempDir,
    pub(crate) dir: DataDir,
    pub(crate) service: Service,
}

pub(crate) fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

pub(crate) fn options(dir: &DataDir) -> Options {
    Options { dir: dir.clone(), listen: loopback(), http: loopback(), scope: Scope::All }
}

impl Cluster {
    /// A coordinator with the dataset `tiny/train` in its store.
    pub(crate) async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    /// The same with its data directory in `folder`.
    pub(crate) async fn start_in(folder: TempDir) -> Self {
        let dir = DataDir::open(&folder.path().join("data")).unwrap();
        import_tiny(&dir, folder.path());
        let service = Service::start(options(&dir)).await.unwrap();
        Self { folder, dir, service }
    }

    /// The coordinator ends, and another one starts on the same data directory.
    pub(crate) async fn restart(self) -> Self {
        self.restart_with(Scope::All, |_| ()).await
    }

    /// The same with a new scope, and `between` the two on the data directory.
    pub(crate) async fn restart_with(self, scope: Scope, between: impl FnOnce(&DataDir)) -> Self {
        self.service.stop().await;
        between(&self.dir);
        let service = Service::start(Options { scope, ..options(&self.dir) }).await.unwrap();
        Self { service, ..self }
    }

    pub(crate) async fn operator(&self) -> Client {
        Client::connect(&self.dir).await.unwrap()
    }

    pub(crate) async fn ask(&self, request: &Request) -> Response {
        self.operator().await.ask(request).await.unwrap()
    }

    pub(crate) async fn token(&self, purpose: TokenPurpose, uses: u32) -> Token {
        match self.ask(&Request::NewToken { purpose, ttl_s: 60, uses }).await {
            Response::Token { token } => token.parse().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn submit(&self, toml: &str) -> JobId {
        match self.ask(&Request::Submit { file: "tiny.toml".to_owned(), toml: toml.to_owned() }).await {
            Response::Submitted { job } => job,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn status(&self, job: JobId) -> JobSummary {
        match self.ask(&Request::Status { job }).await {
            Response::Jobs(mut jobs) => jobs.pop().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the job is as wanted.
    pub(crate) async fn wait(&self, job: JobId, wanted: impl Fn(&JobSummary) -> bool) -> JobSummary {
        let operator = self.operator().await;
        let look = async {
            loop {
                match operator.ask(&Request::Status { job }).await.unwrap() {
                    Response::Jobs(mut jobs) if wanted(&jobs[0]) => return jobs.remove(0),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, look).await.expect("the job should have come to this")
    }

    /// Enrols with `token` and returns the identity and the worker's number.
    pub(crate) async fn enroll(&self, token: &Token) -> Result<(Identity, Option<WorkerId>), NetError> {
        let (_endpoint, connection) = self.connect_without_certificate(token.ca).await?;
        let key = SigningRequest::new().unwrap();
        let csr = key.der().to_vec();
        let request =
            Request::Enroll { token: token.id_hex(), secret: token.secret, csr, host: "host".to_owned() };
        match Exchange::ask(&connection, &request).await? {
            Response::Enrolled { certificate, worker } => {
                let authority = std::fs::read_to_string(self.dir.ca().join("ca.pem")).unwrap();
                let ca = der(&authority);
                Ok((key.complete(certificate, ca), worker))
            }
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn connect_without_certificate(
        &self,
        ca: [u8; 32],
    ) -> Result<(Endpoint, Connection), NetError> {
        let endpoint = bind(loopback(), None).unwrap();
        let name = Role::Coordinator.server_name();
        let config = enrolment_config(ca).unwrap();
        let connection = connect(&endpoint, &config, &[self.service.address()], &name).await?;
        Ok((endpoint, connection))
    }

    pub(crate) async fn connect(&self, identity: &Identity) -> Result<(Endpoint, Connection), NetError> {
        let endpoint = bind(loopback(), None).unwrap();
        let name = Role::Coordinator.server_name();
        let config = client_config(identity).unwrap();
        let connection = connect(&endpoint, &config, &[self.service.address()], &name).await?;
        Ok((endpoint, connection))
    }

    /// A new worker with an open session.
    pub(crate) async fn worker(&self) -> Worker {
        let token = self.token(TokenPurpose::Worker, 1).await;
        let (identity, id) = self.enroll(&token).await.unwrap();
        self.session(identity, id.unwrap(), None).await.unwrap()
    }

    pub(crate) async fn session(
        &self,
        identity: Identity,
        id: WorkerId,
        running: Option<Running>,
    ) -> Result<Worker, NetError> {
        let (endpoint, connection) = self.connect(&identity).await?;
        let register = Register {
            host: "host".to_owned(),
            device: "cpu".to_owned(),
            threads: 1,
            host_key: None,
            addresses: Vec::new(),
            advertised: vec![loopback()],
            metrics: None,
            running,
            held: None,
        };
        let mut exchange = Exchange::open(&connection, &Request::Session(register)).await?;
        assert_eq!(exchange.answer().await?, Response::Welcome);
        Ok(Worker { id, identity, connection, exchange, _endpoint: endpoint })
    }

    pub(crate) async fn http(&self, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(self.service.http()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    /// Waits until `GET path` answers with this status.
    pub(crate) async fn wait_for_http(&self, path: &str, status: u16) {
        let wanted = format!("HTTP/1.1 {status}");
        let look = async { while !self.http(path).await.starts_with(&wanted) {} };
        tokio::time::timeout(PATIENCE, look).await.expect("the status should have come");
    }

    /// Waits until the metrics have this line.
    pub(crate) async fn wait_for_metric(&self, line: &str) {
        let look = async { while !self.http("/metrics").await.lines().any(|l| l == line) {} };
        if tokio::time::timeout(PATIENCE, look).await.is_err() {
            panic!("no `{line}` in\n{}", self.http("/metrics").await);
        }
    }
}

/// A worker that speaks the wire and computes nothing.
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) identity: Identity,
    pub(crate) connection: Connection,
    exchange: Exchange,
    _endpoint: Endpoint,
}

impl Worker {
    /// The next order; acknowledgements of reports are none.
    pub(crate) async fn order(&mut self) -> ToWorker {
        let next = async {
            loop {
                match read_frame(&mut self.exchange.recv).await.unwrap() {
                    ToWorker::Heard { .. } => {}
                    order => return order,
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("an order should have come")
    }

    /// The next acknowledgement of a report; `None` if there is none yet.
    pub(crate) async fn heard(&mut self, patience: Duration) -> Option<ToWorker> {
        tokio::time::timeout(patience, read_frame(&mut self.exchange.recv)).await.ok().map(Result::unwrap)
    }

    pub(crate) async fn start(&mut self) -> Assignment {
        match self.order().await {
            ToWorker::Start(assignment) => *assignment,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn say(&mut self, message: &FromWorker) {
        write_frame(&mut self.exchange.send, message).await.unwrap();
    }

    pub(crate) async fn ask(&self, request: &Request) -> Result<Response, NetError> {
        Exchange::ask(&self.connection, request).await
    }

    /// Asks for files and receives them.
    pub(crate) async fn fetch(&self, request: &Request) -> Result<Vec<(String, Vec<u8>)>, NetError> {
        let mut exchange = Exchange::open(&self.connection, request).await?;
        let Response::Files(heads) = exchange.answer().await? else { panic!("no files") };
        let mut files = Vec::new();
        for head in heads {
            let mut bytes = vec![0; head.bytes as usize];
            exchange.recv.read_exact(&mut bytes).await.unwrap();
            files.push((head.name, bytes));
        }
        Ok(files)
    }

    /// Sends a part of a checkpoint.
    pub(crate) async fn put(
        &self,
        job: JobId,
        generation: Generation,
        step: u64,
        sent: &Sent,
    ) -> Result<Response, NetError> {
        let part_file = |(name, blake3, bytes): &(String, String, Vec<u8>)| PartFile {
            name: name.clone(),
            bytes: bytes.len() as u64,
            blake3: blake3.clone(),
        };
        let info = sent.info.clone().map(|info| Box::new(CheckpointInfo { generation, ..info }));
        let (weights_digest, files) = (sent.digest.clone(), sent.files.iter().map(part_file).collect());
        let part = CheckpointPart { job, generation, step, info, weights_digest, files };
        let mut exchange = Exchange::open(&self.connection, &Request::PutCheckpoint(part)).await?;
        for (_, _, bytes) in &sent.files {
            // A refusal may come before the last byte is sent.
            if exchange.send.write_all(bytes).await.is_err() {
                break;
            }
        }
        let _ = exchange.send.finish();
        exchange.answer().await
    }
}

/// A part of a checkpoint as a worker sends it.
#[derive(Clone)]
pub(crate) struct Sent {
    pub(crate) info: Option<CheckpointInfo>,
    pub(crate) digest: String,
    /// Name, hash and bytes.
    pub(crate) files: Vec<(String, String, Vec<u8>)>,
}

/// A whole checkpoint without any tensors.
pub(crate) fn checkpoint(job: JobId, step: u64) -> Sent {
    part(job, step, &[], &[])
}

/// A part with some of all weights.
pub(crate) fn part(job: JobId, step: u64, all: &[TensorBytes<'_>], own: &[TensorBytes<'_>]) -> Sent {
    let file = |name: &str, tensors: &[TensorBytes<'_>]| {
        let bytes = encode_tensors(tensors.iter().cloned()).unwrap();
        (name.to_owned(), blake3_hex(&bytes), bytes)
    };
    let info = Some(CheckpointInfo { job_id: job, step, ..CheckpointInfo::default() });
    let files = vec![file(WEIGHTS_FILE, own), file(OPTIMIZER_FILE, &[])];
    Sent { info, digest: weights_digest(all.iter().cloned()), files }
}

impl Sent {
    /// As a rank other than 0 sends it.
    pub(crate) fn other(self) -> Self {
        Self { info: None, ..self }
    }
}

/// 20 images of 4 × 4 pixels.
fn import_tiny(dir: &DataDir, folder: &Path) {
    let source = folder.join("source");
    std::fs::create_dir(&source).unwrap();
    let header = |kind: u8, sizes: &[u32]| {
        let sizes = sizes.iter().flat_map(|s| s.to_be_bytes());
        [0, 0, 8, kind].into_iter().chain(sizes).collect::<Vec<u8>>()
    };
    let images = [header(3, &[20, 4, 4]), (0..20 * 16).map(|i| (i % 256) as u8).collect()].concat();
    let labels = [header(1, &[20]), (0..20).map(|i| i % 10).collect()].concat();
    std::fs::write(source.join("train-images-idx3-ubyte"), images).unwrap();
    std::fs::write(source.join("train-labels-idx1-ubyte"), labels).unwrap();
    dataset::Store::open(&dir.datasets()).unwrap().import_idx("tiny", &source, |_| {}).unwrap();
}

/// The DER bytes of a PEM certificate.
fn der(pem: &str) -> Vec<u8> {
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}
