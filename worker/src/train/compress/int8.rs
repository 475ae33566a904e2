//! Gradients as blocks of 8-bit integers, with error feedback.
//!
//! Seide et al., "1-bit stochastic gradient descent and its application to data-parallel distributed training of
//! speech DNNs", 2014; Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression schemes", 2019.

use super::feedback::Feedback;
use super::{Arriving, Shapes, Span, Wire};
use crate::train::error::TrainError;
use lockstep_collectives::formats::Block8;
use lockstep_collectives::{CollectiveError, Group, Numbers, Pending, ReduceOp, Tag};
use std::sync::Arc;

pub(crate) struct Int8 {
    feedback: Feedback,
}

struct Bucket {
    spans: Vec<Span>,
    pending: Pending<Numbers<Block8>>,
}

impl Int8 {
    pub(crate) fn new(shapes: &Shapes, owned: usize) -> Self {
        Self { feedback: Feedback::new(owned, shapes.elements()) }
    }
}

/// A parameter begins a block of its own: its neighbours in the bucket change from step to step.
fn blocks(span: &Span) -> usize {
    span.range.len().div_ceil(Block8::LEN)
}

impl Wire<f32> for Int8 {
    fn send(
        self: Arc<Self>,
        group: &Group,
        tag: Tag,
        spans: Vec<Span>,
        leaves: Vec<Numbers<f32>>,
    ) -> Result<Box<dyn Arriving<f32>>, CollectiveError> {
        let len = spans.iter().map(blocks).sum();
        let mut sent = Vec::with_capacity(leaves.len());
        for (slot, leaf) in leaves.iter().enumerate() {
            let mut all: Numbers<Block8> = group.numbers(len);
            let mut rest = &mut all[..];
            for span in &spans {
                let (own, others) = rest.split_at_mut(blocks(span));
                let mut residual = self.feedback.of(slot, span.parameter).lock();
                Block8::quantise(&leaf[span.range.clone()], &mut residual, own);
                rest = others;
            }
            sent.push(all);
        }
        let pending = group.all_reduce(tag, sent, ReduceOp::Sum)?;
        Ok(Box::new(Bucket { spans, pending }))
    }

    fn feedback(&self) -> Option<&Feedback> {
        Some(&self.feedback)
    }
}

impl Arriving<f32> for Bucket {
    fn wait(self: Box<Self>, values: &mut [f32]) -> Result<(), TrainError> {
        let sum = self.pending.wait()?;
        let mut rest = &sum[..];
        for span in &self.spans {
            let (own, others) = rest.split_at(blocks(span));
            Block8::dequantise(own, &mut values[span.range.clone()]);
            rest = others;
        }
        Ok(())
    }
}
