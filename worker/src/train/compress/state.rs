//! What the wires keep from step to step, in checkpoints.
//!
//! `<network>/feedback/<parameter>` is [V, elements], one row for each logical shard whoever owned it;
//! `<network>/warm-start/<parameter>` is what all ranks have in common.

use super::Wire;
use crate::train::error::TrainError;
use crate::train::replica::RawTensors;
use lockstep_collectives::{Group, Tag, TagKind};
use lockstep_common::ids::Rank;
use lockstep_nn::bytes::RawTensor;
use std::collections::BTreeMap;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// The rank that writes checkpoints.
const WRITER: Rank = Rank(0);

/// A network's wire and the names of its parameters.
pub(crate) struct NamedWire<T> {
    pub(crate) network: &'static str,
    /// In name order.
    pub(crate) parameters: Vec<String>,
    pub(crate) wire: Arc<dyn Wire<T>>,
}

impl<T> NamedWire<T> {
    fn feedback_name(&self, parameter: usize) -> String {
        format!("{}/feedback/{}", self.network, self.parameters[parameter])
    }

    fn warm_start_name(&self, parameter: usize) -> String {
        format!("{}/warm-start/{}", self.network, self.parameters[parameter])
    }
}

/// Brings what all ranks keep after `step` to rank 0, which writes it; nothing elsewhere, and where the formats lose
/// nothing. Every rank calls this.
pub(crate) fn collect<T>(
    wires: &[NamedWire<T>],
    group: &Group,
    step: u64,
) -> Result<Option<RawTensors>, TrainError> {
    if !is_kept(wires) {
        return Ok(None);
    }
    let mut tensors = RawTensors::new();
    for named in wires {
        for (parameter, values) in named.wire.warm_start().into_iter().enumerate() {
            if !values.is_empty() {
                tensors.insert(
                    named.warm_start_name(parameter),
                    raw(&[values.len()], bytemuck::cast_slice(&values)),
                );
            }
        }
    }
    let placement = group.placement();
    let mut tags = (0..).map(|index| Tag::new(step, 0, TagKind::State).index(index));
    for named in wires {
        let Some(feedback) = named.wire.feedback() else { continue };
        for (parameter, &len) in feedback.lengths().iter().enumerate().filter(|(_, len)| **len > 0) {
            let mut own: Vec<u8> = Vec::with_capacity(feedback.owned() * len * size_of::<f32>());
            for slot in 0..feedback.owned() {
                own.extend_from_slice(bytemuck::cast_slice(&feedback.of(slot, parameter).lock()));
            }
            let Some(tag) = tags.next() else { continue };
            // One parameter after the other, so that no rank holds more than one besides what it keeps.
            let all = group.gather_to(tag, WRITER, own)?.wait()?;
            let mut rows = Vec::with_capacity(placement.shards() as usize * len * size_of::<f32>());
            for (rank, own) in (0..).map(Rank).zip(all.iter()) {
                if own.len() != placement.range(rank).len() * len * size_of::<f32>() {
                    return Err(TrainError::Fatal(format!(
                        "{rank} sent other error feedback for the checkpoint than its shards have"
                    )));
                }
                rows.extend_from_slice(own);
            }
            let shape = [placement.shards() as usize, len];
            tensors.insert(named.feedback_name(parameter), raw(&shape, &rows));
        }
    }
    Ok((group.rank() == WRITER).then_some(tensors))
}

/// Whether a checkpoint of these wires has a file of their own.
pub(crate) fn is_kept<T>(wires: &[NamedWire<T>]) -> bool {
    wires.iter().any(|w| w.wire.feedback().is_some())
}

/// Takes over what [`collect`] gave, for the shards that this rank of `group` owns now.
pub(crate) fn restore<T>(
    wires: &[NamedWire<T>],
    group: &Group,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<(), TrainError> {
    let shards = i64::from(group.placement().shards());
    let first = i64::from(group.placement().range(group.rank()).start);
    for named in wires {
        if let Some(feedback) = named.wire.feedback() {
            for (parameter, &len) in feedback.lengths().iter().enumerate().filter(|(_, len)| **len > 0) {
                let all = find(tensors, &named.feedback_name(parameter), &[shards, len as i64])?;
                for slot in 0..feedback.owned() {
                    let row = all.f_get(first + slot as i64)?;
                    row.f_copy_data(&mut feedback.of(slot, parameter).lock(), len)?;
                }
            }
        }
        let mut values = named.wire.warm_start();
        for (parameter, values) in values.iter_mut().enumerate().filter(|(_, v)| !v.is_empty()) {
            let len = values.len();
            let saved = find(tensors, &named.warm_start_name(parameter), &[len as i64])?;
            saved.f_copy_data(values, len)?;
        }
        named.wire.set_warm_start(values);
    }
    Ok(())
}

fn find<'a>(
    tensors: &'a BTreeMap<String, Tensor>,
    name: &str,
    shape: &[i64],
) -> Result<&'a Tensor, TrainError> {
    match tensors.get(name) {
        Some(tensor) if tensor.size() == shape && tensor.f_kind()? == Kind::Float => Ok(tensor),
        Some(tensor) => Err(TrainError::Fatal(format!(
            "the checkpoint's `{name}` has shape {:?} instead of {shape:?}, or another type than f32",
            tensor.size()
        ))),
        None => Err(TrainError::Fatal(format!("the checkpoint has no `{name}`"))),
    }
}

fn raw(shape: &[usize], bytes: &[u8]) -> RawTensor {
    RawTensor { dtype: "F32", shape: shape.to_vec(), bytes: bytes.to_vec() }
}
