//! Choosing and cutting rectangles.

use crate::picture::{Picture, Region};
use lockstep_common::rng::Stream;

/// A random part of an image of `height` × `width`: its share of the area uniform in `area`, the logarithm of its width
/// over its height uniform in that of `aspect`, its place uniform. What does not fit is drawn again, ten times in all; then
/// it is the largest part in the middle with an aspect within `aspect`.
///
/// Szegedy et al., "Going deeper with convolutions", 2015, in the form of torchvision's `RandomResizedCrop.get_params`.
pub fn random_resized_crop(
    (height, width): (usize, usize),
    area: [f64; 2],
    aspect: [f64; 2],
    stream: &mut Stream,
) -> Region {
    const TRIES: u32 = 10;
    let (h, w) = (height as f64, width as f64);
    let log_aspect = aspect.map(libm::log);
    for _ in 0..TRIES {
        let target = h * w * stream.uniform_in(area[0], area[1]);
        let ratio = libm::exp(stream.uniform_in(log_aspect[0], log_aspect[1]));
        let crop_width = libm::round(libm::sqrt(target * ratio)) as usize;
        let crop_height = libm::round(libm::sqrt(target / ratio)) as usize;
        if (1..=width).contains(&crop_width) && (1..=height).contains(&crop_height) {
            let top = stream.below((height - crop_height + 1) as u64) as usize;
            let left = stream.below((width - crop_width + 1) as u64) as usize;
            return Region { top, left, height: crop_height, width: crop_width };
        }
    }
    let ratio = w / h;
    let (crop_height, crop_width) = if ratio < aspect[0] {
        (libm::round(w / aspect[0]), w)
    } else if ratio > aspect[1] {
        (h, libm::round(h * aspect[1]))
    } else {
        (h, w)
    };
    centre((height, width), (crop_height as usize, crop_width as usize))
}

/// The middle of an image; what does not fit is cut to it.
pub(crate) fn centre((height, width): (usize, usize), (wanted_h, wanted_w): (usize, usize)) -> Region {
    let (crop_height, crop_width) = (wanted_h.clamp(1, height), wanted_w.clamp(1, width));
    Region {
        top: (height - crop_height) / 2,
        left: (width - crop_width) / 2,
        height: crop_height,
        width: crop_width,
    }
}

/// Cuts `size` × `size` pixels, in the middle or, with a stream, at a random place. A smaller picture first gets black
/// edges, evenly on both sides.
pub(crate) fn square(picture: Picture, size: usize, stream: Option<&mut Stream>) -> Picture {
    let pad = |n: usize| size.saturating_sub(n);
    let (pad_y, pad_x) = (pad(picture.height()), pad(picture.width()));
    let (free_y, free_x) = (picture.height() + pad_y - size, picture.width() + pad_x - size);
    let (y, x) = match stream {
        Some(stream) => (stream.below(free_y as u64 + 1) as usize, stream.below(free_x as u64 + 1) as usize),
        None => (free_y / 2, free_x / 2),
    };
    let place = |at: usize, pad: usize| at as isize - (pad / 2) as isize;
    cut(&picture, place(y, pad_y), place(x, pad_x), size, size)
}

/// `height` × `width` pixels from (`top`, `left`) on; what lies outside of the picture is black.
pub(crate) fn cut(picture: &Picture, top: isize, left: isize, height: usize, width: usize) -> Picture {
    let channels = picture.channels();
    let mut out = Picture::black(channels, height, width);
    let columns = picture.width() as isize;
    // Of the new picture's columns, those that the old one has.
    let (first, last) =
        ((-left).clamp(0, width as isize) as usize, (columns - left).clamp(0, width as isize) as usize);
    if first >= last {
        return out;
    }
    for y in 0..height {
        let from_y = y as isize + top;
        if !(0..picture.height() as isize).contains(&from_y) {
            continue;
        }
        let from_x = (first as isize + left) as usize;
        let source = from_x * channels..(from_x + last - first) * channels;
        out.row_mut(y)[first * channels..last * channels]
            .copy_from_slice(&picture.row(from_y as usize)[source]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cutting_brings_in_black_on_every_side() {
        let picture = Picture::new(1, 2, 3, vec![1, 2, 3, 4, 5, 6]).unwrap();
        let cases: [((isize, isize), [u8; 6]); 5] = [
            ((0, 0), [1, 2, 3, 4, 5, 6]),
            ((1, 0), [4, 5, 6, 0, 0, 0]),
            ((-1, 1), [0, 0, 0, 2, 3, 0]),
            ((0, -2), [0, 0, 1, 0, 0, 4]),
            ((0, 5), [0; 6]),
        ];
        for ((top, left), expected) in cases {
            assert_eq!(cut(&picture, top, left, 2, 3).values(), expected, "{top}, {left}");
        }
        let colour = Picture::new(3, 1, 2, vec![1, 2, 3, 4, 5, 6]).unwrap();
        assert_eq!(cut(&colour, 0, -1, 1, 2).values(), [0, 0, 0, 1, 2, 3]);
    }

    #[test]
    fn a_square_lies_in_the_middle_and_a_small_picture_gets_edges() {
        let picture = Picture::new(1, 1, 5, vec![1, 2, 3, 4, 5]).unwrap();
        assert_eq!(square(picture.clone(), 1, None).values(), [3]);
        assert_eq!(square(picture, 3, None).values(), [0, 0, 0, 2, 3, 4, 0, 0, 0]);
        let line = Picture::new(1, 1, 9, (0..9).collect()).unwrap();
        let mut stream = Stream::new(1, "test", &[]);
        let mut seen: Vec<u8> =
            (0..200).map(|_| square(line.clone(), 1, Some(&mut stream)).values()[0]).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, (0..9).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn a_random_part_lies_within_the_image(
            seed: u64, height in 1usize..3000, width in 1usize..3000, low in 0.01f64..1.0, narrow in 0.1f64..1.0,
        ) {
            let mut stream = Stream::new(seed, "test", &[]);
            let r = random_resized_crop((height, width), [low, 1.0], [narrow, 1.0 / narrow], &mut stream);
            prop_assert!(r.height >= 1 && r.top + r.height <= height, "{r:?}");
            prop_assert!(r.width >= 1 && r.left + r.width <= width, "{r:?}");
        }
    }

    #[test]
    fn random_parts_have_the_areas_and_aspects_asked_for() {
        let mut stream = Stream::new(1, "test", &[]);
        let n = 20_000;
        let (mut areas, mut logs, mut wide) = (0.0, 0.0, 0);
        for _ in 0..n {
            let r = random_resized_crop((1000, 1000), [0.08, 0.3], [0.75, 4.0 / 3.0], &mut stream);
            let area = (r.height * r.width) as f64 / 1e6;
            let aspect = r.width as f64 / r.height as f64;
            assert!((0.079..0.301).contains(&area) && (0.745..1.34).contains(&aspect), "{r:?}");
            areas += area;
            logs += aspect.ln();
            wide += u32::from(aspect > 1.0);
        }
        // Uniform on [.08, .3]: mean .19, standard deviation .0635; five standard errors are .0022.
        assert!((areas / f64::from(n) - 0.19).abs() < 0.0023, "{}", areas / f64::from(n));
        // Uniform on ±.2877: standard deviation .166; five standard errors are .006.
        assert!((logs / f64::from(n)).abs() < 0.006 && wide.abs_diff(n as u32 / 2) < 400);
    }

    #[test]
    fn an_image_that_no_part_fits_gives_its_middle() {
        let mut stream = Stream::new(1, "test", &[]);
        let mut middle = |size| random_resized_crop(size, [1.0, 1.0], [0.75, 4.0 / 3.0], &mut stream);
        assert_eq!(middle((10, 1000)), Region { top: 0, left: 493, height: 10, width: 13 });
        assert_eq!(middle((1000, 10)), Region { top: 493, left: 0, height: 13, width: 10 });
    }
}
