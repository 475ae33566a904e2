//! Augmentations of raw pixels, keyed by (seed, epoch, sample).

use lockstep_common::job::Augment;
use lockstep_common::rng::Stream;

/// A sample's pixels: channels, then rows, then columns.
pub(crate) struct Pixels {
    pub(crate) channels: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) values: Vec<u8>,
}

/// Applies `augments` in order. The random numbers depend on seed, epoch and sample alone.
pub(crate) fn apply(augments: &[Augment], seed: u64, epoch: u64, sample: u64, pixels: &mut Pixels) {
    if augments.is_empty() {
        return;
    }
    let mut stream = Stream::new(seed, "augment", &[epoch, sample]);
    for augment in augments {
        match augment {
            Augment::PadCrop { pixels: pad } => {
                let places = 2 * u64::from(*pad) + 1;
                let (down, right) = (stream.below(places) as isize, stream.below(places) as isize);
                shift(pixels, down - *pad as isize, right - *pad as isize);
            }
            Augment::Flip {} => {
                if stream.bernoulli(0.5) {
                    pixels.values.chunks_exact_mut(pixels.width.max(1)).for_each(<[u8]>::reverse);
                }
            }
        }
    }
}

/// Cropping a zero-padded image at (`down`, `right`) from its corner shifts it and brings in zeros.
fn shift(pixels: &mut Pixels, down: isize, right: isize) {
    let (height, width) = (pixels.height as isize, pixels.width as isize);
    let mut shifted = vec![0; pixels.values.len()];
    let plane = pixels.height * pixels.width;
    for channel in 0..pixels.channels {
        for y in 0..height {
            let from_y = y + down;
            if !(0..height).contains(&from_y) {
                continue;
            }
            let (first, last) = ((-right).clamp(0, width), (width - right).clamp(0, width));
            if first >= last {
                continue;
            }
            let row = channel * plane + (from_y * width) as usize;
            let source = row + (first + right) as usize..row + (last + right) as usize;
            let target = channel * plane + (y * width + first) as usize;
            shifted[target..target + source.len()].copy_from_slice(&pixels.values[source]);
        }
    }
    pixels.values = shifted;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Pixels {
        Pixels { channels: 1, height: 2, width: 3, values: vec![1, 2, 3, 4, 5, 6] }
    }

    #[test]
    fn shifting_brings_in_zeros_on_every_side() {
        let cases: [((isize, isize), [u8; 6]); 5] = [
            ((0, 0), [1, 2, 3, 4, 5, 6]),
            ((1, 0), [4, 5, 6, 0, 0, 0]),
            ((-1, 1), [0, 0, 0, 2, 3, 0]),
            ((0, -2), [0, 0, 1, 0, 0, 4]),
            ((0, 5), [0; 6]),
        ];
        for ((down, right), expected) in cases {
            let mut pixels = image();
            shift(&mut pixels, down, right);
            assert_eq!(pixels.values, expected, "{down}, {right}");
        }
    }

    #[test]
    fn the_same_sample_is_augmented_alike_and_differently_in_another_epoch() {
        let augments = [Augment::PadCrop { pixels: 1 }, Augment::Flip {}];
        let run = |epoch, sample| {
            let mut pixels = image();
            apply(&augments, 1, epoch, sample, &mut pixels);
            pixels.values
        };
        assert_eq!(run(0, 7), run(0, 7));
        let distinct: std::collections::BTreeSet<_> = (0..64).map(|epoch| run(epoch, 7)).collect();
        // 9 places times 2 orientations; 64 draws leave one of them out rarely, more than half never.
        assert!(distinct.len() > 9, "{}", distinct.len());
    }
}
