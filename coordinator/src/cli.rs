//! The command line.

use clap::{Args, Parser, Subcommand, ValueEnum};
use lockstep_common::device::EXPECTED;
use lockstep_common::ids::JobId;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Trains networks on a cluster: queues jobs, shards datasets, keeps checkpoints.
#[derive(Debug, Parser)]
#[command(name = "coordinator", version, max_term_width = 110)]
pub struct Cli {
    /// Where the coordinator keeps everything [default: ~/.lockstep].
    #[arg(long, global = true, env = "LOCKSTEP_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train a job on this machine: a coordinator, workers, and nothing else to set up.
    Run(RunArgs),
    /// Run the coordinator as a service.
    Serve(ServeArgs),
    /// Put a job in the queue.
    Submit {
        /// The job file.
        job: PathBuf,
        #[command(flatten)]
        json: Json,
    },
    /// List the jobs.
    Jobs {
        #[command(flatten)]
        json: Json,
    },
    /// Show one job.
    Status {
        /// The job, such as `j1`.
        job: JobId,
        #[command(flatten)]
        json: Json,
    },
    /// Show a job's log.
    Logs {
        /// The job, such as `j1`.
        job: JobId,
        /// Stay and show what is added until the job has ended.
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        json: Json,
    },
    /// End a job at once.
    Cancel {
        /// The job, such as `j1`.
        job: JobId,
        #[command(flatten)]
        json: Json,
    },
    /// Stop a job with a checkpoint and free its workers.
    Pause {
        /// The job, such as `j1`.
        job: JobId,
        #[command(flatten)]
        json: Json,
    },
    /// Put a paused or failed job back in the queue.
    Resume {
        /// The job, such as `j1`.
        job: JobId,
        #[command(flatten)]
        json: Json,
    },
    /// List the workers.
    Workers {
        #[command(flatten)]
        json: Json,
    },
    /// Invite workers and operators.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Control a coordinator on another host from here.
    Login {
        /// The coordinator, as `host:port`.
        #[arg(long, value_name = "HOST:PORT")]
        coordinator: String,
        /// A token from `coordinator token new --operator`.
        #[arg(long, env = "LOCKSTEP_TOKEN", hide_env_values = true)]
        token: String,
    },
    /// Import and check datasets.
    #[command(subcommand)]
    Dataset(DatasetCommand),
    /// Look at checkpoints, check and export them.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Prove that every sample counted exactly once per epoch, whatever happened to the job.
    Audit {
        /// The job, such as `j1`.
        job: JobId,
        /// Also print the samples of each proven step, by logical shard: a JSON object a line.
        #[arg(long)]
        samples: bool,
        #[command(flatten)]
        json: Json,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Json {
    /// Print JSON, for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The job file.
    pub(crate) job: PathBuf,
    /// How many worker processes to start [default: one per device, or 2, or what the job allows].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) workers: Option<u32>,
    /// Where the workers compute, in turn, such as `cuda:0,cuda:1` [default: cpu].
    #[arg(long, value_name = "DEVICE", value_delimiter = ',', value_parser = device)]
    pub(crate) devices: Vec<String>,
    /// Threads that compute at a time in each worker [default: the cores shared evenly].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// Start over, even if an earlier run of this job file is unfinished or has failed after a checkpoint.
    #[arg(long)]
    pub(crate) fresh: bool,
    /// Where metrics and JSON are served while the job runs.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    pub(crate) http: SocketAddr,
    /// Print no progress and no summary, only the JSON object at the end.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The UDP address that workers and operators connect to.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7777")]
    pub(crate) listen: SocketAddr,
    /// The TCP address of metrics and JSON; it has no authentication.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7778")]
    pub(crate) http: SocketAddr,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a join token and print it.
    New {
        /// How long it is good for, such as `30m` or `2h`.
        #[arg(long, value_parser = humantime::parse_duration, default_value = "1h")]
        ttl: Duration,
        /// How many processes may join with it.
        #[arg(long, default_value_t = 16)]
        uses: u32,
        /// For controlling jobs from another host, instead of for workers.
        #[arg(long)]
        operator: bool,
        #[command(flatten)]
        json: Json,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum DatasetFormat {
    /// IDX files of images and labels, as of MNIST and Fashion-MNIST, also gzipped.
    Idx,
    /// CIFAR-10's binary version: `data_batch_1.bin` to `data_batch_5.bin`, `test_batch.bin`.
    #[value(name = "cifar-10")]
    Cifar10,
    /// CIFAR-100's binary version, `train.bin` and `test.bin`, with its fine labels.
    #[value(name = "cifar-100")]
    Cifar100,
    /// JPEG and PNG files, a sub-folder per class; in `train` and `val` (or `test`) if there are splits.
    Folder,
    /// Tar files, or a folder of them: samples are members of one name, an image and `.cls` or `.json`.
    Webdataset,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DatasetCommand {
    /// Import a dataset; its splits become NAME/train and NAME/test.
    Add {
        /// Its name.
        name: String,
        /// The format of the source.
        #[arg(long, value_enum)]
        format: DatasetFormat,
        /// The folder or file of the source.
        path: PathBuf,
        /// Leave corrupt images out, and say how many, instead of refusing the whole.
        #[arg(long)]
        skip_corrupt: bool,
        /// Number the classes as that dataset does, by their names: for a split that is imported by itself.
        #[arg(long, value_name = "DATASET")]
        classes_of: Option<String>,
    },
    /// Fit a ZCA whitening to a training set and add both as another dataset, for jobs with `whiten = "zca"`.
    Whiten {
        /// The training set.
        name: String,
        /// The name of the dataset that it is to become.
        new: String,
    },
    /// List the datasets.
    Ls {
        #[command(flatten)]
        json: Json,
    },
    /// Read and hash every shard.
    Verify {
        /// The dataset; all of them without it.
        name: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// List a job's checkpoints.
    Ls {
        /// The job, such as `j1`.
        job: JobId,
        #[command(flatten)]
        json: Json,
    },
    /// Read and hash every file of a job's checkpoints.
    Verify {
        /// The job, such as `j1`.
        job: JobId,
    },
    /// Write a checkpoint's weights to one safetensors file.
    Export {
        /// The job, such as `j1`.
        job: JobId,
        /// The checkpoint's step [default: the newest good one].
        #[arg(long)]
        step: Option<u64>,
        /// The average of the weights that the job keeps (`[average]`), with which it is evaluated.
        #[arg(long)]
        average: bool,
        /// The file to write.
        file: PathBuf,
    },
}

/// A device as workers name it.
fn device(name: &str) -> Result<String, String> {
    lockstep_common::device::gpu(name).map(|_| name.to_owned()).ok_or_else(|| EXPECTED.to_owned())
}
