//! What clients ask of a coordinator, and its answers: one bidirectional stream per [`Request`], with [`Response`]s on it.

use super::messages::Register;
use super::summary::{JobSummary, LogLine, WorkerSummary};
use crate::checkpoint::CheckpointInfo;
use crate::ids::{Generation, JobId, WorkerId};
use serde::{Deserialize, Serialize};

/// What a join token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenPurpose {
    /// Joining as a worker.
    Worker,
    /// Submitting and controlling jobs.
    Operator,
}

/// What a client asks of a coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// A certificate for a token. The only request that needs no client certificate.
    Enroll {
        /// The token's public name.
        token: String,
        /// The token's secret.
        secret: [u8; 32],
        /// A certificate signing request, DER.
        csr: Vec<u8>,
        /// The enrolling host's name, for lists.
        host: String,
    },
    /// From a worker: opens its session.
    Session(Register),
    /// From a worker whose session is open: the answer extends its lease on what it is in the middle of. By itself, so that it
    /// waits for no report.
    Ping,
    /// From a worker: a dataset's manifest.
    Manifest {
        /// The dataset's name.
        dataset: String,
    },
    /// From a worker: a dataset shard, which follows the response as raw bytes.
    Shard {
        /// The dataset's name.
        dataset: String,
        /// The shard's BLAKE3 hash, hex.
        hash: String,
    },
    /// From a worker: its part of a checkpoint; the files follow as raw bytes in their order. The answer comes once the
    /// parts of all ranks are one checkpoint, and that is durable.
    PutCheckpoint(CheckpointPart),
    /// From a worker: a checkpoint's files, which follow the response as raw bytes.
    GetCheckpoint {
        /// The job.
        job: JobId,
        /// The asking worker's generation.
        generation: Generation,
        /// The checkpoint's step.
        step: u64,
    },
    /// From a worker: a file for people to look at, such as a sample grid; its bytes follow.
    PutArtifact {
        /// The job.
        job: JobId,
        /// The worker's generation.
        generation: Generation,
        /// Its name and size.
        file: FileHead,
    },
    /// From an operator: puts a job in the queue.
    Submit {
        /// The job file's name, for messages.
        file: String,
        /// The job file.
        toml: String,
    },
    /// From an operator: all jobs.
    Jobs,
    /// From an operator: one job.
    Status {
        /// The job.
        job: JobId,
    },
    /// From an operator: a job's log.
    Logs {
        /// The job.
        job: JobId,
        /// Whether to stay and send what is added until the job has ended.
        follow: bool,
        /// The first line wanted, from 0.
        from: u64,
    },
    /// From an operator: ends a job.
    Cancel {
        /// The job.
        job: JobId,
    },
    /// From an operator: checkpoints a job and frees its workers.
    Pause {
        /// The job.
        job: JobId,
    },
    /// From an operator: puts a paused job back in the queue.
    Resume {
        /// The job.
        job: JobId,
    },
    /// From an operator: all workers.
    Workers,
    /// From an operator: a new join token.
    NewToken {
        /// What it is good for.
        purpose: TokenPurpose,
        /// How long it is good for.
        ttl_s: u64,
        /// How many enrolments it is good for.
        uses: u32,
    },
}

/// What a coordinator answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// The request was refused.
    Refused(Refusal),
    /// It is done; there is nothing to say.
    Done,
    /// To `Enroll`.
    Enrolled {
        /// The client's certificate, DER.
        certificate: Vec<u8>,
        /// The worker's number; `None` for an operator.
        worker: Option<WorkerId>,
    },
    /// To `Manifest`: the manifest as JSON.
    Manifest {
        /// `manifest.json`.
        json: String,
    },
    /// To `Shard` and `GetCheckpoint`: the files that follow.
    Files(Vec<FileHead>),
    /// To `Submit`.
    Submitted {
        /// The new job.
        job: JobId,
    },
    /// To `Jobs` and `Status`; to `Jobs` more may follow on the stream until it ends.
    Jobs(Vec<JobSummary>),
    /// To `Logs`: some lines; more may follow on the stream until it ends.
    Lines(Vec<LogLine>),
    /// To `Workers`; more may follow on the stream until it ends.
    Workers(Vec<WorkerSummary>),
    /// To `NewToken`.
    Token {
        /// The token to hand over.
        token: String,
    },
    /// To `Session`: the worker is in.
    Welcome,
}

/// Why a coordinator refused a request, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// A short word for programs and the metric, such as `token_expired`.
    pub reason: String,
    /// One line for people.
    pub message: String,
}

/// The [reason](Refusal::reason) for which a checkpoint is refused that the coordinator could not write to its disk. It has
/// said so in the job's log.
pub const NOT_STORED: &str = "not_stored";

/// A file that follows a message as raw bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHead {
    /// The file's name, without folders.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

/// A rank's part of a checkpoint, which follows as raw bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointPart {
    /// The job.
    pub job: JobId,
    /// The generation that wrote it.
    pub generation: Generation,
    /// The step after which it was taken.
    pub step: u64,
    /// From rank 0: where the job was.
    pub info: Option<Box<CheckpointInfo>>,
    /// The digest of all weights and buffers, in which the ranks have agreed.
    pub weights_digest: String,
    /// The files, each with those of its tensors that this rank sends.
    pub files: Vec<PartFile>,
}

/// A file with some of the tensors of a checkpoint's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartFile {
    /// The name of the checkpoint's file.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its bytes, in hex.
    pub blake3: String,
}
