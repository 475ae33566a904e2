//! Global contrast normalization: of an image by itself.

/// The Euclidean norm that an image's contrast is normalized to: pylearn2's for CIFAR, `gcn=55.`.
pub(super) const NORM: f64 = 55.0;

/// The number for each raw value x of an image of the values `image`: 55 (x - m) / |image - m|, where m is the image's mean.
/// Zero for a constant image, which has no contrast.
///
/// The sums are of whole numbers and exact: an image and its mirror image get the same table.
pub fn contrast_table(image: &[u8]) -> [f64; 256] {
    let count = image.len() as u64;
    let (sum, squares) = image.iter().fold((0_u64, 0_u64), |(sum, squares), raw| {
        let raw = u64::from(*raw);
        (sum + raw, squares + raw * raw)
    });
    // count² times the variance: more than 64 bits for the largest images.
    let spread = u128::from(count) * u128::from(squares) - u128::from(sum) * u128::from(sum);
    let factor = if spread == 0 { 0.0 } else { NORM / (spread as f64 * count as f64).sqrt() };
    std::array::from_fn(|raw| {
        let centred = (raw as u64 * count) as f64 - sum as f64;
        factor * centred
    })
}
