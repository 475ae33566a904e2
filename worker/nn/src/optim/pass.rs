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

/// What happens to each element of a tensor and of its `N` tensors of state, by that of another one.
pub(super) trait Elementwise<T, const N: usize>: Copy + Send + Sync {
    /// Changes `changed` and `state` by `read`. All are of one length.
    fn apply(self, changed: &mut [T], state: [&mut [T]; N], read: &[T]);
}

/// Tensors that a rule changes and one that it reads, all of one length.
pub(super) struct Work<'a, T, R, const N: usize> {
    pub(super) changed: &'a mut [T],
    pub(super) state: [&'a mut [T]; N],
    pub(super) read: &'a [T],
    pub(super) rule: R,
}

/// The checksums of a tensor before and after a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) before: Checksum,
    pub(super) after: Checksum,
}

/// Those of a [`Work`]'s tensor and of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Changes<const N: usize> {
    pub(super) changed: Change,
    pub(super) state: [Change; N],
}

/// Applies each rule of `all`. Returns what has changed of each one's tensors, if it `is_traced`; nothing otherwise.
pub(super) fn pass<T: Real, R: Elementwise<T, N>, const N: usize>(
    all: Vec<Work<'_, T, R, N>>,
    is_traced: bool,
) -> Vec<Changes<N>> {
    let count = all.len();
    let elements = all.iter().map(|work| work.read.len()).sum::<usize>();
    let mut pieces = Vec::new();
    for (owner, work) in all.into_iter().enumerate() {
        let Work { mut changed, mut state, mut read, rule } = work;
        while !read.is_empty() {
            let (own, others) = read.split_at(read.len().min(PIECE));
            read = others;
            let piece = Work {
                changed: first(&mut changed, own.len()),
                state: state.each_mut().map(|part| first(part, own.len())),
                read: own,
                rule,
            };
            pieces.push((owner, piece));
        }
    }
    let changes: Vec<Changes<N>> = match elements < FEW {
        true => pieces.iter_mut().map(|(_, piece)| piece.apply(is_traced)).collect(),
        false => pieces.par_iter_mut().map(|(_, piece)| piece.apply(is_traced)).collect(),
    };
    if !is_traced {
        return Vec::new();
    }
    let mut whole = vec![Changes::default(); count];
    for ((owner, _), changes) in pieces.iter().zip(&changes) {
        let Changes { changed, state } = &mut whole[*owner];
        changed.add(&changes.changed);
        state.iter_mut().zip(&changes.state).for_each(|(whole, change)| whole.add(change));
    }
    whole
}

/// The first `length` elements of `rest`, which keeps the others.
fn first<'a, T>(rest: &mut &'a mut [T], length: usize) -> &'a mut [T] {
    let (first, others) = std::mem::take(rest).split_at_mut(length);
    *rest = others;
    first
}

impl<T: Real, R: Elementwise<T, N>, const N: usize> Work<'_, T, R, N> {
    /// Applies the rule block by block.
    fn apply(&mut self, is_traced: bool) -> Changes<N> {
        let checksum = |values: &[T]| {
            if is_traced { Checksum::of(bytemuck::cast_slice(values)) } else { Checksum::default() }
        };
        let mut changes = Changes::default();
        for (index, read) in self.read.chunks(BLOCK).enumerate() {
            let own = index * BLOCK..index * BLOCK + read.len();
            let changed = &mut self.changed[own.clone()];
            let mut state = self.state.each_mut().map(|part| &mut part[own.clone()]);
            let before = (checksum(changed), state.each_ref().map(|part| checksum(part)));
            self.rule.apply(changed, state.each_mut().map(|part| &mut **part), read);
            changes.changed.add(&Change { before: before.0, after: checksum(changed) });
            for (change, (before, part)) in changes.state.iter_mut().zip(before.1.into_iter().zip(&state)) {
                change.add(&Change { before, after: checksum(part) });
            }
        }
        changes
    }
}

impl<const N: usize> Default for Changes<N> {
    fn default() -> Self {
        Self { changed: Change::default(), state: [Change::default(); N] }
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

    impl Elementwise<f32, 1> for Coupled {
        fn apply(self, a: &mut [f32], [b]: [&mut [f32]; 1], read: &[f32]) {
            for ((a, b), r) in a.iter_mut().zip(b).zip(read) {
                *b = 2.0 * *b + r;
                *a -= *b;
            }
        }
    }

    /// What a pass makes of a tensor of several pieces with its state, and of a small one, and what it says of them.
    fn passed(threads: usize, is_traced: bool) -> (Vec<[Vec<f32>; 2]>, Vec<Changes<1>>) {
        let values =
            |count: usize, factor: usize| (0..count).map(|i| (i * factor % 1013) as f32 * 0.37).collect();
        let counts = [2 * PIECE + BLOCK + 21, 5];
        let mut tensors: Vec<[Vec<f32>; 2]> = counts.map(|n| [values(n, 7), values(n, 11)]).into();
        let read: Vec<Vec<f32>> = counts.map(|n| values(n, 13)).into();
        let all = tensors.iter_mut().zip(&read).map(|([changed, state], read)| Work {
            changed,
            state: [state.as_mut_slice()],
            read,
            rule: Coupled,
        });
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let changes = pool.install(|| pass(all.collect(), is_traced));
        (tensors, changes)
    }

    #[test]
    fn neither_threads_nor_a_trace_change_a_bit() {
        let (wanted, none) = passed(1, false);
        assert!(none.is_empty());
        let (found, traced) = passed(1, true);
        assert_eq!((&found, &traced), (&wanted, &passed(3, true).1));
        assert_eq!(passed(3, false).0, wanted);
        for (tensors, Changes { changed, state: [state] }) in found.iter().zip(&traced) {
            let left = tensors.each_ref().map(|values| Checksum::of(bytemuck::cast_slice(values)));
            assert_eq!([changed.after, state.after], left);
        }
    }
}
