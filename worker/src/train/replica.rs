//! A worker's copy of the training state: every network's variables, every optimizer, the step.

use super::error::TrainError;
use super::statistics;
use crate::tasks::TaskPlan;
use lockstep_common::digest::{TensorBytes, TensorHasher};
use lockstep_common::job::{ClipSpec, JobSpec};
use lockstep_nn::NnError;
use lockstep_nn::bytes::{RawTensor, describe};
use lockstep_nn::forward::BnRecord;
use lockstep_nn::optim::{NamedGradient, Optimizer, clip_norm, clip_value};
use lockstep_nn::schedule::lr_factor;
use lockstep_nn::shim::with_bytes;
use lockstep_nn::vars::Vars;
use std::collections::BTreeMap;
use tch::Tensor;

/// Tensors by full name, outside of libtorch.
pub(crate) type RawTensors = BTreeMap<String, RawTensor>;

pub(crate) struct Replica {
    /// By network.
    pub(crate) vars: Vec<Vars>,
    optimizers: Vec<Optimizer>,
    prefixes: Vec<String>,
    /// Updates done so far, by network: a GAN's discriminator may learn more often than its generator.
    updates: Vec<u64>,
    /// Committed steps.
    pub(crate) step: u64,
}

impl Replica {
    /// The state before the first step.
    pub(crate) fn new(plan: &TaskPlan, kind: tch::Kind, device: tch::Device) -> Result<Self, TrainError> {
        let vars = plan.build(kind, device)?;
        let optimizers = plan.networks.iter().zip(&vars).map(|(n, v)| Optimizer::new(&n.optimizer, v));
        Ok(Self {
            optimizers: optimizers.collect::<Result<_, _>>()?,
            prefixes: (0..vars.len()).map(|i| plan.prefix(i)).collect(),
            updates: vec![0; vars.len()],
            vars,
            step: 0,
        })
    }

    /// Where the weights are.
    pub(crate) fn device(&self) -> tch::Device {
        self.vars.first().map_or(tch::Device::Cpu, Vars::device)
    }

    /// Updates done so far, by network.
    pub(crate) fn updates(&self) -> &[u64] {
        &self.updates
    }

    /// One update of `network`: clips, then lets the optimizer act.
    pub(crate) fn update(
        &mut self,
        network: usize,
        mut gradients: Vec<NamedGradient>,
        clip: &ClipSpec,
        lr: f64,
    ) -> Result<(), TrainError> {
        if let Some(max) = clip.value {
            clip_value(&mut gradients, max)?;
        }
        if let Some(max) = clip.norm {
            clip_norm(&mut gradients, max)?;
        }
        self.optimizers[network].step(&self.vars[network], &gradients, lr, self.updates[network])?;
        self.updates[network] += 1;
        Ok(())
    }

    /// Moves running statistics towards the batches of a phase.
    pub(crate) fn apply_statistics(&self, records: &[BnRecord]) -> Result<(), TrainError> {
        for (network, vars) in self.vars.iter().enumerate() {
            let own = records.iter().filter(|r| usize::from(r.network) == network);
            statistics::apply(vars, own)?;
        }
        Ok(())
    }

    /// Weights and buffers of all networks.
    pub(crate) fn weights(&self) -> Result<RawTensors, TrainError> {
        let mut tensors = RawTensors::new();
        for (vars, prefix) in self.vars.iter().zip(&self.prefixes) {
            for (name, var) in vars.iter() {
                tensors.insert(format!("{prefix}{name}"), RawTensor::copy_from(&var.tensor)?);
            }
        }
        Ok(tensors)
    }

    /// Every optimizer's state, under the network's name, and the update counters.
    pub(crate) fn optimizer_state(&self, plan: &TaskPlan) -> Result<RawTensors, TrainError> {
        let mut tensors = RawTensors::new();
        for ((network, optimizer), updates) in plan.networks.iter().zip(&self.optimizers).zip(&self.updates) {
            for (name, tensor) in optimizer.state() {
                tensors.insert(format!("{}/{name}", network.name), RawTensor::copy_from(&tensor)?);
            }
            let updates = Tensor::f_from_slice(&[*updates as i64])?;
            tensors.insert(format!("{}/updates", network.name), RawTensor::copy_from(&updates)?);
        }
        Ok(tensors)
    }

    /// Takes over a checkpoint: all of it, or nothing and an error that names what does not fit.
    pub(crate) fn restore(
        &mut self,
        plan: &TaskPlan,
        step: u64,
        weights: &BTreeMap<String, Tensor>,
        optimizer: &BTreeMap<String, Tensor>,
    ) -> Result<(), TrainError> {
        let part = |all: &BTreeMap<String, Tensor>, prefix: &str| -> BTreeMap<String, Tensor> {
            let own =
                all.iter().filter_map(|(n, t)| Some((n.strip_prefix(prefix)?.to_owned(), t.shallow_clone())));
            own.collect()
        };
        for (i, network) in plan.networks.iter().enumerate() {
            self.vars[i].load(&part(weights, &self.prefixes[i]))?;
            let mut state = part(optimizer, &format!("{}/", network.name));
            let Some(updates) = state.remove("updates") else {
                return Err(TrainError::Fatal(format!(
                    "the checkpoint has no update counter of `{}`",
                    network.name
                )));
            };
            self.updates[i] = u64::try_from(updates.f_int64_value(&[0])?).unwrap_or(0);
            self.optimizers[i].load_state(&state)?;
        }
        self.step = step;
        Ok(())
    }

    /// BLAKE3 of all weights and buffers in name order.
    pub(crate) fn weights_digest(&self) -> Result<String, TrainError> {
        let networks = self.vars.iter().zip(&self.prefixes);
        let named = networks.flat_map(|(vars, prefix)| {
            vars.iter().map(move |(name, var)| (format!("{prefix}{name}"), var.tensor.shallow_clone()))
        });
        digest(named.collect())
    }

    /// BLAKE3 of every optimizer's state and the update counters.
    pub(crate) fn optimizers_digest(&self) -> Result<String, TrainError> {
        let mut tensors = BTreeMap::new();
        for (network, (optimizer, updates)) in self.optimizers.iter().zip(&self.updates).enumerate() {
            let state = optimizer.state().into_iter();
            tensors.extend(state.map(|(name, tensor)| (format!("{network}/{name}"), tensor)));
            tensors.insert(format!("{network}/updates"), Tensor::f_from_slice(&[*updates as i64])?);
        }
        digest(tensors)
    }

    /// Changes the lowest bit of one weight, for tests of what follows.
    pub(crate) fn flip_bit(&self) -> Result<(), TrainError> {
        let Some((_, var)) = self.vars.first().and_then(|vars| vars.parameters().next()) else {
            return Ok(());
        };
        let mut raw = RawTensor::copy_from(&var.tensor)?;
        if let Some(byte) = raw.bytes.first_mut() {
            *byte ^= 1;
        }
        Ok(tch::no_grad(|| var.tensor.f_detach()?.f_copy_(&raw.to_tensor()?).map_err(NnError::from))?)
    }
}

/// The digest of tensors in name order, straight from their memory: no lane works on a replica between two steps.
fn digest(tensors: BTreeMap<String, Tensor>) -> Result<String, TrainError> {
    let mut hasher = TensorHasher::new();
    for (name, tensor) in &tensors {
        let (dtype, shape) = describe(tensor)?;
        with_bytes(tensor, |bytes| {
            let (name, dtype) = (name.as_str().into(), dtype.into());
            hasher.add(&TensorBytes { name, dtype, shape: shape.as_slice().into(), bytes: bytes.into() });
        })?;
    }
    Ok(hasher.finish())
}

/// A raw tensor as checkpoints and digests take it.
pub(crate) fn tensor_bytes<'a>(name: &'a str, tensor: &'a RawTensor) -> TensorBytes<'a> {
    TensorBytes {
        name: name.into(),
        dtype: tensor.dtype.into(),
        shape: tensor.shape.as_slice().into(),
        bytes: tensor.bytes.as_slice().into(),
    }
}

/// The learning rate of `network` at `step`.
pub(crate) fn learning_rate(
    job: &JobSpec,
    plan: &TaskPlan,
    network: usize,
    step: u64,
    steps: u64,
    per_epoch: u64,
) -> f64 {
    plan.networks[network].optimizer.lr() * lr_factor(&job.schedule, step, steps, per_epoch)
}
