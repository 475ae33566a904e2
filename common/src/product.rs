//! Products of matrices that have the same bits on every machine and with every number of threads.
//!
//! Each element of a product is one sum, added up term by term in the order of the rows, in its own number type: neither
//! blocks, threads nor the width of vectors change that order, as what lies side by side in a vector are different elements.
//! Nothing is fused: Rust rounds each product and each sum by itself. A library's product chooses its order, and whether it
//! fuses, by the processor that it finds.

use rayon::prelude::*;
use std::ops::{Add, Mul};

/// A number type of matrices.
pub trait Real: Copy + Default + Send + Sync + Add<Output = Self> + Mul<Output = Self> {}

impl Real for f32 {}
impl Real for f64 {}

/// Rows of a product that one thread computes at a time, in strips: each of the other matrix's strips is read from afar once
/// for all of them.
const BAND_STRIPS: usize = 8;

/// A matrix in strips of `N` columns, each with its rows one after the other. The last strip is filled up with zeros.
#[derive(Clone, Debug)]
pub struct Strips<T, const N: usize> {
    rows: usize,
    columns: usize,
    values: Vec<[T; N]>,
}

impl<T: Real, const N: usize> Strips<T, N> {
    /// Packs a matrix of `columns` columns, given row by row.
    pub fn pack(matrix: &[T], columns: usize) -> Self {
        let rows = matrix.len() / columns.max(1);
        let mut values = vec![[T::default(); N]; rows * columns.div_ceil(N)];
        for (strip, values) in values.chunks_exact_mut(rows.max(1)).enumerate() {
            let first = strip * N;
            let width = N.min(columns - first);
            for (packed, row) in values.iter_mut().zip(matrix.chunks_exact(columns)) {
                packed[..width].copy_from_slice(&row[first..first + width]);
            }
        }
        Self { rows, columns, values }
    }

    /// Packs the transposed of a matrix of `columns` columns, given row by row: its rows become the columns.
    pub fn pack_transposed(matrix: &[T], columns: usize) -> Self {
        let count = matrix.len() / columns.max(1);
        let mut values = vec![[T::default(); N]; columns * count.div_ceil(N)];
        for (index, row) in matrix.chunks_exact(columns.max(1)).enumerate() {
            for (packed, value) in values[index / N * columns..].iter_mut().zip(row) {
                packed[index % N] = *value;
            }
        }
        Self { rows: columns, columns: count, values }
    }

    fn count(&self) -> usize {
        self.columns.div_ceil(N)
    }

    fn strip(&self, index: usize) -> &[[T; N]] {
        &self.values[index * self.rows..(index + 1) * self.rows]
    }
}

/// Adds AᵀB to `sums`, which has a row for each column of `a` and a column for each of `b`. Both have as many rows; each
/// sum goes on from what `sums` holds.
pub fn add_product<T: Real, const M: usize, const N: usize>(
    a: &Strips<T, M>,
    b: &Strips<T, N>,
    sums: &mut [T],
) {
    add_band(a, 0, b, 0, sums);
}

/// The same on all threads.
pub fn add_parallel_product<T: Real, const N: usize>(a: &Strips<T, N>, b: &Strips<T, N>, sums: &mut [T]) {
    each_band(b, sums, |first, sums| add_band(a, first, b, 0, sums));
}

/// The same of the upper triangle alone. What is below it is of no use.
pub fn add_upper_product<T: Real, const N: usize>(a: &Strips<T, N>, b: &Strips<T, N>, sums: &mut [T]) {
    each_band(b, sums, |first, sums| add_band(a, first, b, first, sums));
}

/// Copies the upper triangle of a square matrix of `side` rows into the lower one.
pub fn mirror<T: Copy>(matrix: &mut [T], side: usize) {
    for row in 1..side {
        for column in 0..row {
            matrix[row * side + column] = matrix[column * side + row];
        }
    }
}

/// Gives each band of rows to some thread, with the strip of its first row.
fn each_band<T: Real, const N: usize>(
    b: &Strips<T, N>,
    sums: &mut [T],
    add: impl Fn(usize, &mut [T]) + Sync,
) {
    let bands = sums.par_chunks_mut(BAND_STRIPS * N * b.columns.max(1));
    bands.enumerate().for_each(|(band, sums)| add(band * BAND_STRIPS, sums));
}

/// The part of the product in the rows of `sums`, of which the first is that of strip `first_a`, and in the columns from
/// strip `first_b` on.
fn add_band<T: Real, const M: usize, const N: usize>(
    a: &Strips<T, M>,
    first_a: usize,
    b: &Strips<T, N>,
    first_b: usize,
    sums: &mut [T],
) {
    for strip in first_b..b.count() {
        let first = strip * N;
        let width = N.min(b.columns - first);
        for (of_a, rows) in (first_a..a.count()).zip(sums.chunks_mut(M * b.columns)) {
            let mut tile = [[T::default(); N]; M];
            for (tile, row) in tile.iter_mut().zip(rows.chunks_exact(b.columns)) {
                tile[..width].copy_from_slice(&row[first..first + width]);
            }
            let tile = add_tile(a.strip(of_a), b.strip(strip), tile);
            for (tile, row) in tile.iter().zip(rows.chunks_exact_mut(b.columns)) {
                row[first..first + width].copy_from_slice(&tile[..width]);
            }
        }
    }
}

#[inline]
fn add_tile<T: Real, const M: usize, const N: usize>(
    a: &[[T; M]],
    b: &[[T; N]],
    mut sums: [[T; N]; M],
) -> [[T; N]; M] {
    for (a, b) in a.iter().zip(b) {
        for (sums, a) in sums.iter_mut().zip(a) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = *sum + *a * *b;
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn random(stream: &mut Stream, count: usize) -> Vec<f32> {
        (0..count).map(|_| stream.below(1 << 20) as f32 / 1e5 - 5.0).collect()
    }

    /// Element by element, term by term: the order that is promised.
    fn plain(a: &[f32], b: &[f32], (rows, m, n): (usize, usize, usize), mut sums: Vec<f32>) -> Vec<f32> {
        for (i, sums) in sums.chunks_exact_mut(n).enumerate() {
            for (j, sum) in sums.iter_mut().enumerate() {
                for k in 0..rows {
                    *sum += a[k * m + i] * b[k * n + j];
                }
            }
        }
        sums
    }

    #[test]
    fn every_shape_has_the_bits_of_the_plain_loop() {
        let mut stream = Stream::new(1, "product", &[]);
        for (rows, m, n) in [(1, 1, 1), (3, 4, 8), (17, 5, 9), (64, 13, 31), (100, 1, 70)] {
            let (a, b) = (random(&mut stream, rows * m), random(&mut stream, rows * n));
            let before = random(&mut stream, m * n);
            let mut sums = before.clone();
            add_product(&Strips::<_, 4>::pack(&a, m), &Strips::<_, 8>::pack(&b, n), &mut sums);
            assert_eq!(sums, plain(&a, &b, (rows, m, n), before), "{rows} rows, {m} x {n}");
        }
    }

    #[test]
    fn a_product_on_any_threads_has_the_bits_of_the_plain_loop() {
        let mut stream = Stream::new(3, "product", &[]);
        let (rows, side) = (20, 77);
        let (a, b) = (random(&mut stream, rows * side), random(&mut stream, rows * side));
        let expected = plain(&a, &b, (rows, side, side), vec![0.0; side * side]);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut sums = vec![0.0; side * side];
            let (a, b) = (Strips::<_, 4>::pack(&a, side), Strips::<_, 4>::pack(&b, side));
            pool.install(|| add_parallel_product(&a, &b, &mut sums));
            assert_eq!(sums, expected, "{threads} threads");
        }
    }

    #[test]
    fn a_mirrored_upper_product_has_the_bits_of_the_whole_in_any_blocks_and_on_any_threads() {
        let mut stream = Stream::new(2, "product", &[]);
        let (rows, side) = (50, 75);
        let a = random(&mut stream, rows * side);
        let expected = plain(&a, &a, (rows, side, side), vec![0.0; side * side]);
        for (threads, block) in [(1, 50), (3, 50), (2, 7)] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut sums = vec![0.0; side * side];
            for rows in a.chunks(block * side) {
                let strips = Strips::<_, 4>::pack(rows, side);
                pool.install(|| add_upper_product(&strips, &strips, &mut sums));
            }
            mirror(&mut sums, side);
            assert_eq!(sums, expected, "{threads} threads, {block} rows at a time");
        }
    }
}
