//! The command line of `worker`.

use crate::bench::AllreduceArgs;
use crate::commands::{EvalArgs, PredictArgs};
use clap::{Args, Parser, Subcommand};
use lockstep_common::device::{EXPECTED, gpu};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Trains what a Lockstep coordinator assigns.
#[derive(Parser)]
#[command(name = "worker", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Join a cluster and work until told to leave.
    Join(Box<JoinArgs>),
    /// Measure the parts of a worker.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Evaluate trained classifiers on a test set, by themselves or together.
    Eval(Box<EvalArgs>),
    /// Say what images show, by a trained classifier.
    Predict(Box<PredictArgs>),
    /// List the architectures: name, parameters, input, reference.
    Models {
        /// Print JSON for scripts.
        #[arg(long)]
        json: bool,
    },
    /// Say whose the weights in a safetensors file are, and how a job begins with them.
    Weights {
        /// The file.
        file: PathBuf,
    },
}

#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// Time all-reduces between processes of this host, or of two hosts.
    Allreduce(Box<AllreduceArgs>),
    /// One rank of an all-reduce benchmark, led over standard input and output.
    #[command(hide = true)]
    Rank,
}

/// Where the computing is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceArg {
    Cpu,
    Cuda(usize),
}

impl std::str::FromStr for DeviceArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match gpu(s) {
            Some(None) => Ok(Self::Cpu),
            Some(Some(index)) => Ok(Self::Cuda(index)),
            None => Err(EXPECTED.to_owned()),
        }
    }
}

impl std::fmt::Display for DeviceArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

#[derive(Args, Clone)]
pub(crate) struct JoinArgs {
    /// The coordinator, as `host:port`.
    #[arg(long)]
    pub(crate) coordinator: String,
    /// A join token from `coordinator token new`; needed only the first time.
    #[arg(long, env = "LOCKSTEP_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Where to compute: `cpu`, or `cuda:0`, `cuda:1`, ...
    #[arg(long, default_value = "cpu")]
    pub(crate) device: DeviceArg,
    /// Threads that compute at a time; all cores by default.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) threads: Option<u32>,
    /// Threads that decode and augment samples ahead of training; as many as `--threads` by default.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) decode_threads: Option<u32>,
    /// The UDP address that other workers connect to; port 0 takes a free one.
    #[arg(long, default_value = "0.0.0.0:0")]
    pub(crate) listen: SocketAddr,
    /// An address under which other workers reach this one, instead of those of its interfaces.
    #[arg(long)]
    pub(crate) advertise: Vec<SocketAddr>,
    /// Serve Prometheus metrics on this address.
    #[arg(long)]
    pub(crate) metrics: Option<SocketAddr>,
    /// Where this worker keeps its certificate and its dataset cache [default: ~/.lockstep/worker].
    #[arg(long, env = "LOCKSTEP_WORKER_DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// A dataset store on this host, read in place instead of being copied into the cache.
    #[arg(long)]
    pub(crate) datasets: Vec<PathBuf>,
    /// The most that the dataset cache may take, in bytes.
    #[arg(long, default_value_t = 20 << 30)]
    pub(crate) cache_bytes: u64,
    /// Leave as soon as standard input ends: the worker of a `coordinator run` does not outlive it.
    #[arg(long, hide = true)]
    pub(crate) exit_on_stdin_close: bool,
}
