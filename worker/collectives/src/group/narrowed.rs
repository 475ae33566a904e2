//! Reductions of 32-bit numbers that travel, and are added, as `bf16`.

use super::{Group, SMALL_BYTES, fail_slot};
use crate::chunked::{Chunked, Task};
use crate::ends::{Converted, Finish, Make, Mine};
use crate::error::CollectiveError;
use crate::formats::{bf16, narrow, widen};
use crate::gather::Fail;
use crate::numbers::Numbers;
use crate::op::ReduceOp;
use crate::pending::{Pending, Slot};
use crate::tag::Tag;
use std::sync::Arc;

impl Group {
    /// [`all_reduce`](Self::all_reduce) of `leaves` that are rounded to `bf16` first. The result has the bits of that
    /// reduction, as `f32`.
    ///
    /// Over a network, numbers are rounded as they are sent and widened as they arrive, which hides most of the cost.
    pub fn all_reduce_bf16<L: Into<Numbers<f32>>>(
        &self,
        tag: Tag,
        leaves: Vec<L>,
        op: ReduceOp,
    ) -> Result<Pending<Numbers<f32>>, CollectiveError> {
        let leaves: Vec<Numbers<f32>> = leaves.into_iter().map(Into::into).collect();
        self.check_leaves(tag, &leaves)?;
        let len = leaves[0].len();
        self.check_op::<bf16>(tag, len, op)?;
        let slot = Slot::new();
        let result = slot.clone();
        let finish: Finish<f32> = Box::new(move |sum| Some(Box::new(move || result.set(Ok(sum)))));
        // Ranks that share memory add in place, which needs the whole vectors.
        let in_pieces = self.shape.mates.is_none() && self.world_size() > 1;
        if in_pieces && len * size_of::<bf16>() > SMALL_BYTES {
            self.reduce_pieces(tag, leaves, op, finish, fail_slot(&slot))?;
        } else {
            self.reduce_whole(tag, &leaves, op, finish, fail_slot(&slot))?;
        }
        Ok(Pending::new(slot, self.engine.clone(), tag))
    }

    fn reduce_pieces(
        &self,
        tag: Tag,
        leaves: Vec<Numbers<f32>>,
        op: ReduceOp,
        finish: Finish<f32>,
        fail: Fail,
    ) -> Result<(), CollectiveError> {
        let len = leaves[0].len();
        let task = Task {
            tag,
            signature: op.signature::<bf16>(),
            op,
            leaves: self.shape.placement.shards(),
            spread: true,
        };
        let mine = Mine::Made { nodes: self.plan().kept.len(), make: self.rounded_nodes(leaves, op) };
        let sink = Box::new(Converted { output: self.engine.numbers(len), convert: widen, finish });
        let everyone = self.shape.everyone.clone();
        self.engine.start(tag, Arc::new(Chunked::between(task, everyone, len, mine, sink, fail)))
    }

    /// What this rank contributes, made of its leaves.
    fn rounded_nodes(&self, leaves: Vec<Numbers<f32>>, op: ReduceOp) -> Make<bf16> {
        let (plan, pool) = (self.shape.plan.clone(), self.engine.pool().clone());
        Box::new(move |range, out| {
            if let [leaf] = &leaves[..] {
                return narrow(&leaf[range], out);
            }
            let rounded = leaves.iter().map(|leaf| {
                let mut rounded = Numbers::pooled(pool.take(range.len() * size_of::<bf16>()));
                narrow(&leaf[range.clone()], &mut rounded);
                rounded
            });
            let mut rounded: Vec<_> = rounded.collect();
            op.merge_in_place(&mut rounded, &plan.local);
            for (node, out) in plan.kept.iter().zip(out.chunks_exact_mut(range.len())) {
                out.copy_from_slice(&rounded[*node]);
            }
        })
    }

    fn reduce_whole(
        &self,
        tag: Tag,
        leaves: &[Numbers<f32>],
        op: ReduceOp,
        finish: Finish<f32>,
        fail: Fail,
    ) -> Result<(), CollectiveError> {
        let rounded = leaves.iter().map(|leaf| {
            let mut rounded = self.numbers(leaf.len());
            narrow(leaf, &mut rounded);
            rounded
        });
        let nodes = self.nodes::<bf16, _>(tag, rounded.collect(), op)?;
        let pool = self.engine.pool().clone();
        let widened: Finish<bf16> = Box::new(move |sum| {
            let mut wide = Numbers::pooled(pool.take(sum.len() * size_of::<f32>()));
            widen(&sum, &mut wide);
            finish(wide)
        });
        self.reduce(tag, nodes, op, true, widened, fail)
    }
}
