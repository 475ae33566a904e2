//! Trained classifiers: checkpoints that jobs wrote, and files of weights.

use crate::tasks::{LaneTask, TaskPlan};
use crate::train::error::TrainError;
use crate::train::replica::Replica;
use anyhow::{Context, Result, bail};
use lockstep_common::checkpoint::{
    CheckpointFiles, MANIFEST_FILE, OPTIMIZER_FILE, WEIGHTS_FILE, decode_tensors,
};
use lockstep_common::job::{DataSpec, JobSpec, ModelSpec, Precision, Task};
use lockstep_common::wire::Position;
use lockstep_nn::bytes::RawTensor;
use lockstep_nn::vars::Vars;
use lockstep_nn::{models, weights};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// A trained classifier that has been read and not been built yet.
pub(crate) struct Candidate {
    /// As it was named.
    pub(crate) path: PathBuf,
    /// What trained it; of a file of weights, what would.
    pub(crate) job: JobSpec,
    stored: Stored,
}

enum Stored {
    /// A step of a job.
    Checkpoint(Box<CheckpointFiles>),
    /// A safetensors file.
    Weights(Vec<u8>),
}

/// A classifier at hand.
pub(crate) struct Network {
    plan: TaskPlan,
    vars: Vec<Vars>,
}

/// What a file of weights does not tell.
pub(crate) enum Recipe<'a> {
    /// A job file says all of it.
    Job(&'a JobSpec),
    /// The shapes tell the network.
    Data(&'a DataSpec),
}

impl Candidate {
    /// Reads the checkpoint or the file of weights at `path`; `recipe` is for the latter.
    pub(crate) fn read(path: &Path, recipe: &Recipe<'_>) -> Result<Self> {
        let (job, stored) = if path.is_dir() {
            read_checkpoint(path)?
        } else if path.is_file() {
            read_weights(path, recipe)?
        } else {
            bail!("there is no such file or folder; a checkpoint is a folder `step-…` or a .safetensors file")
        };
        if job.task != Task::Classify {
            bail!("it is of a `gan` job, and only classifiers are evaluated");
        }
        Ok(Self { path: path.to_path_buf(), job, stored })
    }

    /// Whether it is a file of weights.
    pub(crate) fn is_weights(&self) -> bool {
        matches!(self.stored, Stored::Weights(_))
    }

    /// How many steps it was trained for, if it tells.
    pub(crate) fn step(&self) -> Option<u64> {
        match &self.stored {
            Stored::Checkpoint(files) => Some(files.manifest.info.step),
            Stored::Weights(_) => None,
        }
    }

    /// The network's section of a job file.
    pub(crate) fn model(&self) -> Result<&ModelSpec> {
        self.job.model.as_ref().context("its job has no `[model]`")
    }

    /// How many classes it tells apart.
    pub(crate) fn classes(&self) -> Result<usize> {
        Ok(usize::try_from(models::classes(self.model()?)?)?)
    }

    /// How many channels the images have that it takes, if its architecture leaves that open.
    pub(crate) fn channels(&self) -> Result<Option<u32>> {
        let model = self.model()?;
        let option = models::info(&model.name)?.options.iter().find(|option| option.name == "in_channels");
        let given = model.options.get("in_channels").and_then(|value| value.as_u64()?.try_into().ok());
        Ok(option.and_then(|option| given.or_else(|| option.default.parse().ok())))
    }

    /// Refuses images of another number of channels than it takes.
    pub(crate) fn check_channels(&self, channels: u32) -> Result<()> {
        match self.channels()? {
            Some(taken) if taken != channels => {
                bail!(
                    "its network takes images of {taken} channels and these have {channels}; `channels` can make them so"
                )
            }
            _ => Ok(()),
        }
    }

    /// Computes in `precision` from now on.
    pub(crate) fn set_precision(&mut self, precision: Precision) -> Result<()> {
        let is_wide = |precision| precision == Precision::F64;
        if !self.is_weights() && is_wide(precision) != is_wide(self.job.precision) {
            bail!("its weights are of another precision than the one asked for; leave --precision out");
        }
        self.job.precision = precision;
        Ok(())
    }

    /// Builds the network, with the averages of its weights if its job keeps some, as in the job's own evaluation.
    pub(crate) fn network(&self, device: Device) -> Result<Network> {
        let kind = if self.job.precision == Precision::F64 { Kind::Double } else { Kind::Float };
        let plan = TaskPlan::new(&self.job);
        let vars = match &self.stored {
            Stored::Checkpoint(files) => restored(files, &plan, kind, device)?,
            Stored::Weights(bytes) => {
                let tensors = decode_tensors(bytes)?;
                vec![weights::load("model", self.model()?, &tensors, kind, device)?]
            }
        };
        Ok(Network { plan, vars })
    }
}

impl Network {
    /// The network at work, for one thread.
    pub(crate) fn lane(&self) -> Result<Box<dyn LaneTask>, TrainError> {
        let frozen = || self.vars.iter().map(Vars::frozen).collect::<Result<Vec<_>, _>>();
        self.plan.lane(&mut frozen()?, &mut frozen()?)
    }
}

fn read_checkpoint(dir: &Path) -> Result<(JobSpec, Stored)> {
    if !dir.join(MANIFEST_FILE).exists() {
        let steps = std::fs::read_dir(dir).into_iter().flatten().filter_map(|entry| entry.ok());
        let newest = steps.map(|entry| entry.path()).filter(|path| path.join(MANIFEST_FILE).exists()).max();
        match newest {
            Some(newest) => bail!("it has no {MANIFEST_FILE}; `{}` is a checkpoint", newest.display()),
            None => bail!("it has no {MANIFEST_FILE}, so it is not a checkpoint"),
        }
    }
    let files = CheckpointFiles::read(dir)?;
    let job = JobSpec::parse("its job file", &files.manifest.info.job_text)?;
    Ok((job, Stored::Checkpoint(Box::new(files))))
}

fn read_weights(file: &Path, recipe: &Recipe<'_>) -> Result<(JobSpec, Stored)> {
    let bytes = std::fs::read(file)?;
    let tensors = decode_tensors(&bytes)?;
    let job = match recipe {
        Recipe::Job(job) => (*job).clone(),
        Recipe::Data(data) => {
            let model = weights::identify(&tensors);
            around(&model.context("which network are these weights of? --job FILE says it")?, data)?
        }
    };
    Ok((job, Stored::Weights(bytes)))
}

/// A job of `model` and `data` that is never trained.
fn around(model: &ModelSpec, data: &DataSpec) -> Result<JobSpec> {
    Ok(serde_json::from_value(serde_json::json!({
        "name": "weights", "task": "classify", "seed": 0, "steps": 0, "global_batch": 8, "logical_shards": 8,
        "model": model, "data": data, "optimizer": { "name": "sgd", "lr": 1.0 },
    }))?)
}

fn restored(files: &CheckpointFiles, plan: &TaskPlan, kind: Kind, device: Device) -> Result<Vec<Vars>> {
    let tensors = |name: &str| -> Result<BTreeMap<String, Tensor>> {
        let bytes = files.file(name).with_context(|| format!("it has no {name}"))?;
        let unpack = |t: lockstep_common::digest::TensorBytes<'_>| {
            Ok((t.name.to_string(), RawTensor::tensor_of(&t.dtype, &t.shape, &t.bytes)?))
        };
        decode_tensors(bytes)?.into_iter().map(unpack).collect()
    };
    let mut replica = Replica::new(plan, kind, device)?;
    let position = Position::at(files.manifest.info.step);
    replica.restore(plan, position, &tensors(WEIGHTS_FILE)?, &tensors(OPTIMIZER_FILE)?)?;
    replica.exchange_averages()?;
    Ok(replica.vars)
}
