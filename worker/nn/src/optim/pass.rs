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
pub(super) trait Elementwise<T, const M: usize>: Copy + Send + Sync {
    /// Changes `changed` by `read`, which is as long as each of those.
    fn apply(self, changed: [&mut [T]; M], read: &[T]);
}

/// Tensors that a rule changes and one that it reads, all of one length.
pub(super) struct Work<'a, T, R, const M: usize> {
    pub(super) changed: [&'a mut [T]; M],
    pub(super) read: &'a [T],
    pub(super) rule: R,
}

/// The checksums of a tensor before and after a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) before: Checksum,
    pub(super) after: Checksum,
}

/// Applies each rule of `all`. Returns what has changed of each one's tensors, if it `is_traced`; nothing otherwise.
pub(super) fn pass<T: Real, R: Elementwise<T, M>, const M: usize>(
    all: Vec<Work<'_, T, R, M>>,
    is_traced: bool,
) -> Vec<[Change; M]> {
    let count = all.len();
    let elements = all.iter().map(|work| work.read.len()).sum::<usize>();
    let mut pieces = Vec::new();
    for (owner, work) in all.into_iter().enumerate() {
        let Work { mut changed, mut read, rule } = work;
        while !read.is_empty() {
            let length = read.len().min(PIECE);
            let own = changed.each_mut().map(|rest| {
                let (own, others) = std::mem::take(rest).split_at_mut(length);
                *rest = others;
                own
            });
            let (own_read, others) = read.split_at(length);
            read = others;
            pieces.push((owner, Work { changed: own, read: own_read, rule }));
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

impl<T: Real, R: Elementwise<T, M>, const M: usize> Work<'_, T, R, M> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// b ← 2 b + r, a ← a − b.
    #[derive(Clone, Copy)]
    struct Coupled;

    impl Elementwise<f32, 2> for Coupled {
        fn apply(self, [a, b]: [&mut [f32]; 2], read: &[f32]) {
            for ((a, b), r) in a.iter_mut().zip(b).zip(read) {
                *b = 2.0 * *b + r;
                *a -= *b;
            }
        }
    }

    /// What a pass makes of two tensors of several pieces, and of two small ones, and what it says of them.
    fn passed(threads: usize, is_traced: bool) -> (Vec<[Vec<f32>; 2]>, Vec<[Change; 2]>) {
        let values =
            |count: usize, factor: usize| (0..count).map(|i| (i * factor % 1013) as f32 * 0.37).collect();
        let counts = [2 * PIECE + BLOCK + 21, 5];
        let mut changed: Vec<[Vec<f32>; 2]> = counts.map(|n| [values(n, 7), values(n, 11)]).into();
        let read: Vec<Vec<f32>> = counts.map(|n| values(n, 13)).into();
        let all = changed.iter_mut().zip(&read).map(|(changed, read)| Work {
            changed: changed.each_mut().map(Vec::as_mut_slice),
            read,
            rule: Coupled,
        });
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let changes = pool.install(|| pass(all.collect(), is_traced));
        (changed, changes)
    }

    #[test]
    fn neither_threads_nor_a_trace_change_a_bit() {
        let (wanted, none) = passed(1, false);
        assert!(none.is_empty());
        let (found, traced) = passed(1, true);
        assert_eq!((&found, &traced), (&wanted, &passed(3, true).1));
        assert_eq!(passed(3, false).0, wanted);
        for (changed, changes) in found.iter().zip(&traced) {
            let left = changed.each_ref().map(|values| Checksum::of(bytemuck::cast_slice(values)));
            assert_eq!(changes.map(|change| change.after), left);
        }
    }
}
