//! Gradients rounded to `bf16`, leaf by leaf and node by node.

use super::{Arriving, Span, Wire};
use lockstep_collectives::{CollectiveError, Group, Numbers, ReduceOp, Tag};
use std::sync::Arc;

pub(crate) struct Bf16;

impl Wire<f32> for Bf16 {
    fn send(
        self: Arc<Self>,
        group: &Group,
        tag: Tag,
        _spans: Vec<Span>,
        leaves: Vec<Numbers<f32>>,
    ) -> Result<Box<dyn Arriving<f32>>, CollectiveError> {
        Ok(Box::new(group.all_reduce_bf16(tag, leaves, ReduceOp::Sum)?))
    }
}
