//! A phase's update as followers get it: what training applied, to be applied with the same code.

use crate::train::error::TrainError;
use crate::train::replica::{PhaseUpdate, Replica, after};
use lockstep_common::wire::Position;
use lockstep_nn::bytes::RawTensor;
use lockstep_nn::forward::BnRecord;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// All of an update but its gradients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct UpdateHead {
    phase: u16,
    commits: bool,
    network: u16,
    lr: f64,
    figures: BTreeMap<String, f64>,
    statistics: Vec<Record>,
    /// The bytes of all of the network's gradients, in name order.
    pub(crate) bytes: u64,
    /// Where a replica is after it.
    pub(crate) after: Position,
}

/// [`BnRecord`]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    network: u16,
    layer: String,
    momentum: f64,
    count: f64,
    mean: Vec<f64>,
    var_unbiased: Vec<f64>,
}

/// An update on its way.
pub(crate) struct Entry {
    pub(crate) head: UpdateHead,
    pub(crate) gradients: Vec<u8>,
}

impl Entry {
    /// Copies `update`, which takes a replica from `before` on.
    pub(crate) fn of(update: &PhaseUpdate, before: Position) -> Result<Self, TrainError> {
        let mut gradients = Vec::new();
        for (_, gradient) in &update.gradients {
            gradients.extend_from_slice(&RawTensor::copy_from(gradient)?.bytes);
        }
        let record = |r: &BnRecord| Record {
            network: r.network,
            layer: r.layer.clone(),
            momentum: r.momentum,
            count: r.count,
            mean: r.mean.clone(),
            var_unbiased: r.var_unbiased.clone(),
        };
        let head = UpdateHead {
            phase: update.phase,
            commits: update.commits,
            network: update.network as u16,
            lr: update.lr,
            figures: update.figures.clone(),
            statistics: update.statistics.iter().map(record).collect(),
            bytes: gradients.len() as u64,
            after: update.after(before),
        };
        Ok(Self { head, gradients })
    }
}

impl UpdateHead {
    /// What is wrong with it as an update of `replica`; `None` if nothing is. Then so many bytes may be read.
    pub(crate) fn problem(&self, replica: &Replica) -> Option<String> {
        let Some(vars) = replica.vars.get(usize::from(self.network)) else {
            return Some(format!("is of network {}, which the job has not", self.network));
        };
        let size = |(_, var): (&str, &lockstep_nn::vars::Var)| {
            var.tensor.numel() * var.tensor.kind().elt_size_in_bytes()
        };
        let bytes: usize = vars.parameters().map(size).sum();
        let before = replica.position();
        if self.bytes != bytes as u64 {
            Some(format!("has {} bytes of gradients instead of {bytes}", self.bytes))
        } else if self.phase < before.phase || self.after != after(before, self.phase, self.commits) {
            Some(format!("leads to {} from {before}", self.after))
        } else {
            None
        }
    }

    /// The update with these gradients.
    pub(crate) fn with(self, gradients: &[u8], replica: &Replica) -> Result<PhaseUpdate, TrainError> {
        let mut rest = gradients;
        let mut named = Vec::new();
        for (name, var) in replica.vars[usize::from(self.network)].parameters() {
            let shape: Vec<usize> = var.tensor.size().into_iter().map(|d| d as usize).collect();
            let bytes = var.tensor.numel() * var.tensor.f_kind()?.elt_size_in_bytes();
            let (own, after) = rest.split_at_checked(bytes).unwrap_or((rest, &[]));
            rest = after;
            let tensor = RawTensor::tensor_of(RawTensor::dtype_of(&var.tensor)?, &shape, own)?;
            named.push((name.to_owned(), tensor.f_to_device(var.tensor.device())?));
        }
        let record = |r: Record| BnRecord {
            network: r.network,
            layer: r.layer,
            momentum: r.momentum,
            count: r.count,
            mean: r.mean,
            var_unbiased: r.var_unbiased,
        };
        Ok(PhaseUpdate {
            phase: self.phase,
            commits: self.commits,
            network: usize::from(self.network),
            lr: self.lr,
            gradients: named,
            statistics: self.statistics.into_iter().map(record).collect(),
            figures: self.figures,
        })
    }
}
