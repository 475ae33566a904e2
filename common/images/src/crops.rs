//! The parts of an image that a network judges where several are asked for.

use crate::augment::crop::cut;
use crate::augment::flip;
use crate::error::ImageError;
use crate::picture::Picture;
use crate::resize::{Resizer, Window};
use lockstep_common::job::{Crops, shorter_side};

/// The input of the networks whose papers fix the other sizes.
const PAPERS_INPUT: usize = 224;

/// Where the parts of an image lie: squares of one size, the network's input.
///
/// The image is resized so that its shorter side has one of some lengths; of each such image one square, as large as it can
/// be, or three are taken: the left, the central and the right one, or the top, the central and the bottom one. The parts are
/// the corners and the centre of such a square, and often the whole of it, resized. Each comes as it is and mirrored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CropPlan {
    /// Rows and columns of every part.
    size: usize,
    /// The lengths of the shorter side.
    sides: Vec<usize>,
    /// Whether the outer squares count, and not the central one alone.
    outer: bool,
    /// Whether the whole square is a part.
    whole: bool,
}

impl CropPlan {
    /// The parts of `size` × `size` pixels; `None` for one part, which a job's own steps prepare.
    ///
    /// The papers' lengths of the shorter side are for inputs of 224 pixels and grow in proportion, rounded: 342, 384, 427 and
    /// 470 for 299.
    pub fn new(crops: Crops, size: usize) -> Option<Self> {
        let side = |length: usize| (2 * length * size + PAPERS_INPUT) / (2 * PAPERS_INPUT);
        let plan = |lengths: &[usize], outer, whole| {
            Some(Self { size, sides: lengths.iter().map(|length| side(*length)).collect(), outer, whole })
        };
        match crops {
            Crops::One => None,
            Crops::Ten => plan(&[256], false, false),
            Crops::Twelve => plan(&[256], false, true),
            Crops::HundredFortyFour => plan(&[256, 288, 320, 352], true, true),
        }
    }

    /// How many parts there are.
    pub fn count(&self) -> usize {
        let squares = if self.outer { 3 } else { 1 };
        let parts = if self.whole { 6 } else { 5 };
        self.sides.len() * squares * parts * 2
    }

    /// The longest of the lengths to which the shorter side is resized.
    pub(crate) fn longest(&self) -> usize {
        self.sides.iter().copied().max().unwrap_or(self.size)
    }

    /// Shows every part of an image of `original` height and width, of which `window` of `picture` shows the whole: size by
    /// size, square by square from the left or the top; of each square the top left, top right, bottom left and bottom right
    /// corner, the centre and the whole; each of these before its mirror image.
    pub(crate) fn each(
        &self,
        resizer: &mut Resizer,
        picture: &Picture,
        window: Window,
        original: (usize, usize),
        mut see: impl FnMut(&Picture),
    ) -> Result<(), ImageError> {
        let size = self.size;
        let mut both = |mut part: Picture| {
            see(&part);
            flip::horizontally(&mut part);
            see(&part);
        };
        for &side in &self.sides {
            let (height, width) = shorter_side(original, side);
            let resized = resizer.resize_window(picture, window, height, width)?;
            for (top, left) in self.squares((height, width), side) {
                for (down, right) in corners_and_centre(side - size) {
                    both(cut(&resized, (top + down) as isize, (left + right) as isize, size, size));
                }
                if self.whole {
                    let [top, left, side] = [top, left, side].map(|n| n as f64);
                    let square = Window { top, left, height: side, width: side };
                    both(resizer.resize_window(&resized, square, size, size)?);
                }
            }
        }
        Ok(())
    }

    /// Top and left of the squares of an image whose shorter side is `side`.
    fn squares(&self, (height, width): (usize, usize), side: usize) -> Vec<(usize, usize)> {
        let free = height.max(width) - side;
        let places = if self.outer { vec![0, free / 2, free] } else { vec![free / 2] };
        places.into_iter().map(|at| if height > width { (at, 0) } else { (0, at) }).collect()
    }
}

/// Top and left of the parts of a square that is `free` pixels larger than they are.
fn corners_and_centre(free: usize) -> [(usize, usize); 5] {
    [(0, 0), (0, free), (free, 0), (free, free), (free / 2, free / 2)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::rng::Stream;

    fn noise(channels: usize, height: usize, width: usize) -> Picture {
        let mut values = vec![0; channels * height * width];
        Stream::new(2, "noise", &[height as u64, width as u64]).fill_bytes(&mut values);
        Picture::new(channels, height, width, values).unwrap()
    }

    fn parts(crops: Crops, size: usize, picture: &Picture) -> Vec<Picture> {
        let plan = CropPlan::new(crops, size).unwrap();
        let (mut parts, original) = (Vec::new(), (picture.height(), picture.width()));
        let window = Window::whole(picture);
        plan.each(&mut Resizer::default(), picture, window, original, |part| parts.push(part.clone()))
            .unwrap();
        assert_eq!(parts.len(), plan.count());
        parts
    }

    const SEVERAL: [Crops; 3] = [Crops::Ten, Crops::Twelve, Crops::HundredFortyFour];

    #[test]
    fn there_are_as_many_parts_as_asked_for_each_of_the_networks_size_before_its_mirror_image() {
        for (height, width) in [(40, 61), (61, 40), (33, 33), (1, 200)] {
            let picture = noise(3, height, width);
            for crops in SEVERAL {
                let parts = parts(crops, 28, &picture);
                assert_eq!(parts.len(), crops.count() as usize);
                assert!(parts.iter().all(|p| (p.channels(), p.height(), p.width()) == (3, 28, 28)));
                for pair in parts.chunks_exact(2) {
                    let mut mirrored = pair[0].clone();
                    flip::horizontally(&mut mirrored);
                    assert_eq!(mirrored, pair[1]);
                }
            }
        }
        assert_eq!(CropPlan::new(Crops::One, 28), None);
    }

    #[test]
    fn sides_are_the_papers_for_224_and_in_proportion_for_others() {
        let sides = |size| CropPlan::new(Crops::HundredFortyFour, size).unwrap().sides;
        assert_eq!(sides(224), [256, 288, 320, 352]);
        assert_eq!(sides(299), [342, 384, 427, 470]);
        assert_eq!(sides(28), [32, 36, 40, 44]);
        assert_eq!(CropPlan::new(Crops::Ten, 299).unwrap().sides, [342]);
    }

    #[test]
    fn a_square_image_has_three_equal_squares_and_another_has_not() {
        let of_squares = |picture: &Picture| -> Vec<Vec<Picture>> {
            parts(Crops::HundredFortyFour, 28, picture).chunks_exact(12).map(<[_]>::to_vec).collect()
        };
        for of_one_size in of_squares(&noise(1, 50, 50)).chunks_exact(3) {
            assert!(of_one_size[0] == of_one_size[1] && of_one_size[1] == of_one_size[2]);
        }
        for picture in [noise(1, 50, 70), noise(1, 70, 50)] {
            for of_one_size in of_squares(&picture).chunks_exact(3) {
                assert!(of_one_size[0] != of_one_size[1] && of_one_size[1] != of_one_size[2]);
            }
        }
    }

    #[test]
    fn the_outer_squares_lie_at_the_image_s_ends() {
        // Twice as wide as high, and dark to bright: resized to 32 x 64, the squares begin at 0, 16 and 32.
        let ramp: Vec<u8> = (0..16).flat_map(|_| (0..32).map(|x| x * 8)).collect();
        let wide = Picture::new(1, 16, 32, ramp).unwrap();
        let mean = |p: &Picture| p.values().iter().map(|v| u32::from(*v)).sum::<u32>() / 784;
        let first = parts(Crops::HundredFortyFour, 28, &wide);
        let whole: Vec<u32> = [10, 22, 34].map(|i| mean(&first[i])).to_vec();
        assert!(whole[0] + 50 < whole[1] && whole[1] + 50 < whole[2], "{whole:?}");
        // The only square of twelve is the middle one.
        assert_eq!(parts(Crops::Twelve, 28, &wide), first[12..24]);
        assert_eq!(parts(Crops::Ten, 28, &wide), first[12..22]);
        let high = Picture::new(1, 32, 16, (0..32).flat_map(|y| [y * 8; 16]).collect()).unwrap();
        let down: Vec<u32> =
            [10, 22, 34].map(|i| mean(&parts(Crops::HundredFortyFour, 28, &high)[i])).to_vec();
        assert_eq!(down, whole);
    }

    #[test]
    fn a_mirror_symmetric_image_gives_the_same_parts_mirrored() {
        // The free columns beside the middle square are even in number at all four sizes, so that it has a middle.
        for (height, half) in [(40, 20), (30, 30), (90, 17)] {
            let left = noise(1, height, half);
            let rows = left.values().chunks_exact(half);
            let values = rows.flat_map(|row| row.iter().chain(row.iter().rev()).copied().collect::<Vec<_>>());
            let picture = Picture::new(1, height, 2 * half, values.collect()).unwrap();
            for crops in SEVERAL {
                let all = parts(crops, 28, &picture);
                let in_square = if crops == Crops::Ten { 10 } else { 12 };
                let squares: Vec<&[Picture]> = all.chunks_exact(in_square).collect();
                for (i, square) in squares.iter().enumerate() {
                    // The mirror image of the left square is the right one's, of any other its own.
                    let other = match (squares.len(), height > 2 * half, i % 3) {
                        (12, false, 0) => squares[i + 2],
                        (12, false, 2) => squares[i - 2],
                        _ => square,
                    };
                    // Top left, its mirror image, top right, ...
                    for (part, twin) in [(0, 3), (1, 2), (4, 7), (5, 6), (8, 9)]
                        .into_iter()
                        .chain((in_square == 12).then_some((10, 11)))
                    {
                        assert!(square[part] == other[twin], "{crops:?} {height} x {half}: {i}, {part}");
                    }
                }
            }
        }
    }

    /// Pinned: another value would change every figure that was ever reported.
    #[test]
    fn parts_are_stable_between_releases() {
        let mut hasher = blake3::Hasher::new();
        for part in parts(Crops::HundredFortyFour, 28, &noise(3, 375, 500)) {
            hasher.update(part.values());
        }
        assert_eq!(&hasher.finalize().to_hex()[..16], "bcefdcca08185c72");
    }
}
