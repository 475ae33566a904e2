//! A training set's whitening at work, and the steps that come behind it.

use crate::train::Number;
use lockstep_common::dataset::{SampleShape, WhiteningMap};
use lockstep_common::job::Augment;
use lockstep_common::product::{Strips, add_product};
use lockstep_common::rng::Stream;

/// Images that are best whitened together: the matrix, 38 MB for CIFAR, is read from memory once for all of them.
const TOGETHER: usize = 16;

/// Columns of the matrix that are computed at a time: with four images 32 numbers, half of the registers that every x86-64 has.
const STRIP: usize = 8;

/// Images of one product.
const IMAGES: usize = 4;

/// How many of `samples` one of `threads` threads had best whiten at a time. Fewer than those of a product cost as much.
pub(super) fn together(samples: usize, threads: usize) -> usize {
    samples.div_ceil(threads.max(1)).next_multiple_of(IMAGES).clamp(IMAGES, TOGETHER)
}

/// x becomes (x - m) P.
pub(crate) struct Whitening<T> {
    /// -m.
    shift: Vec<T>,
    matrix: Strips<T, STRIP>,
}

impl<T: Number> Whitening<T> {
    /// In this number type.
    pub(crate) fn new(map: &WhiteningMap) -> Self {
        let matrix: Vec<T> = map.matrix.iter().map(|x| T::from_f64(*x)).collect();
        let shift: Vec<T> = map.mean.iter().map(|x| T::from_f64(-x)).collect();
        Self { matrix: Strips::pack(&matrix, shift.len()), shift }
    }

    /// The numbers of an image.
    pub(super) fn len(&self) -> usize {
        self.shift.len()
    }

    /// Whitens images that lie one after the other. Each gets the same bits whichever others are there.
    pub(super) fn apply(&self, images: &mut [T]) {
        for image in images.chunks_exact_mut(self.len()) {
            image.iter_mut().zip(&self.shift).for_each(|(x, shift)| *x = *x + *shift);
        }
        let centred = Strips::<_, IMAGES>::pack_transposed(images, self.len());
        images.fill(T::default());
        add_product(&centred, &self.matrix, images);
    }
}

/// What is done to an image that has been whitened.
#[derive(Clone, Copy, Debug)]
pub(super) enum Move {
    /// Mirrors left and right with probability one half.
    Flip,
    /// Surrounds with so many zeros and crops the original size at a random place.
    PadCrop(usize),
}

impl Move {
    /// What a job file calls by that name, if it only moves numbers.
    pub(super) fn of(step: &Augment) -> Option<Self> {
        match *step {
            Augment::Flip {} => Some(Self::Flip),
            Augment::PadCrop { pixels } => Some(Self::PadCrop(pixels as usize)),
            _ => None,
        }
    }

    /// Moves the numbers of an image, which lie channel by channel. What is random is drawn as it is for pictures.
    pub(super) fn apply<T: Number>(self, shape: SampleShape, stream: &mut Stream, image: &mut [T]) {
        let [height, width] = [shape.height, shape.width].map(|n| n as usize);
        match self {
            Self::Flip => {
                if stream.bernoulli(0.5) {
                    image.chunks_exact_mut(width).for_each(<[T]>::reverse);
                }
            }
            Self::PadCrop(pixels) => {
                let places = 2 * pixels as u64 + 1;
                let (down, right) = (stream.below(places) as usize, stream.below(places) as usize);
                let before = image.to_vec();
                image.fill(T::default());
                for (to, from) in
                    image.chunks_exact_mut(height * width).zip(before.chunks_exact(height * width))
                {
                    for y in pixels.saturating_sub(down)..height.min((height + pixels).saturating_sub(down)) {
                        let columns =
                            pixels.saturating_sub(right)..width.min((width + pixels).saturating_sub(right));
                        if columns.is_empty() {
                            continue;
                        }
                        let source = (y + down - pixels) * width + columns.start + right - pixels;
                        let length = columns.len();
                        to[y * width..][columns].copy_from_slice(&from[source..source + length]);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_images::{Pipeline, Source, Workbench};

    /// A map of `side` numbers, nothing about which is symmetric but the matrix.
    fn map(side: usize) -> WhiteningMap {
        let mut stream = Stream::new(1, "map", &[]);
        let mut number = || stream.below(1000) as f64 / 100.0 - 5.0;
        let mut matrix = vec![0.0; side * side];
        for row in 0..side {
            for column in row..side {
                let x = number();
                (matrix[row * side + column], matrix[column * side + row]) = (x, x);
            }
        }
        WhiteningMap { mean: (0..side).map(|_| number()).collect(), matrix }
    }

    fn images(side: usize, count: usize) -> Vec<f64> {
        let mut stream = Stream::new(2, "images", &[]);
        (0..side * count).map(|_| stream.below(1000) as f64 / 10.0).collect()
    }

    #[test]
    fn images_are_centred_and_multiplied() {
        let (map, mut found) = (map(11), images(11, 5));
        let expected: Vec<f64> = found
            .chunks_exact(11)
            .flat_map(|x| {
                let term = |i: usize, j: usize| (x[i] - map.mean[i]) * map.matrix[i * 11 + j];
                (0..11).map(move |j| (0..11).map(|i| term(i, j)).sum::<f64>()).collect::<Vec<_>>()
            })
            .collect();
        Whitening::<f64>::new(&map).apply(&mut found);
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
        }
    }

    #[test]
    fn an_image_gets_the_same_bits_whichever_others_are_there() {
        let whitening = Whitening::<f32>::new(&map(75));
        let images: Vec<f32> = images(75, 19).iter().map(|x| *x as f32).collect();
        let mut together = images.clone();
        whitening.apply(&mut together);
        for size in [1, 2, 5, 16] {
            let mut apart = images.clone();
            apart.chunks_mut(size * 75).for_each(|some| whitening.apply(some));
            assert_eq!(apart, together, "{size} at a time");
        }
    }

    #[test]
    fn moves_are_those_of_pictures() {
        let shape = SampleShape { channels: 3, height: 4, width: 6 };
        let planes: Vec<u8> = (1..=72).collect();
        let mut bench = Workbench::new().unwrap();
        let pad = |pixels| Augment::PadCrop { pixels };
        for steps in [
            vec![Augment::Flip {}],
            vec![pad(2), Augment::Flip {}],
            vec![pad(9)],
            vec![Augment::Flip {}, pad(1)],
        ] {
            for sample in 0..40 {
                let stream = || Stream::new(1, "augment", &[0, sample]);
                let pipeline = Pipeline::new(None, steps.clone());
                let picture =
                    pipeline.run(&mut bench, Source::Planes(shape, &planes), &mut stream()).unwrap();
                let mut image: Vec<f32> = planes.iter().map(|x| f32::from(*x)).collect();
                let mut drawn = stream();
                steps.iter().for_each(|step| Move::of(step).unwrap().apply(shape, &mut drawn, &mut image));
                let expected: Vec<f32> = (0..3)
                    .flat_map(|c| picture.values().iter().skip(c).step_by(3).map(|x| f32::from(*x)))
                    .collect();
                assert_eq!(image, expected, "{steps:?}, sample {sample}");
            }
        }
    }
}
