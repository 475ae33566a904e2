//! A worker's copy of the training state: every network's variables, every optimizer, the position.
//!
//! It changes by [`PhaseUpdate`]s only, whole ones: the same on all replicas, and in one that follows.

use super::error::TrainError;
use super::fingerprint::{Fingerprint, Fingerprinter};
use super::{mismatch, statistics};
use crate::tasks::TaskPlan;
use lockstep_common::audit::{ShardSamples, StepAudit};
use lockstep_common::digest::{TensorBytes, TensorHasher};
use lockstep_common::ids::Rank;
use lockstep_common::job::{CheckSpec, ClipSpec, JobSpec, OnMismatch};
use lockstep_common::wire::Position;
use lockstep_nn::NnError;
use lockstep_nn::bytes::{RawTensor, describe};
use lockstep_nn::forward::BnRecord;
use lockstep_nn::optim::{Checksums, NamedGradient, Optimizer, Trace, checksums, clip_norm, clip_value};
use lockstep_nn::schedule::lr_factor;
use lockstep_nn::shim::with_bytes;
use lockstep_nn::vars::{Role, Vars};
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
    /// Phases of the next step that have been applied.
    phase: u16,
    /// What those came to, by name.
    figures: BTreeMap<String, f64>,
    /// What the shards were given in those.
    samples: StepAudit,
    /// Whether it is of no use any more: an update has begun and not ended, or it has been [given up](Self::give_up).
    spoilt: bool,
    /// What it was when it last changed on purpose, by network, if that was noted.
    seal: Option<Vec<NetworkSeal>>,
    /// Whether an update found it otherwise than it was sealed.
    changed: bool,
}

/// What a network and its optimizer were when they last changed on purpose.
struct NetworkSeal {
    /// Of parameters and buffers.
    vars: Checksums,
    /// Of the optimizer's state.
    state: Checksums,
}

/// What a phase does to every replica: the same on all of them.
pub(crate) struct PhaseUpdate {
    /// The phase within its step.
    pub(crate) phase: u16,
    /// Whether it is the last one of its step, which is committed with it.
    pub(crate) commits: bool,
    /// The network that learns.
    pub(crate) network: usize,
    /// Its learning rate.
    pub(crate) lr: f64,
    /// Its reduced gradients.
    pub(crate) gradients: Vec<NamedGradient>,
    /// The batch statistics of all networks.
    pub(crate) statistics: Vec<BnRecord>,
    /// What the phase came to, by name.
    pub(crate) figures: BTreeMap<String, f64>,
}

impl PhaseUpdate {
    /// Where a replica that is at `before` is after it.
    pub(crate) fn after(&self, before: Position) -> Position {
        after(before, self.phase, self.commits)
    }

    /// Changes a high bit of one gradient, as bad arithmetic does: not so low a one that the update rounds it away.
    pub(crate) fn flip_bit(&self) -> Result<(), TrainError> {
        match self.gradients.first() {
            Some((_, gradient)) => flip_bit(gradient, 2, 0x40),
            None => Ok(()),
        }
    }
}

/// Where a replica that is at `before` is after `phase`, and perhaps the commit of its step.
pub(crate) fn after(before: Position, phase: u16, commits: bool) -> Position {
    match commits {
        true => Position::at(before.step.saturating_add(1)),
        false => Position { step: before.step, phase: phase.saturating_add(1) },
    }
}

impl Replica {
    /// The state before the first step, but for weights that come from a file: one to restore or fetch another into.
    pub(crate) fn new(plan: &TaskPlan, kind: tch::Kind, device: tch::Device) -> Result<Self, TrainError> {
        Self::over(plan, plan.build(kind, device)?)
    }

    /// The state before the first step.
    pub(crate) fn first(plan: &TaskPlan, kind: tch::Kind, device: tch::Device) -> Result<Self, TrainError> {
        Self::over(plan, plan.begin(kind, device)?)
    }

    fn over(plan: &TaskPlan, vars: Vec<Vars>) -> Result<Self, TrainError> {
        let optimizers = plan
            .networks
            .iter()
            .zip(&vars)
            .map(|(n, v)| Optimizer::new(&n.optimizer, v)?.averaging(plan.average.as_ref(), v));
        Ok(Self {
            optimizers: optimizers.collect::<Result<_, _>>()?,
            prefixes: (0..vars.len()).map(|i| plan.prefix(i)).collect(),
            updates: vec![0; vars.len()],
            vars,
            step: 0,
            phase: 0,
            figures: BTreeMap::new(),
            samples: StepAudit::default(),
            spoilt: false,
            seal: None,
            changed: false,
        })
    }

    /// How far it is.
    pub(crate) fn position(&self) -> Position {
        Position { step: self.step, phase: self.phase }
    }

    /// Whether it is what [`Self::position`] says, as far as is known, and not in the middle of an update that failed.
    pub(crate) fn is_whole(&self) -> bool {
        !self.spoilt
    }

    /// From now on it is of no use any more: it is not what it should be.
    pub(crate) fn give_up(&mut self) {
        self.spoilt = true;
    }

    /// Notes what it is, so that a change that is not an update can be told.
    pub(crate) fn seal(&mut self) -> Result<(), TrainError> {
        let networks = (0..self.vars.len())
            .map(|i| Ok(NetworkSeal { vars: self.var_checksums(i)?, state: self.state_checksums(i)? }));
        self.seal = Some(networks.collect::<Result<_, TrainError>>()?);
        Ok(())
    }

    /// Whether it has been sealed since its last update.
    pub(crate) fn is_sealed(&self) -> bool {
        self.seal.is_some()
    }

    /// A fingerprint of what it was sealed as, and whether it still is that. One without a seal is taken for intact, and the
    /// fingerprint is of what it is. Gradients come from the parameters and buffers, so those are looked at; the update that
    /// reads them sees to the optimizers' states, unless this looks at it `wholly`.
    pub(crate) fn examine(&self, wholly: bool) -> Result<(Fingerprint, bool), TrainError> {
        let mut fingerprint = Fingerprinter::new();
        let mut is_intact = !self.changed;
        for (i, updates) in self.updates.iter().enumerate() {
            let vars = self.var_checksums(i)?;
            match self.seal.as_ref().map(|networks| &networks[i]) {
                Some(seal) => {
                    is_intact &= seal.vars == vars && (!wholly || seal.state == self.state_checksums(i)?);
                    fingerprint.add(&seal.vars);
                    fingerprint.add(&seal.state);
                }
                None => {
                    fingerprint.add(&vars);
                    fingerprint.add(&self.state_checksums(i)?);
                }
            }
            fingerprint.add_number(*updates);
        }
        Ok((fingerprint.finish(), is_intact))
    }

    /// Sees that it is what it was sealed as, before others get it from `rank`, which holds it.
    pub(crate) fn vouch(&mut self, rank: Rank, checks: &CheckSpec) -> Result<(), TrainError> {
        if self.spoilt || self.examine(true)?.1 {
            return Ok(());
        }
        self.give_up();
        let what = format!("after {} {rank} {}", self.position(), mismatch::CHANGED_BY_ITSELF);
        Err(match checks.on_mismatch {
            OnMismatch::Stop => TrainError::Fatal(what),
            OnMismatch::Heal => TrainError::Unavailable { what, culprit: Some(rank) },
        })
    }

    fn var_checksums(&self, network: usize) -> Result<Checksums, TrainError> {
        Ok(checksums(self.vars[network].iter().map(|(name, var)| (name, &var.tensor)))?)
    }

    fn state_checksums(&self, network: usize) -> Result<Checksums, TrainError> {
        Ok(checksums(self.optimizers[network].state())?)
    }

    /// What the phases of the next step that have been applied came to.
    pub(crate) fn figures(&self) -> &BTreeMap<String, f64> {
        &self.figures
    }

    /// Where the weights are.
    pub(crate) fn device(&self) -> tch::Device {
        self.vars.first().map_or(tch::Device::Cpu, Vars::device)
    }

    /// Updates done so far, by network.
    pub(crate) fn updates(&self) -> &[u64] {
        &self.updates
    }

    /// Applies a phase, and seals what comes of it if `seals`. Returns the whole step's figures if that commits it.
    ///
    /// After an error the replica is of no use any more.
    pub(crate) fn apply(
        &mut self,
        mut update: PhaseUpdate,
        clip: &ClipSpec,
        seals: bool,
    ) -> Result<Option<BTreeMap<String, f64>>, TrainError> {
        let after = update.after(self.position());
        self.spoilt = true;
        if let Some(max) = clip.value {
            clip_value(&mut update.gradients, max)?;
        }
        if let Some(max) = clip.norm {
            clip_norm(&mut update.gradients, max)?;
        }
        let seal = self.seal.take();
        let learner = update.network;
        let number = self.updates[learner];
        let (vars, gradients) = (&self.vars[learner], &update.gradients);
        let optimizer = &mut self.optimizers[learner];
        let trace = match seals || seal.is_some() {
            true => Some(optimizer.traced_step(vars, gradients, update.lr, number)?),
            false => {
                optimizer.step(vars, gradients, update.lr, number)?;
                None
            }
        };
        self.updates[learner] += 1;
        for (network, vars) in self.vars.iter().enumerate() {
            let own = update.statistics.iter().filter(|r| usize::from(r.network) == network);
            statistics::apply(vars, own)?;
        }
        let optimizer = &mut self.optimizers[learner];
        let [average_before, average_after] = match trace {
            Some(_) => optimizer.traced_average(&self.vars[learner], number)?,
            None => {
                optimizer.average(&self.vars[learner], number)?;
                Default::default()
            }
        };
        if let (Some(seal), Some(trace)) = (&seal, &trace) {
            let NetworkSeal { vars, state } = &seal[learner];
            let differ = |found: &Checksums, sealed: &Checksums| {
                found.iter().any(|(name, found)| sealed.get(name) != Some(found))
            };
            self.changed |= differ(&trace.parameters_before, vars);
            self.changed |= differ(&trace.state_before, state) || differ(&average_before, state);
        }
        match (seal, trace) {
            (Some(seal), Some(trace)) if seals => {
                self.seal = Some(self.renewed(seal, learner, trace, average_after)?);
            }
            _ if seals => self.seal()?,
            _ => {}
        }
        self.figures.append(&mut update.figures);
        let committed = update.commits.then(|| std::mem::take(&mut self.figures));
        (self.step, self.phase) = (after.step, after.phase);
        self.spoilt = false;
        Ok(committed)
    }

    /// `seal` after an update of `learner` that has left `trace` and, of the average's state, `average`: what that has
    /// not touched is to be as it was.
    fn renewed(
        &self,
        mut seal: Vec<NetworkSeal>,
        learner: usize,
        trace: Trace,
        average: Checksums,
    ) -> Result<Vec<NetworkSeal>, TrainError> {
        for (network, vars) in seal.iter_mut().zip(&self.vars) {
            let buffers = vars.iter().filter(|(_, var)| var.role != Role::Parameter);
            network.vars.extend(checksums(buffers.map(|(name, var)| (name, &var.tensor)))?);
        }
        let own = &mut seal[learner];
        own.vars.extend(trace.parameters_after);
        own.state.extend(trace.state_after);
        own.state.extend(average);
        Ok(seal)
    }

    /// Exchanges the weights with their averages, where the job keeps some; a second exchange undoes the first.
    ///
    /// After an error the replica is of no use any more.
    pub(crate) fn exchange_averages(&mut self) -> Result<(), TrainError> {
        self.spoilt = true;
        for (optimizer, vars) in self.optimizers.iter_mut().zip(&self.vars) {
            optimizer.exchange_averages(vars)?;
        }
        self.spoilt = false;
        Ok(())
    }

    /// Weights and buffers of all networks: the tensors themselves, not copies.
    pub(crate) fn weight_tensors(&self) -> impl Iterator<Item = (String, Tensor)> {
        self.vars.iter().zip(&self.prefixes).flat_map(|(vars, prefix)| {
            vars.iter().map(move |(name, var)| (format!("{prefix}{name}"), var.tensor.shallow_clone()))
        })
    }

    /// Every optimizer's state, under the network's name, and the update counters.
    pub(crate) fn optimizer_tensors(&self, plan: &TaskPlan) -> Result<Vec<(String, Tensor)>, TrainError> {
        let mut tensors = Vec::new();
        for ((network, optimizer), updates) in plan.networks.iter().zip(&self.optimizers).zip(&self.updates) {
            let state = optimizer.state();
            tensors
                .extend(state.into_iter().map(|(name, tensor)| (format!("{}/{name}", network.name), tensor)));
            let updates = Tensor::f_from_slice(&[*updates as i64])?;
            tensors.push((format!("{}/updates", network.name), updates));
        }
        Ok(tensors)
    }

    /// Copies of weights and buffers of all networks.
    #[cfg(test)]
    pub(crate) fn weights(&self) -> Result<RawTensors, TrainError> {
        self.weight_tensors().map(|(name, tensor)| Ok((name, RawTensor::copy_from(&tensor)?))).collect()
    }

    /// Copies of every optimizer's state, and the update counters.
    #[cfg(test)]
    pub(crate) fn optimizer_state(&self, plan: &TaskPlan) -> Result<RawTensors, TrainError> {
        let tensors = self.optimizer_tensors(plan)?.into_iter();
        tensors.map(|(name, tensor)| Ok((name, RawTensor::copy_from(&tensor)?))).collect()
    }

    /// Takes over a stored state: all of it, or an error that names what does not fit.
    pub(crate) fn restore(
        &mut self,
        plan: &TaskPlan,
        position: Position,
        weights: &BTreeMap<String, Tensor>,
        optimizer: &BTreeMap<String, Tensor>,
    ) -> Result<(), TrainError> {
        let part = |all: &BTreeMap<String, Tensor>, prefix: &str| -> BTreeMap<String, Tensor> {
            let own =
                all.iter().filter_map(|(n, t)| Some((n.strip_prefix(prefix)?.to_owned(), t.shallow_clone())));
            own.collect()
        };
        (self.spoilt, self.seal, self.changed) = (true, None, false);
        for (i, network) in plan.networks.iter().enumerate() {
            self.vars[i].load(&part(weights, &self.prefixes[i]))?;
            let mut state = part(optimizer, &format!("{}/", network.name));
            let Some(updates) = state.remove("updates") else {
                return Err(TrainError::Fatal(format!(
                    "the state has no update counter of `{}`",
                    network.name
                )));
            };
            self.updates[i] = u64::try_from(updates.f_int64_value(&[0])?).unwrap_or(0);
            self.optimizers[i].load_state(&state)?;
        }
        (self.step, self.phase) = (position.step, position.phase);
        self.figures.clear();
        self.samples = StepAudit::default();
        self.spoilt = false;
        Ok(())
    }

    /// Takes over what the phases of the next step that have been applied came to.
    pub(crate) fn set_figures(&mut self, figures: BTreeMap<String, f64>) {
        self.figures = figures;
    }

    /// What the shards were given in the phases of the next step that have been applied.
    pub(crate) fn samples(&self) -> &StepAudit {
        &self.samples
    }

    /// Takes that over.
    pub(crate) fn set_samples(&mut self, samples: StepAudit) {
        self.samples = samples;
    }

    /// Notes what the shards were given in the phase that is applied next; a minibatch counts in the first phase of the
    /// step that sees it.
    pub(crate) fn note_samples(&mut self, shards: Vec<ShardSamples>, first_of_minibatch: bool) {
        self.samples.add_phase(shards, first_of_minibatch);
    }

    /// Hands over what the shards were given in the step that has just been committed.
    pub(crate) fn take_samples(&mut self) -> Vec<ShardSamples> {
        std::mem::take(&mut self.samples).into_shards()
    }

    /// BLAKE3 of all weights and buffers in name order.
    pub(crate) fn weights_digest(&self) -> Result<String, TrainError> {
        digest(self.weight_tensors().collect())
    }

    /// Changes the lowest bit of one weight, as bad memory does.
    pub(crate) fn flip_bit(&self) -> Result<(), TrainError> {
        let Some((_, var)) = self.vars.first().and_then(|vars| vars.parameters().next()) else {
            return Ok(());
        };
        flip_bit(&var.tensor, 0, 1)
    }
}

/// Changes these bits of that byte of a tensor's memory.
fn flip_bit(tensor: &Tensor, byte: usize, bits: u8) -> Result<(), TrainError> {
    let mut raw = RawTensor::copy_from(tensor)?;
    if let Some(byte) = raw.bytes.get_mut(byte) {
        *byte ^= bits;
    }
    Ok(tch::no_grad(|| tensor.f_detach()?.f_copy_(&raw.to_tensor()?).map_err(NnError::from))?)
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
