//! Gradients rounded to `bf16`, leaf by leaf and node by node.

use super::{Arriving, Span, Wire};
use crate::train::error::TrainError;
use lockstep_collectives::formats::{bf16, narrow, widen};
use lockstep_collectives::{CollectiveError, Group, Numbers, Pending, ReduceOp, Tag};
use std::sync::Arc;
use tch::Tensor;

pub(crate) struct Bf16;

struct Bucket(Pending<Numbers<bf16>>);

impl Wire<f32> for Bf16 {
    fn send(
        self: Arc<Self>,
        group: &Group,
        tag: Tag,
        _spans: Vec<Span>,
        leaves: Vec<Numbers<f32>>,
    ) -> Result<Box<dyn Arriving>, CollectiveError> {
        let narrowed = leaves.into_iter().map(|leaf| {
            let mut narrowed = group.numbers(leaf.len());
            narrow(&leaf, &mut narrowed);
            narrowed
        });
        let pending = group.all_reduce(tag, narrowed.collect::<Vec<_>>(), ReduceOp::Sum)?;
        Ok(Box::new(Bucket(pending)))
    }
}

impl Arriving for Bucket {
    fn wait(self: Box<Self>) -> Result<Tensor, TrainError> {
        let sum = self.0.wait()?;
        let mut values = vec![0.0; sum.len()];
        widen(&sum, &mut values);
        Ok(Tensor::f_from_slice(&values)?)
    }
}
