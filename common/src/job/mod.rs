//! The job file: what is trained, on what, how. The result of a run depends on this file only.
//!
//! [`JobSpec::parse`] turns TOML into a checked value or into one error that names the file, the line and the
//! nearest known name. Peers exchange the file's text and parse it again, so that there is one truth.

mod augment;
mod error;
mod evaluation;
mod models;
mod optimizer;
mod validate;

pub use augment::{Augment, shorter_side};
pub use error::JobError;
pub use evaluation::{Crops, EvaluationSpec, UnknownCrops};
pub use models::{ModelEntry, ModelOption, ModelRole, OptionKind, catalogue};
pub use optimizer::{AverageSpec, OptimizerSpec, ParameterGroup, RmspropForm, ScheduleSpec};

use serde::{Deserialize, Serialize};

/// A job file, parsed and checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// The job's name in lists, logs and metrics.
    pub name: String,
    /// What kind of training this is.
    pub task: Task,
    /// Keys every random number of the job.
    pub seed: u64,
    /// Passes over the training set. Exactly one of `epochs` and `steps` is given.
    pub epochs: Option<u64>,
    /// Updates of the weights. Exactly one of `epochs` and `steps` is given. With none the job only evaluates.
    pub steps: Option<u64>,
    /// Samples per step, over all workers.
    pub global_batch: u32,
    /// V: the fixed number of equal parts of every global batch.
    pub logical_shards: u32,
    /// Into how many pieces each logical shard divides its part of the batch, one after the other, to save memory. Their
    /// gradients are added before anything is sent. Batch norm sees one piece of all shards at a time.
    #[serde(default = "one")]
    pub accumulation: u32,
    /// In which order gradients are added.
    #[serde(default)]
    pub reduction: Reduction,
    /// The number type of weights and arithmetic.
    #[serde(default)]
    pub precision: Precision,
    /// How images lie in memory while the network computes. Weights, checkpoints and digests do not change with it.
    #[serde(default)]
    pub memory_format: MemoryFormat,
    /// The network of a `classify` job.
    pub model: Option<ModelSpec>,
    /// The generator of a `gan` job.
    pub generator: Option<ModelSpec>,
    /// The discriminator of a `gan` job.
    pub discriminator: Option<ModelSpec>,
    /// The datasets and their augmentation.
    pub data: DataSpec,
    /// The optimizer of every network that does not name its own.
    pub optimizer: OptimizerSpec,
    /// How the learning rate changes from step to step.
    #[serde(default)]
    pub schedule: ScheduleSpec,
    /// The loss of a `classify` job.
    #[serde(default)]
    pub loss: LossSpec,
    /// Bounds on the reduced gradient.
    #[serde(default)]
    pub clip: ClipSpec,
    /// The average of the weights with which a `classify` job is evaluated, if it keeps one.
    pub average: Option<AverageSpec>,
    /// How a `classify` job is evaluated.
    #[serde(default)]
    pub evaluation: EvaluationSpec,
    /// What a `gan` job alternates.
    #[serde(default)]
    pub gan: GanSpec,
    /// How many workers the job may have.
    #[serde(default)]
    pub workers: WorkerRange,
    /// How gradients travel.
    #[serde(default)]
    pub collective: CollectiveSpec,
    /// When checkpoints are written and how many are kept.
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
    /// How often the replicas are compared.
    #[serde(default)]
    pub checks: CheckSpec,
}

fn one() -> u32 {
    1
}

/// What kind of training a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// Image classification: one network, one phase a step.
    Classify,
    /// Generative adversarial training: discriminator phases, then a generator phase.
    Gan,
}

/// In which order the logical shards' gradients are added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reduction {
    /// One fixed binary tree over the logical shards: the result does not depend on the workers.
    #[default]
    Exact,
    /// Each worker adds its own first: the result depends on how many workers there are.
    Fast,
}

/// The number type of weights and arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 64-bit floating point.
    F64,
    /// 32-bit floating point.
    #[default]
    F32,
    /// Convolutions and matrix products in bfloat16, all else, the weights among it, in 32 bits.
    Bf16,
}

/// How images, and what a network makes of them, lie in memory. It decides which of libtorch's kernels compute, and so
/// about the last bits of the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryFormat {
    /// One channel after the other.
    #[default]
    Contiguous,
    /// The channels of a pixel beside each other.
    ChannelsLast,
}

/// How batch normalization sees the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BatchNorm {
    /// Statistics of the whole global batch.
    #[default]
    Sync,
    /// Statistics of each logical shard by itself.
    Local,
    /// The network is built without batch normalization.
    None,
}

/// A network: its name in `worker models` and its own options.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// The architecture.
    pub name: String,
    /// How its batch normalization sees the batch.
    #[serde(default)]
    pub batch_norm: BatchNorm,
    /// An optimizer of its own, instead of the job's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<OptimizerSpec>,
    /// A safetensors file with the weights to begin with, instead of those that the seed gives. A path on every worker;
    /// a relative one is looked up from where the worker was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// BLAKE3 of that file, in hex: the result depends on its bytes, so they belong to the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_blake3: Option<String>,
    /// Every further key: the architecture's own options.
    #[serde(flatten)]
    pub options: serde_json::Map<String, serde_json::Value>,
}

/// The datasets of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSpec {
    /// The training set's name in the coordinator's store.
    pub train: String,
    /// The test set's name; no evaluation without it.
    pub test: Option<String>,
    /// Makes every image grey (1) or coloured (3), before all else; without it they stay as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels: Option<u32>,
    /// In which order a network gets the channels of coloured images, which are red, green and blue everywhere else.
    #[serde(default, skip_serializing_if = "ChannelOrder::is_rgb")]
    pub channel_order: ChannelOrder,
    /// Applied to every training sample, in this order.
    #[serde(default)]
    pub augment: Vec<Augment>,
    /// Applied to every test sample, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evaluate: Vec<Augment>,
    /// How raw pixels become numbers.
    #[serde(default)]
    pub scale: PixelScale,
    /// How the numbers of a whole image are made uncorrelated then, if they are: before `augment`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whiten: Option<Whiten>,
    /// What `standardize` subtracts from each channel of pixels from 0 to 1, instead of the training set's mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean: Option<Vec<f64>>,
    /// What it divides by, instead of the training set's standard deviation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub std: Option<Vec<f64>>,
}

/// The order of a coloured image's channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChannelOrder {
    /// Red, green, blue.
    #[default]
    Rgb,
    /// Blue, green, red, as OpenCV reads images: for weights from Caffe.
    Bgr,
}

impl ChannelOrder {
    /// Whether it is the usual one.
    pub fn is_rgb(&self) -> bool {
        *self == Self::Rgb
    }
}

/// How raw pixels 0..=255 become numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PixelScale {
    /// Zero mean and unit variance by the training set's per-channel statistics.
    #[default]
    Standardize,
    /// 0 to 1.
    Unit,
    /// Global contrast normalization of each image by itself, as the network sees it, behind all other steps: the mean over
    /// all its pixels and channels becomes 0 and its Euclidean norm 55, which for CIFAR's 3072 numbers is a standard deviation
    /// of 0.99; a constant image becomes zero. `global_contrast_normalize` of pylearn2 (`expr/preprocessing.py`) with
    /// `scale=55`, as its CIFAR sets for Maxout and Network in Network are made with.
    Gcn,
}

/// How the numbers of a whole image are made uncorrelated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Whiten {
    /// An image x, its contrast normalized, becomes (x - m) P, where m is the training images' mean and, with their covariance C =
    /// V diag(l) Vᵀ, 0.1 added to its diagonal, P = V diag(l^(-1/2)) Vᵀ: `ZCA` of pylearn2 (`datasets/preprocessing.py`), by which
    /// its CIFAR sets for Maxout and Network in Network are made. m and P are the training set's (`coordinator dataset whiten`).
    Zca,
}

/// The loss of a `classify` job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossSpec {
    /// The share of the target spread evenly over all classes, in [0, 1).
    pub label_smoothing: f64,
}

/// Bounds on the reduced gradient, applied before the optimizer: by value first, then by norm.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClipSpec {
    /// The largest magnitude of one element.
    pub value: Option<f64>,
    /// The largest Euclidean norm over all of a network's gradients.
    pub norm: Option<f64>,
}

/// What a `gan` job alternates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GanSpec {
    /// k: discriminator updates before each generator update.
    pub discriminator_steps: u32,
    /// Images in the sample grid written after every epoch; a square number.
    pub grid: u32,
}

impl Default for GanSpec {
    fn default() -> Self {
        Self { discriminator_steps: 1, grid: 64 }
    }
}

/// How many workers a job may have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerRange {
    /// The job waits until this many are free.
    pub min: u32,
    /// The job never takes more; at most V.
    pub max: Option<u32>,
    /// After so many seconds without its coordinator a worker pauses the job, with its state kept. Until then a
    /// coordinator that can reach none of a job's workers does not give it to others.
    pub orphan_timeout_s: u64,
}

impl Default for WorkerRange {
    fn default() -> Self {
        Self { min: 1, max: None, orphan_timeout_s: 3600 }
    }
}

/// How gradients travel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CollectiveSpec {
    /// Which transport carries the collectives.
    pub backend: Backend,
    /// Gradients per all-reduce, in bytes.
    pub bucket_bytes: u64,
    /// After how many seconds without progress a collective is given up. A rank of another host of which nothing at all is
    /// heard, stopped or cut off, is given up after five seconds if this is more.
    pub timeout_s: f64,
    /// The form in which gradients travel.
    pub wire: WireFormat,
    /// The rank of the approximation that `wire = "powersgd"` sends; 4 unless given.
    pub wire_rank: Option<u32>,
}

impl CollectiveSpec {
    /// The rank of the approximation that `wire = "powersgd"` sends.
    pub fn approximation_rank(&self) -> u32 {
        self.wire_rank.unwrap_or(4)
    }
}

impl Default for CollectiveSpec {
    fn default() -> Self {
        // 25 MiB, the size that DDP made the field's default.
        Self {
            backend: Backend::Auto,
            bucket_bytes: 25 << 20,
            timeout_s: 10.0,
            wire: WireFormat::F32,
            wire_rank: None,
        }
    }
}

/// The form in which gradients travel. All but the first lose some of their precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WireFormat {
    /// The numbers that the network computes with.
    #[default]
    F32,
    /// Rounded to 8 significant bits: half of the bytes.
    Bf16,
    /// 8-bit integers with a scale for each 64, and error feedback: a quarter of the bytes.
    Int8,
    /// A low-rank approximation of each matrix, with error feedback.
    ///
    /// Vogels, Karimireddy, Jaggi, "PowerSGD: practical low-rank gradient compression for distributed optimization",
    /// 2019.
    PowerSgd,
}

/// Which transport carries the collectives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// The best one that all ranks share: NCCL where each has a GPU of its own.
    #[default]
    Auto,
    /// Shared memory: all ranks are on one host.
    Shm,
    /// QUIC between all ranks, encrypted and mutually authenticated, even on one host.
    Quic,
    /// Gradients over NCCL, from GPU to GPU: every rank needs one. Small values still go the way of `auto`.
    Nccl,
}

/// When checkpoints are written and how many are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSpec {
    /// A checkpoint every so many steps, besides the one at the end; 0 writes only that one.
    pub every_steps: u64,
    /// How many of the newest are kept.
    pub keep: u32,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { every_steps: 200, keep: 3 }
    }
}

/// How often the replicas are compared, and what follows when one is not what the others are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckSpec {
    /// A comparison before the update of every so-manieth step, besides those at the end of an epoch and before a
    /// checkpoint; 0 for only those. Only with 1 can no gradient of a wrong replica be applied.
    pub digest_every_steps: Option<u64>,
    /// What follows.
    pub on_mismatch: OnMismatch,
}

impl Default for CheckSpec {
    fn default() -> Self {
        Self { digest_every_steps: None, on_mismatch: OnMismatch::Heal }
    }
}

impl CheckSpec {
    /// A comparison every so many steps on `devices` such as `cpu` or `cuda:0`: in each, if the job does not say, but
    /// seldom where there are GPUs, whose memory corrects itself and whose steps are short.
    pub fn every_steps<'a>(&self, mut devices: impl Iterator<Item = &'a str>) -> u64 {
        self.digest_every_steps.unwrap_or_else(|| if devices.all(|device| device == "cpu") { 1 } else { 50 })
    }
}

/// What follows when a replica is not what the others are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnMismatch {
    /// Who differs gets the state of the others, where that is known to be right; else all go back to the newest
    /// checkpoint, before which all replicas were the same.
    #[default]
    Heal,
    /// The job fails.
    Stop,
}

impl JobSpec {
    /// Parses and checks a job file. `file` is the name used in errors.
    pub fn parse(file: &str, text: &str) -> Result<Self, JobError> {
        let spec: Self = toml::from_str(text).map_err(|e| error::from_toml(file, text, &e))?;
        validate::check(&spec).map_err(|fault| error::from_fault(file, text, fault))?;
        Ok(spec)
    }

    /// The error for a value that only the caller can judge, such as a dataset that does not exist.
    /// `path` names the key, `["data", "train"]` for instance.
    pub fn fault(file: &str, text: &str, path: &[&str], what: String) -> JobError {
        error::from_fault(file, text, validate::Fault::at(path, what))
    }

    /// The job's networks in the order in which they are built and stored.
    pub fn networks(&self) -> Vec<(&'static str, &ModelSpec)> {
        let named =
            [("model", &self.model), ("generator", &self.generator), ("discriminator", &self.discriminator)];
        named.into_iter().filter_map(|(name, spec)| spec.as_ref().map(|s| (name, s))).collect()
    }

    /// The optimizer of the network described by `model`.
    pub fn optimizer_of<'a>(&'a self, model: &'a ModelSpec) -> &'a OptimizerSpec {
        model.optimizer.as_ref().unwrap_or(&self.optimizer)
    }

    /// The largest number of workers that the job can use.
    pub fn max_workers(&self) -> u32 {
        self.workers.max.unwrap_or(self.logical_shards).min(self.logical_shards)
    }

    /// The minibatch of the step that each phase of a step sees. A phase whose minibatch is missing from an epoch's last
    /// step is left out there.
    pub fn phase_minibatches(&self) -> Vec<usize> {
        match self.task {
            Task::Classify => vec![0],
            Task::Gan => (0..self.gan.discriminator_steps as usize).chain([0]).collect(),
        }
    }

    /// How many steps the job has, given the steps of one epoch.
    pub fn total_steps(&self, steps_per_epoch: u64) -> u64 {
        self.steps.unwrap_or_else(|| self.epochs.unwrap_or(0) * steps_per_epoch)
    }
}

#[cfg(test)]
mod tests;
