//! The kinds of training: which networks there are, which phases a step has, what each computes.

mod autocast;
mod classify;
mod gan;

use crate::train::error::TrainError;
use crate::train::phase::{PhasePlan, ShardBatch, ShardLoss};
use crate::weights;
use autocast::Autocast;
use lockstep_common::job::{
    AverageSpec, JobSpec, MemoryFormat, ModelSpec, OnMismatch, OptimizerSpec, Precision, Task,
};
use lockstep_nn::forward::Forward;
use lockstep_nn::models::{self, ChannelsLast, Model};
use lockstep_nn::vars::Vars;
use tch::Tensor;

/// One network of a job.
pub(crate) struct NetworkPlan {
    /// Its name, which prefixes its tensors where a job has several.
    pub(crate) name: &'static str,
    pub(crate) model: ModelSpec,
    pub(crate) optimizer: OptimizerSpec,
}

/// What a job does, the same on every worker.
pub(crate) struct TaskPlan {
    pub(crate) task: Task,
    pub(crate) networks: Vec<NetworkPlan>,
    pub(crate) phases: Vec<PhasePlan>,
    /// Minibatches of the training set that a step consumes.
    pub(crate) minibatches: usize,
    /// Whether the job is evaluated on a test set.
    pub(crate) is_evaluated: bool,
    /// The average of the weights to evaluate with, if there is to be one.
    pub(crate) average: Option<AverageSpec>,
    job: JobSpec,
}

/// A logical shard's networks at work. Lives on the shard's thread.
pub(crate) trait LaneTask: Send {
    /// The shard's share of the phase's loss and figures.
    fn forward(
        &mut self,
        phase: &PhasePlan,
        batch: &ShardBatch,
        forward: &mut Forward,
    ) -> Result<ShardLoss, TrainError>;

    /// What a classifier says of each of `images`, [n, channels, height, width]: its logits, [n, classes].
    fn logits(&mut self, images: &Tensor) -> Result<Tensor, TrainError>;

    /// A picture of the state of training, [channels, height, width] with values 0 to 1, where a task has one.
    fn picture(&mut self) -> Result<Option<Tensor>, TrainError>;
}

impl TaskPlan {
    /// The plan of `job`.
    pub(crate) fn new(job: &JobSpec) -> Self {
        let networks = job
            .networks()
            .into_iter()
            .map(|(name, model)| NetworkPlan {
                name,
                model: model.clone(),
                optimizer: job.optimizer_of(model).clone(),
            })
            .collect();
        let phases = match job.task {
            Task::Classify => classify::phases(),
            Task::Gan => gan::phases(job.gan.discriminator_steps),
        };
        let minibatches = phases.iter().map(|p| p.minibatch + 1).max().unwrap_or(1);
        let is_evaluated = job.task == Task::Classify && job.data.test.is_some();
        let average = job.average.clone();
        Self { task: job.task, networks, phases, minibatches, is_evaluated, average, job: job.clone() }
    }

    /// Whether the job is to fail when its replicas are found to differ.
    pub(crate) fn stops_on_mismatch(&self) -> bool {
        self.job.checks.on_mismatch == OnMismatch::Stop
    }

    /// The prefix of a network's tensors in checkpoints: none where the job has one network, so that a classifier's
    /// names are those of its architecture.
    pub(crate) fn prefix(&self, network: usize) -> String {
        if self.networks.len() == 1 { String::new() } else { format!("{}.", self.networks[network].name) }
    }

    /// The master variables of every network with the values that the job begins with: those of its seed, or of a
    /// file of weights.
    pub(crate) fn begin(&self, kind: tch::Kind, device: tch::Device) -> Result<Vec<Vars>, TrainError> {
        let begin = |plan: &NetworkPlan| match weights::load(plan, kind, device)? {
            Some(loaded) => Ok(loaded),
            None => self.seeded(plan, kind, device),
        };
        self.networks.iter().map(begin).collect()
    }

    /// The master variables of every network with values that the seed gives.
    pub(crate) fn build(&self, kind: tch::Kind, device: tch::Device) -> Result<Vec<Vars>, TrainError> {
        self.networks.iter().map(|plan| self.seeded(plan, kind, device)).collect()
    }

    fn seeded(&self, plan: &NetworkPlan, kind: tch::Kind, device: tch::Device) -> Result<Vars, TrainError> {
        let mut vars = Vars::new(plan.name, self.job.seed, kind, device);
        models::build(&plan.model, &mut vars.root())?;
        Ok(vars)
    }

    /// The network over `vars`, as the job lays out its images.
    fn model(&self, plan: &NetworkPlan, vars: &mut Vars) -> Result<Box<dyn Model>, TrainError> {
        let model = models::build(&plan.model, &mut vars.root())?;
        Ok(match self.job.memory_format {
            MemoryFormat::Contiguous => model,
            MemoryFormat::ChannelsLast => Box::new(ChannelsLast(model)),
        })
    }

    /// A lane's networks: over `learning` replicas, and over frozen ones for when another network learns.
    pub(crate) fn lane(
        &self,
        learning: &mut [Vars],
        frozen: &mut [Vars],
    ) -> Result<Box<dyn LaneTask>, TrainError> {
        let mut modules = Vec::new();
        for ((plan, learning), frozen) in self.networks.iter().zip(learning).zip(frozen) {
            let kind = learning.kind();
            let device = learning.device();
            modules.push(Modules {
                learning: self.model(plan, learning)?,
                frozen: self.model(plan, frozen)?,
                kind,
                device,
            });
        }
        let device = modules.first().map_or(tch::Device::Cpu, |m| m.device);
        let task = match self.task {
            Task::Classify => classify::lane(modules, &self.job),
            Task::Gan => gan::lane(modules, &self.job),
        }?;
        Ok(match self.job.precision {
            Precision::Bf16 => Box::new(Autocast { task, device }),
            Precision::F32 | Precision::F64 => task,
        })
    }
}

/// One network on a lane, twice over the same weights.
struct Modules {
    learning: Box<dyn Model>,
    frozen: Box<dyn Model>,
    kind: tch::Kind,
    device: tch::Device,
}
