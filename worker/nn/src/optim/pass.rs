//! One pass over memory by all of rayon's threads, instead of one for each operation: a rule changes some tensors element by
//! element and reads another one, and the checksums of what was found and of what is left are taken on the way.
//!
//! Results do not depend on the number of threads.

use crate::checksum::{Checksum, ROW};
use rayon::prelude::*;
use std::ops::{Add, Div, Mul, Sub};

/// Elements that one thread takes at a time.
pub(super) const PIECE: usize = 1 << 16;
/// Elements that stay in the caches nearest to the core while several loops go over them.
pub(super) const BLOCK: usize = 1 << 11;
/// With fewer elements in all, other threads are not worth waking.
pub(super) const FEW: usize = 1 << 17;

// Pieces and blocks but for the last are whole rows of a checksum.
const _: () = assert!((BLOCK * size_of::<f32>()).is_multiple_of(ROW) && PIECE.is_multiple_of(BLOCK));

/// An element of a tensor.
pub(super) trait Real:
    tch::kind::Element
    + bytemuck::Pod
    + Send
    + Sync
    + Add<Output = Self>
    + Div<Output = Self>
    + Mul<Output = Self>
    + Sub<Output = Self>
{
    /// The nearest one.
    fn from_f64(value: f64) -> Self;
    /// The same number, exactly.
    fn to_f64(self) -> f64;
    /// The square root, correctly rounded.
    fn root(self) -> Self;
}

impl Real for f32 {
    fn from_f64(value: f64) -> Self {
        value as Self
    }

    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    fn root(self) -> Self {
        self.sqrt()
    }
}

impl Real for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }

    fn to_f64(self) -> f64 {
        self
    }

    fn root(self) -> Self {
        self.sqrt()
    }
}

/// What happens to each element of `M` tensors, by that of another one.
pub(super) trait Rule<T, const M: usize>: Copy + Send + Sync {
    /// Changes `changed` by `read`, which is as long as each of those.
    fn apply(self, changed: [&mut [T]; M], read: &[T]);
}

/// Tensors that a rule changes and one that it reads, all of one length.
pub(super) struct Row<'a, T, R, const M: usize> {
    pub(super) changed: [&'a mut [T]; M],
    pub(super) read: &'a [T],
    pub(super) rule: R,
}

/// The checksums of a tensor before and after a pass.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Change {
    pub(super) before: Checksum,
    pub(super) after: Checksum,
}

/// Applies each row's rule. Returns what has changed of each row's tensors, if it `is_traced`; nothing otherwise.
pub(super) fn pass<T: Real, R: Rule<T, M>, const M: usize>(
    rows: Vec<Row<'_, T, R, M>>,
    is_traced: bool,
) -> Vec<[Change; M]> {
    let count = rows.len();
    let elements = rows.iter().map(|row| row.read.len()).sum::<usize>();
    let mut pieces = Vec::new();
    for (owner, row) in rows.into_iter().enumerate() {
        let Row { mut changed, mut read, rule } = row;
        while !read.is_empty() {
            let length = read.len().min(PIECE);
            let own = changed.each_mut().map(|rest| {
                let (own, others) = std::mem::take(rest).split_at_mut(length);
                *rest = others;
                own
            });
            let (own_read, others) = read.split_at(length);
            read = others;
            pieces.push((owner, Row { changed: own, read: own_read, rule }));
        }
    }
    let changes: Vec<[Change; M]> = match elements < FEW {
        true => pieces.iter_mut().map(|(_, piece)| piece.apply(is_traced)).collect(),
        false => pieces.par_iter_mut().map(|(_, piece)| piece.apply(is_traced)).collect(),
    };
    if !is_traced {
        return Vec::new();
    }
    let mut whole = vec![[Change::default(); M]; count];
    for ((owner, _), changes) in pieces.iter().zip(&changes) {
        whole[*owner].iter_mut().zip(changes).for_each(|(whole, change)| whole.add(change));
    }
    whole
}

impl<T: Real, R: Rule<T, M>, const M: usize> Row<'_, T, R, M> {
    /// Applies the rule block by block.
    fn apply(&mut self, is_traced: bool) -> [Change; M] {
        let mut changes = [Change::default(); M];
        for (index, read) in self.read.chunks(BLOCK).enumerate() {
            let own = index * BLOCK..index * BLOCK + read.len();
            let checksums = |changed: &[&mut [T]; M]| {
                changed.each_ref().map(|tensor| Checksum::of(bytemuck::cast_slice(&tensor[own.clone()])))
            };
            let before = is_traced.then(|| checksums(&self.changed));
            self.rule.apply(self.changed.each_mut().map(|tensor| &mut tensor[own.clone()]), read);
            if let Some(before) = before {
                let after = checksums(&self.changed);
                for (change, (before, after)) in changes.iter_mut().zip(before.into_iter().zip(after)) {
                    change.add(&Change { before, after });
                }
            }
        }
        changes
    }
}

impl Change {
    fn add(&mut self, next: &Self) {
        self.before = self.before.then(&next.before);
        self.after = self.after.then(&next.after);
    }
}

/// Sums that run side by side: as many as hide the latency of an addition.
const LANES: usize = 16;

/// The sum of the squares of `values`, in f64, in an order that depends on their number alone.
pub(super) fn sum_of_squares<T: Real>(values: &[T]) -> f64 {
    let of_piece = |piece: &[T]| {
        let mut sums = [0.0; LANES];
        let (rows, rest) = piece.as_chunks::<LANES>();
        for row in rows.iter().map(<[T; LANES]>::as_slice).chain([rest]) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value.to_f64() * value.to_f64();
            }
        }
        sums.into_iter().sum::<f64>()
    };
    let pieces: Vec<f64> = match values.len() < FEW {
        true => values.chunks(PIECE).map(of_piece).collect(),
        false => values.par_chunks(PIECE).map(of_piece).collect(),
    };
    pieces.into_iter().sum()
}
