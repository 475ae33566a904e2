//! The options of `worker eval` and `worker predict`.

use crate::cli::DeviceArg;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use lockstep_common::job::{Augment, ChannelOrder, Crops, DataSpec, JobSpec, PixelScale, Precision};
use std::path::PathBuf;

/// `worker eval`.
#[derive(Args)]
pub(crate) struct EvalArgs {
    /// A checkpoint: the folder `step-…` of a job, or a .safetensors file of weights. Several are compared.
    #[arg(long, required = true, value_name = "PATH")]
    pub(crate) checkpoint: Vec<PathBuf>,
    /// Also evaluate all checkpoints together: the average of their softmax.
    #[arg(long)]
    pub(crate) ensemble: bool,
    /// The test set [default: the job's].
    #[arg(long, value_name = "NAME")]
    pub(crate) dataset: Option<String>,
    /// Samples at a time [default: 100, or as many as have 36 crops].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub(crate) batch: Option<u64>,
    /// Write the whole report as JSON, to a file or to standard output (`-`).
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// `worker predict`.
#[derive(Args)]
pub(crate) struct PredictArgs {
    /// A checkpoint: the folder `step-…` of a job, or a .safetensors file of weights.
    #[arg(long, value_name = "PATH")]
    pub(crate) checkpoint: PathBuf,
    /// Images, JPEG or PNG.
    #[arg(required = true)]
    pub(crate) images: Vec<PathBuf>,
    /// The dataset whose class names are told and whose image size the network takes [default: the job's].
    #[arg(long, value_name = "NAME")]
    pub(crate) dataset: Option<String>,
    /// Print JSON for scripts.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// What both take.
#[derive(Args)]
pub(crate) struct CommonArgs {
    /// Parts of each image whose softmax is averaged: 1, 10, 12 or 144 [default: the job's, or 1].
    #[arg(long, value_parser = crops)]
    pub(crate) crops: Option<Crops>,
    /// A folder of datasets on this host [default: that of the checkpoint's data directory, ~/.lockstep/datasets].
    #[arg(long, value_name = "DIR")]
    pub(crate) datasets: Vec<PathBuf>,
    /// Where to compute: `cpu`, or `cuda:0`, `cuda:1`, ...
    #[arg(long, default_value = "cpu")]
    pub(crate) device: DeviceArg,
    /// Threads that compute at a time; all cores by default.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// The number type to compute with [default: the job's, or f32].
    #[arg(long)]
    pub(crate) precision: Option<PrecisionArg>,
    #[command(flatten)]
    pub(crate) weights: WeightsArgs,
}

/// What a file of weights does not tell.
#[derive(Args)]
#[command(next_help_heading = "Files of weights")]
pub(crate) struct WeightsArgs {
    /// A job file that says which network the weights are of and how images are prepared.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["channels", "channel_order", "resize", "center_crop", "scale", "mean", "std", "train"])]
    job: Option<PathBuf>,
    /// Make images grey (1) or coloured (3).
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=3))]
    channels: Option<u32>,
    /// Make the shorter side so many pixels long.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    resize: Option<u32>,
    /// Take the middle square of so many pixels a side.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    center_crop: Option<u32>,
    /// The order in which the network gets the channels; `bgr` for weights from Caffe.
    #[arg(long, value_enum)]
    channel_order: Option<ChannelOrderArg>,
    /// How pixels become numbers: from 0 to 1, standardized by mean and std, or each image by its own contrast (`gcn`).
    #[arg(long, value_enum)]
    scale: Option<ScaleArg>,
    /// What `standardize` subtracts from pixels of 0 to 1, by channel.
    #[arg(long, value_delimiter = ',', requires = "std")]
    mean: Option<Vec<f64>>,
    /// What it divides by.
    #[arg(long, value_delimiter = ',', requires = "mean")]
    std: Option<Vec<f64>>,
    /// The training set, by whose mean and standard deviation pixels are standardized.
    #[arg(long, value_name = "NAME")]
    train: Option<String>,
}

/// How pixels become numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScaleArg {
    Unit,
    Standardize,
    Gcn,
}

/// The order of a coloured image's channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ChannelOrderArg {
    Rgb,
    Bgr,
}

/// A number type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrecisionArg {
    F64,
    F32,
    Bf16,
}

impl From<PrecisionArg> for Precision {
    fn from(arg: PrecisionArg) -> Self {
        match arg {
            PrecisionArg::F64 => Self::F64,
            PrecisionArg::F32 => Self::F32,
            PrecisionArg::Bf16 => Self::Bf16,
        }
    }
}

fn crops(text: &str) -> Result<Crops, String> {
    let count: u32 = text.parse().map_err(|_| "it must be 1, 10, 12 or 144".to_owned())?;
    Crops::try_from(count).map_err(|e| e.to_string())
}

impl CommonArgs {
    /// Threads that compute at a time.
    pub(crate) fn threads(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.threads.map_or_else(all, |threads| threads as usize)
    }
}

impl WeightsArgs {
    /// The job file, if one is named.
    pub(crate) fn job(&self) -> Result<Option<JobSpec>> {
        let Some(path) = &self.job else { return Ok(None) };
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{shown}`"))?;
        Ok(Some(JobSpec::parse(&shown, &text)?))
    }

    /// Whether any option says how images are prepared.
    pub(crate) fn prepares(&self) -> bool {
        let Self { job: _, channels, channel_order, resize, center_crop, scale, mean, std, train } = self;
        channels.is_some()
            || resize.is_some()
            || center_crop.is_some()
            || channel_order.is_some()
            || scale.is_some()
            || mean.is_some()
            || std.is_some()
            || train.is_some()
    }

    /// How images are prepared where no job says it. `test` is the test set.
    pub(crate) fn data(&self, test: Option<&str>) -> Result<DataSpec> {
        if self.channels == Some(2) {
            bail!("--channels is 2; it must be 1 (grey) or 3 (red, green, blue)");
        }
        if self.std.iter().flatten().any(|std| !(*std > 0.0 && std.is_finite())) {
            bail!("--std must be numbers above 0, one per channel, of pixels from 0 to 1");
        }
        let scale = match self.scale {
            Some(ScaleArg::Unit | ScaleArg::Gcn) if self.mean.is_some() => {
                bail!("--mean and --std are for --scale standardize")
            }
            Some(ScaleArg::Unit) => PixelScale::Unit,
            Some(ScaleArg::Gcn) => PixelScale::Gcn,
            Some(ScaleArg::Standardize) | None => PixelScale::Standardize,
        };
        let resize = self.resize.map(|size| Augment::Resize { size });
        let crop = self.center_crop.map(|size| Augment::CenterCrop { size });
        Ok(DataSpec {
            train: self.train.clone().unwrap_or_default(),
            test: test.map(str::to_owned),
            channels: self.channels,
            augment: Vec::new(),
            evaluate: resize.into_iter().chain(crop).collect(),
            channel_order: match self.channel_order {
                Some(ChannelOrderArg::Bgr) => ChannelOrder::Bgr,
                Some(ChannelOrderArg::Rgb) | None => ChannelOrder::Rgb,
            },
            scale,
            whiten: None,
            mean: self.mean.clone(),
            std: self.std.clone(),
        })
    }
}
