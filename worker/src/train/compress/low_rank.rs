//! The matrix arithmetic of PowerSGD, in one fixed order whatever the processor's vector width.
//!
//! Matrices are row-major. The thin ones are kept transposed, one row per rank, so that every loop runs over
//! neighbouring numbers.

/// Partial sums of a dot product, added in order at its end: two of the widest vectors.
const LANES: usize = 32;

/// Columns that are shorter than this part of what they were before the others were taken out of them are rounding
/// errors of `f32` sums, not directions.
const DEPENDENT: f64 = 1e-6;

/// Writes `M Qᵀ`, transposed, to `p`: `m` is [rows × cols], `q` [rank × cols], `p` [rank × rows].
pub(crate) fn project(m: &[f32], cols: usize, q: &[f32], p: &mut [f32]) {
    let rows = m.len() / cols;
    for (i, row) in m.chunks_exact(cols).enumerate() {
        for (k, q) in q.chunks_exact(cols).enumerate() {
            p[k * rows + i] = dot(row, q);
        }
    }
}

/// Writes `P M` to `q`: `m` is [rows × cols], `p` [rank × rows], `q` [rank × cols].
pub(crate) fn project_back(m: &[f32], cols: usize, p: &[f32], q: &mut [f32]) {
    let rows = m.len() / cols;
    q.fill(0.0);
    for (i, row) in m.chunks_exact(cols).enumerate() {
        for (k, q) in q.chunks_exact_mut(cols).enumerate() {
            let p = p[k * rows + i];
            for (q, m) in q.iter_mut().zip(row) {
                *q += p * m;
            }
        }
    }
}

/// Writes `Pᵀ Q` to `m`: `p` is [rank × rows], `q` [rank × cols], `m` [rows × cols].
pub(crate) fn expand(p: &[f32], q: &[f32], cols: usize, m: &mut [f32]) {
    let rows = m.len() / cols;
    m.fill(0.0);
    for (i, row) in m.chunks_exact_mut(cols).enumerate() {
        for (k, q) in q.chunks_exact(cols).enumerate() {
            let p = p[k * rows + i];
            for (m, q) in row.iter_mut().zip(q) {
                *m += p * q;
            }
        }
    }
}

/// Makes the vectors of `p`, each of `rows` numbers, orthonormal; one that depends on those before becomes zeros. A
/// number that is not finite makes NaNs of its vector and all later ones.
///
/// Modified Gram–Schmidt, twice, in `f64` (Giraud et al., "The loss of orthogonality in the Gram-Schmidt
/// orthogonalization process", 2005).
pub(crate) fn orthonormalise(p: &mut [f32], rows: usize) {
    let mut done: Vec<Vec<f64>> = Vec::new();
    for vector in p.chunks_exact_mut(rows) {
        let mut v: Vec<f64> = vector.iter().map(|&x| f64::from(x)).collect();
        let before = norm(&v);
        for _ in 0..2 {
            for other in &done {
                let along: f64 = v.iter().zip(other).map(|(a, b)| a * b).sum();
                v.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
        }
        let after = norm(&v);
        let is_nothing = after == 0.0 || after < before * DEPENDENT;
        v.iter_mut().for_each(|a| *a = if is_nothing { 0.0 } else { *a / after });
        vector.iter_mut().zip(&v).for_each(|(x, a)| *x = *a as f32);
        done.push(v);
    }
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|a| a * a).sum::<f64>().sqrt()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_parts, b_parts) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_parts.remainder().iter().zip(b_parts.remainder());
    for (a, b) in a_parts.zip(b_parts) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(rest) {
        *lane += a * b;
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::rng::Stream;

    fn draw(purpose: &str, len: usize) -> Vec<f32> {
        let mut stream = Stream::new(2, purpose, &[]);
        (0..len).map(|_| stream.normal() as f32).collect()
    }

    #[test]
    fn products_are_those_of_the_definition() {
        for (rows, cols, rank) in [(1, 1, 1), (3, 70, 2), (40, 33, 4), (7, 64, 3)] {
            let (m, q, p) = (draw("m", rows * cols), draw("q", rank * cols), draw("p", rank * rows));
            let (mut to_p, mut to_q, mut to_m) =
                (vec![9.0; rank * rows], vec![9.0; rank * cols], vec![9.0; rows * cols]);
            project(&m, cols, &q, &mut to_p);
            project_back(&m, cols, &p, &mut to_q);
            expand(&p, &q, cols, &mut to_m);
            let at = |v: &[f32], i: usize| f64::from(v[i]);
            let close =
                |got: f32, exact: f64| assert!((f64::from(got) - exact).abs() < 1e-4, "{got} {exact}");
            for k in 0..rank {
                for i in 0..rows {
                    close(
                        to_p[k * rows + i],
                        (0..cols).map(|j| at(&m, i * cols + j) * at(&q, k * cols + j)).sum(),
                    );
                }
                for j in 0..cols {
                    close(
                        to_q[k * cols + j],
                        (0..rows).map(|i| at(&m, i * cols + j) * at(&p, k * rows + i)).sum(),
                    );
                }
            }
            for i in 0..rows {
                for j in 0..cols {
                    close(
                        to_m[i * cols + j],
                        (0..rank).map(|k| at(&p, k * rows + i) * at(&q, k * cols + j)).sum(),
                    );
                }
            }
        }
    }

    #[test]
    fn vectors_become_orthonormal_and_a_dependent_one_nothing() {
        let rows = 50;
        let mut p = draw("p", 3 * rows);
        let sum: Vec<f32> = (0..rows).map(|i| p[i] + 2.0 * p[rows + i]).collect();
        p.extend(sum);
        orthonormalise(&mut p, rows);
        let product = |a: usize, b: usize| -> f64 {
            (0..rows).map(|i| f64::from(p[a * rows + i]) * f64::from(p[b * rows + i])).sum()
        };
        for a in 0..3 {
            for b in 0..3 {
                assert!((product(a, b) - if a == b { 1.0 } else { 0.0 }).abs() < 1e-6);
            }
        }
        assert_eq!(p[3 * rows..], [0.0; 50]);
    }

    #[test]
    fn what_is_not_finite_stays_visible() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut p = draw("p", 20);
            p[3] = bad;
            orthonormalise(&mut p, 10);
            assert!(p.iter().any(|x| x.is_nan()));
        }
    }
}
