//! Gradients as low-rank matrices, with warm start and error feedback.
//!
//! Vogels, Karimireddy, Jaggi, "PowerSGD: practical low-rank gradient compression for distributed optimization", 2019,
//! Algorithms 1 and 2, with logical shards for workers: for each matrix, M + e of every shard is projected on the last
//! step's Q; the sum P of that over all shards, made orthonormal, is what M + e is projected on in turn; P times the
//! sum Q of that is the gradient, and the next step starts from Q. Both sums go through the exact tree, and in between
//! all ranks do the same arithmetic on the same bits.
//!
//! A parameter's first dimension counts as the rows, all others together as the columns. Parameters that would not
//! become smaller, such as biases, are sent as they are.

use super::feedback::Feedback;
use super::low_rank::{expand, orthonormalise, project, project_back};
use super::{Arriving, Shapes, Span, Wire};
use crate::train::error::TrainError;
use lockstep_collectives::{CollectiveError, Group, Numbers, Pending, ReduceOp, Tag};
use lockstep_common::rng::Stream;
use parking_lot::Mutex;
use std::sync::Arc;

pub(crate) struct PowerSgd {
    /// By parameter; `None` for those that are sent as they are.
    matrices: Vec<Option<Matrix>>,
    feedback: Feedback,
    /// All logical shards.
    shards: u32,
}

struct Matrix {
    rows: usize,
    cols: usize,
    /// Of the approximation.
    rank: usize,
    /// The last step's Q, transposed: [rank × cols].
    basis: Mutex<Vec<f32>>,
}

impl PowerSgd {
    pub(crate) fn new(shapes: &Shapes, rank: usize, seed: u64, owned: usize, shards: u32) -> Self {
        let matrices: Vec<_> = shapes
            .parameters
            .iter()
            .map(|(name, shape)| Matrix::new(shapes.network, name, shape, rank, seed))
            .collect();
        let lengths = matrices.iter().map(|m| m.as_ref().map_or(0, |m| m.rows * m.cols)).collect();
        Self { matrices, feedback: Feedback::new(owned, lengths), shards }
    }
}

impl Matrix {
    fn new(network: &str, name: &str, shape: &[i64], rank: usize, seed: u64) -> Option<Self> {
        let rows = usize::try_from(*shape.first()?).ok()?;
        let cols = shape[1..].iter().product::<i64>() as usize;
        let smaller = rank * (rows + cols) < rows * cols;
        smaller.then(|| {
            let mut stream = Stream::new(seed, &format!("powersgd {network}.{name}"), &[]);
            let basis = (0..rank * cols).map(|_| stream.normal() as f32).collect();
            Self { rows, cols, rank, basis: Mutex::new(basis) }
        })
    }
}

impl Wire<f32> for PowerSgd {
    fn send(
        self: Arc<Self>,
        group: &Group,
        tag: Tag,
        spans: Vec<Span>,
        leaves: Vec<Numbers<f32>>,
    ) -> Result<Box<dyn Arriving<f32>>, CollectiveError> {
        let first_len = |span: &Span| match &self.matrices[span.parameter] {
            Some(m) => m.rank * m.rows,
            None => span.range.len(),
        };
        let len = spans.iter().map(first_len).sum();
        let mut sent = Vec::with_capacity(leaves.len());
        for (slot, leaf) in leaves.iter().enumerate() {
            let mut all: Numbers<f32> = group.numbers(len);
            let mut rest = &mut all[..];
            for span in &spans {
                let (own, others) = rest.split_at_mut(first_len(span));
                let gradient = &leaf[span.range.clone()];
                match &self.matrices[span.parameter] {
                    None => own.copy_from_slice(gradient),
                    Some(m) => {
                        let mut kept = self.feedback.of(slot, span.parameter).lock();
                        kept.iter_mut().zip(gradient).for_each(|(e, g)| *e += g);
                        project(&kept, m.cols, &m.basis.lock(), own);
                    }
                }
                rest = others;
            }
            sent.push(all);
        }
        let first = group.all_reduce(tag, sent, ReduceOp::Sum)?;
        Ok(Box::new(Bucket { wire: self, group: group.clone(), tag, spans, first, between: None }))
    }

    fn feedback(&self) -> Option<&Feedback> {
        Some(&self.feedback)
    }

    fn warm_start(&self) -> Vec<Vec<f32>> {
        let basis = |m: &Option<Matrix>| m.as_ref().map(|m| m.basis.lock().clone()).unwrap_or_default();
        self.matrices.iter().map(basis).collect()
    }

    fn set_warm_start(&self, values: Vec<Vec<f32>>) {
        for (matrix, values) in self.matrices.iter().zip(values) {
            if let Some(matrix) = matrix {
                *matrix.basis.lock() = values;
            }
        }
    }
}

struct Bucket {
    wire: Arc<PowerSgd>,
    group: Group,
    tag: Tag,
    spans: Vec<Span>,
    /// The sum of P, and of what is sent as it is, one span after the other.
    first: Pending<Numbers<f32>>,
    between: Option<Between>,
}

/// What there is after the first exchange.
struct Between {
    /// What came, with orthonormal P.
    first: Vec<f32>,
    /// The sum of Q, one matrix after the other.
    second: Pending<Numbers<f32>>,
}

impl Bucket {
    fn begin_second(&self) -> Result<Between, TrainError> {
        let wire = &self.wire;
        let mut first = self.first.wait()?.to_vec();
        let matrices = || self.spans.iter().map(|span| (span, &wire.matrices[span.parameter]));
        let mut rest = &mut first[..];
        for (span, matrix) in matrices() {
            let len = matrix.as_ref().map_or(span.range.len(), |m| m.rank * m.rows);
            let (own, others) = rest.split_at_mut(len);
            if let Some(m) = matrix {
                orthonormalise(own, m.rows);
            }
            rest = others;
        }
        let len = matrices().filter_map(|(_, m)| m.as_ref()).map(|m| m.rank * m.cols).sum();
        let mut sent = Vec::with_capacity(wire.feedback.owned());
        for slot in 0..wire.feedback.owned() {
            let mut all: Numbers<f32> = self.group.numbers(len);
            let (mut first, mut rest) = (&first[..], &mut all[..]);
            for (span, matrix) in matrices() {
                let Some(m) = matrix else {
                    first = &first[span.range.len()..];
                    continue;
                };
                let (p, after) = first.split_at(m.rank * m.rows);
                let (q, others) = rest.split_at_mut(m.rank * m.cols);
                project_back(&wire.feedback.of(slot, span.parameter).lock(), m.cols, p, q);
                (first, rest) = (after, others);
            }
            sent.push(all);
        }
        let second = self.group.all_reduce(self.tag.use_index(1), sent, ReduceOp::Sum)?;
        Ok(Between { first, second })
    }
}

impl Arriving<f32> for Bucket {
    fn advance(&mut self) -> Result<(), TrainError> {
        self.between = Some(self.begin_second()?);
        Ok(())
    }

    fn wait(mut self: Box<Self>, values: &mut [f32]) -> Result<(), TrainError> {
        let Between { first, second } = match self.between.take() {
            Some(between) => between,
            None => self.begin_second()?,
        };
        let second = second.wait()?;
        let (mut first, mut second) = (&first[..], &second[..]);
        for span in &self.spans {
            let target = &mut values[span.range.clone()];
            let Some(m) = &self.wire.matrices[span.parameter] else {
                let (own, after) = first.split_at(span.range.len());
                target.copy_from_slice(own);
                first = after;
                continue;
            };
            let (p, q);
            (p, first) = first.split_at(m.rank * m.rows);
            (q, second) = second.split_at(m.rank * m.cols);
            expand(p, q, m.cols, target);
            for slot in 0..self.wire.feedback.owned() {
                let mut kept = self.wire.feedback.of(slot, span.parameter).lock();
                let share = self.wire.shards as f32;
                kept.iter_mut().zip(&*target).for_each(|(e, sum)| *e -= sum / share);
            }
            let mut basis = m.basis.lock();
            for (basis, q) in basis.chunks_exact_mut(m.cols).zip(q.chunks_exact(m.cols)) {
                // A direction in which nothing was found would find nothing for ever.
                if q.iter().any(|q| *q != 0.0) {
                    basis.copy_from_slice(q);
                }
            }
        }
        Ok(())
    }
}
