//! Where the numbers of a reduction come from on this rank, and where its result goes.
//!
//! Numbers that travel in another form than the caller's are converted piece by piece, next to the step that sends or
//! receives them: a piece is still in a core's cache then, and no vector of the other form is ever written to memory.

use crate::buffer::{Buffer, Pool, Shared};
use crate::engine::Publish;
use crate::numbers::Numbers;
use bytemuck::Pod;
use bytes::Bytes;
use std::ops::Range;
use std::sync::Arc;

/// What is done with a result: all of it, or this rank's chunk.
pub(crate) type Finish<T> = Box<dyn FnOnce(Numbers<T>) -> Option<Publish> + Send>;

/// Writes the elements in a range of a rank's nodes, one node after the other.
pub(crate) type Make<T> = Box<dyn Fn(Range<usize>, &mut [T]) + Send + Sync>;

/// A rank's own nodes.
pub(crate) enum Mine<T> {
    /// They lie in memory.
    There(Vec<Arc<Numbers<T>>>),
    /// So many, made when they are wanted: every element once.
    Made { nodes: usize, make: Make<T> },
}

/// The elements of a rank's nodes in one range.
pub(crate) enum Part<'a, T> {
    There(&'a [Arc<Numbers<T>>], Range<usize>),
    Made(Buffer),
}

impl<T: Pod + Send + Sync> Mine<T> {
    /// The elements in `range`, to be sent: one node after the other.
    pub(crate) fn bytes(&self, pool: &Pool, range: Range<usize>) -> Vec<Bytes> {
        let size = size_of::<T>();
        match self {
            Self::There(nodes) => {
                let whole = |node: &Arc<Numbers<T>>| Bytes::from_owner(Shared(node.clone()));
                nodes.iter().map(|node| whole(node).slice(range.start * size..range.end * size)).collect()
            }
            Self::Made { .. } => match self.part(pool, range) {
                Part::Made(buffer) => vec![buffer.freeze()],
                Part::There(..) => Vec::new(),
            },
        }
    }

    /// The elements in `range`, to be read.
    pub(crate) fn part(&self, pool: &Pool, range: Range<usize>) -> Part<'_, T> {
        match self {
            Self::There(nodes) => Part::There(nodes, range),
            Self::Made { nodes, make } => {
                let mut buffer = pool.take(nodes * range.len() * size_of::<T>());
                make(range, buffer.elements_mut());
                Part::Made(buffer)
            }
        }
    }
}

impl<T: Pod> Part<'_, T> {
    /// `len` elements of one of the nodes.
    pub(crate) fn node(&self, index: usize, len: usize) -> &[T] {
        match self {
            Self::There(nodes, range) => &nodes[index][range.clone()],
            Self::Made(buffer) => &buffer.elements()[index * len..][..len],
        }
    }
}

/// Takes in a result piece by piece.
pub(crate) trait Sink<T>: Send {
    /// `piece` begins at element `start` of the whole vector.
    fn write(&mut self, start: usize, piece: &[T]);

    /// Every piece has been written.
    fn finish(self: Box<Self>) -> Option<Publish>;
}

/// A result in the caller's form.
pub(crate) struct Whole<T> {
    pub(crate) output: Numbers<T>,
    /// Where the output begins in the whole vector.
    pub(crate) start: usize,
    pub(crate) finish: Finish<T>,
}

impl<T: Pod + Send + Sync> Sink<T> for Whole<T> {
    fn write(&mut self, start: usize, piece: &[T]) {
        self.output[start - self.start..][..piece.len()].copy_from_slice(piece);
    }

    fn finish(self: Box<Self>) -> Option<Publish> {
        (self.finish)(self.output)
    }
}

/// A result that is converted to the caller's form.
pub(crate) struct Converted<T, O> {
    pub(crate) output: Numbers<O>,
    pub(crate) convert: fn(&[T], &mut [O]),
    pub(crate) finish: Finish<O>,
}

impl<T: Pod, O: Pod + Send + Sync> Sink<T> for Converted<T, O> {
    fn write(&mut self, start: usize, piece: &[T]) {
        (self.convert)(piece, &mut self.output[start..][..piece.len()]);
    }

    fn finish(self: Box<Self>) -> Option<Publish> {
        (self.finish)(self.output)
    }
}
