//! The inverse square root of a covariance.

use crate::product::{Strips, add_parallel_product, add_upper_product, mirror};
use rayon::prelude::*;

/// Rows that are packed at a time. The sums go on from one to the next, so this decides about no bit.
pub(super) const BLOCK: usize = 256;

/// Columns of a strip: 4 × 4 numbers of 64 bits are half of the registers that every x86-64 has.
pub(super) const STRIP: usize = 4;

/// Once the singular values are as near to 1 as this, one step more brings them to the last bit: the error e becomes 1.5 e².
const NEAR: f64 = 1e-8;

/// Columns that are solved for together: with 3072 rows they are 1.5 MB, which a core's cache holds.
const SOLVED: usize = 64;

/// C^(-1/2) of the symmetric `c` of `side` rows, whose eigenvalues are at least `least`; `progress` gets the products done.
///
/// With C = V diag(l) Vᵀ that is V diag(l^(-1/2)) Vᵀ, and there is only one. It is found without V, by steps whose bits are the
/// same everywhere: C = Rᵀ R by Cholesky, R = U C^(1/2) with an orthogonal U (Higham, "Functions of matrices", 2008,
/// algorithm 6.21), and so C^(-1/2) = R⁻¹ U. U is the limit of Newton and Schulz's X' = X (3 I - XᵀX) / 2 from R, scaled by what is
/// known of the spectrum's lower end (Chen and Chow, "A stable scaling of Newton-Schulz for improving the sign function computation
/// of a Hermitian matrix", 2014). How many steps there are follows from `least` and the norm of `c`.
pub(super) fn inverse_root(
    c: &[f64],
    side: usize,
    least: f64,
    progress: &mut dyn FnMut(u64, u64),
) -> Vec<f64> {
    let norm = c.iter().map(|x| x * x).sum::<f64>().sqrt();
    let factors = scaling((least / norm).sqrt());
    let r = cholesky(c, side);
    let root = norm.sqrt();
    let mut x: Vec<f64> = r.iter().map(|r| r / root).collect();
    for (step, factor) in factors.iter().enumerate() {
        progress(step as u64, factors.len() as u64);
        let mut t = product(&x, &x, side, add_upper_product);
        mirror(&mut t, side);
        let scale = factor / 2.0;
        t.iter_mut().for_each(|t| *t *= -scale * factor * factor);
        t.iter_mut().step_by(side + 1).for_each(|t| *t += 3.0 * scale);
        x = product(&transposed(&x, side), &t, side, add_parallel_product);
    }
    let mut root = solve(&r, &x, side);
    for row in 0..side {
        for column in 0..row {
            let mean = (root[row * side + column] + root[column * side + row]) / 2.0;
            (root[row * side + column], root[column * side + row]) = (mean, mean);
        }
    }
    root
}

/// The factor of each step, for singular values from `low` to 1. A step makes x of it f x (3 - f² x²) / 2, and f is such that
/// both ends come to the same, the least of all.
fn scaling(mut low: f64) -> Vec<f64> {
    let mut factors = Vec::new();
    while 1.0 - low > NEAR {
        let squared = 3.0 / (1.0 + low + low * low);
        let factor = squared.sqrt();
        factors.push(factor);
        low = factor * low * (3.0 - squared * low * low) / 2.0;
    }
    factors.push(1.0);
    factors
}

/// AᵀB.
fn product(
    a: &[f64],
    b: &[f64],
    side: usize,
    add: fn(&Strips<f64, STRIP>, &Strips<f64, STRIP>, &mut [f64]),
) -> Vec<f64> {
    let mut product = vec![0.0; side * side];
    for (a, b) in a.chunks(BLOCK * side).zip(b.chunks(BLOCK * side)) {
        add(&Strips::pack(a, side), &Strips::pack(b, side), &mut product);
    }
    product
}

fn transposed(matrix: &[f64], side: usize) -> Vec<f64> {
    let mut transposed = vec![0.0; side * side];
    for (row, numbers) in matrix.chunks_exact(side).enumerate() {
        for (column, number) in numbers.iter().enumerate() {
            transposed[column * side + row] = *number;
        }
    }
    transposed
}

/// The upper triangular R with `c` = Rᵀ R.
fn cholesky(c: &[f64], side: usize) -> Vec<f64> {
    let mut r = vec![0.0; side * side];
    for row in 0..side {
        let (above, below) = r.split_at_mut(row * side);
        let own = &mut below[row..side];
        own.copy_from_slice(&c[row * side + row..(row + 1) * side]);
        for above in above.chunks_exact(side) {
            subtract(own, above[row], &above[row..]);
        }
        let diagonal = own[0].sqrt();
        own.iter_mut().for_each(|x| *x /= diagonal);
        own[0] = diagonal;
    }
    r
}

/// The X with R X = B, of the upper triangular R.
fn solve(r: &[f64], b: &[f64], side: usize) -> Vec<f64> {
    let blocks: Vec<usize> = (0..side).step_by(SOLVED).collect();
    let solved = blocks.par_iter().map(|&first| {
        let width = SOLVED.min(side - first);
        let mut x = vec![0.0; side * width];
        for row in (0..side).rev() {
            let (above, below) = x.split_at_mut((row + 1) * width);
            let own = &mut above[row * width..];
            own.copy_from_slice(&b[row * side + first..][..width]);
            for (factor, below) in
                r[row * side + row + 1..(row + 1) * side].iter().zip(below.chunks_exact(width))
            {
                subtract(own, *factor, below);
            }
            own.iter_mut().for_each(|x| *x /= r[row * side + row]);
        }
        x
    });
    let solved: Vec<Vec<f64>> = solved.collect();
    let row = |row: usize| solved.iter().flat_map(move |x| &x[row * (x.len() / side)..][..x.len() / side]);
    (0..side).flat_map(row).copied().collect()
}

fn subtract(from: &mut [f64], factor: f64, numbers: &[f64]) {
    from.iter_mut().zip(numbers).for_each(|(from, number)| *from -= factor * number);
}
