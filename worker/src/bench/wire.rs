//! The forms in which the benchmark's numbers travel: those of a job's `[collective] wire` that fit any vector.

use lockstep_collectives::formats::Block8;
use lockstep_collectives::{CollectiveError, Group, Numbers, ReduceOp, Tag};
use lockstep_common::job::WireFormat;
use std::sync::Arc;

/// One form, with what it keeps back.
pub(super) struct Wire {
    form: WireFormat,
    /// By own shard: what `int8` has lost so far.
    residuals: Vec<Vec<f32>>,
}

impl Wire {
    /// Refuses PowerSGD, which approximates matrices.
    pub(super) fn check(form: WireFormat) -> Result<WireFormat, String> {
        match form {
            WireFormat::PowerSgd => Err("`powersgd` is for matrices: measure a job with it".to_owned()),
            other => Ok(other),
        }
    }

    pub(super) fn new(form: WireFormat) -> Self {
        Self { form, residuals: Vec::new() }
    }

    /// All-reduces `leaves`, and waits: from f32 to f32, so that compressing counts.
    pub(super) fn all_reduce(
        &mut self,
        group: &Group,
        tag: Tag,
        leaves: Vec<Numbers<f32>>,
    ) -> Result<Arc<Numbers<f32>>, CollectiveError> {
        let len = leaves.first().map_or(0, |leaf| leaf.len());
        match self.form {
            WireFormat::F32 | WireFormat::PowerSgd => group.all_reduce(tag, leaves, ReduceOp::Sum)?.wait(),
            WireFormat::Bf16 => group.all_reduce_bf16(tag, leaves, ReduceOp::Sum)?.wait(),
            WireFormat::Int8 => {
                self.residuals.resize_with(leaves.len(), Vec::new);
                let blocks = leaves.iter().zip(&mut self.residuals).map(|(leaf, residual)| {
                    if residual.len() != len {
                        *residual = vec![0.0; len];
                    }
                    let mut blocks: Numbers<Block8> = group.numbers(len.div_ceil(Block8::LEN));
                    Block8::quantise(leaf, residual, &mut blocks);
                    blocks
                });
                let blocks: Vec<_> = blocks.collect();
                let sum = group.all_reduce(tag, blocks, ReduceOp::Sum)?.wait()?;
                let mut values = group.numbers(len);
                Block8::dequantise(&sum, &mut values);
                Ok(Arc::new(values))
            }
        }
    }

    /// How far a sum over `shards` leaves of at most `largest` in magnitude may be from the exact one.
    pub(super) fn tolerance(&self, shards: u32, largest: f32) -> f32 {
        // Every leaf is rounded, then every node, up to the root: so many times an error of the sum of all magnitudes,
        // by half a unit of the last of bf16's 8 bits, or by one of int8's 127 parts.
        let roundings = 1 + shards.next_power_of_two().ilog2();
        let error = match self.form {
            WireFormat::F32 | WireFormat::PowerSgd => 0.0,
            WireFormat::Bf16 => 1.0 / 256.0,
            // A tenth more, because what is rounded may already be too large.
            WireFormat::Int8 => 1.1 / 127.0,
        };
        largest * shards as f32 * roundings as f32 * error
    }
}
