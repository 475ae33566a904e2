//! Merging the mean and variance of two parts of a batch.

/// Merges the moments of `right`, another part of the batch, into `left`. Both are laid out `[n, mean[C], M2[C]]`:
/// how many values, and per channel their mean and the sum of squared deviations from it.
///
/// Chan, Golub and LeVeque's pairwise update (1979): stable where `E[x²] − E[x]²` cancels. It is not exactly
/// associative, so a result that must not depend on the workers needs one fixed order of merging. Merging with an
/// empty part (n = 0) leaves the other's bits.
///
/// Panics if the lengths differ.
pub fn merge(left: &mut [f64], right: &[f64]) {
    let (Some((left_n, left)), Some((right_n, right))) = (left.split_first_mut(), right.split_first()) else {
        return;
    };
    if *right_n == 0.0 {
        return;
    }
    if *left_n == 0.0 {
        *left_n = *right_n;
        left.copy_from_slice(right);
        return;
    }
    let n = *left_n + *right_n;
    let (mean_weight, m2_weight) = (*right_n / n, *left_n * (*right_n / n));
    let channels = left.len() / 2;
    let (left_mean, left_m2) = left.split_at_mut(channels);
    let (right_mean, right_m2) = right.split_at(channels);
    for c in 0..channels {
        let delta = right_mean[c] - left_mean[c];
        left_mean[c] += delta * mean_weight;
        left_m2[c] += right_m2[c] + delta * delta * m2_weight;
    }
    *left_n = n;
}
