//! Colours that vary.
//!
//! All of it is written in single operations on `f32`, whose results IEEE 754 fixes, and rounds to bytes after each change,
//! as torchvision does on bytes.

use crate::picture::{Picture, luma};
use lockstep_common::rng::Stream;

/// How far the colours of a picture may move. A strength s draws a factor uniform in [max(0, 1 − s), 1 + s].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Jitter {
    pub(crate) brightness: f64,
    pub(crate) contrast: f64,
    pub(crate) saturation: f64,
    /// Of the circle of hues: a shift uniform in ± this, at most a half.
    pub(crate) hue: f64,
}

/// Changes brightness, contrast, saturation and hue in a random order, as torchvision's `ColorJitter` does.
pub(crate) fn jitter(picture: &mut Picture, strength: Jitter, stream: &mut Stream) {
    for change in stream.permutation(4) {
        let mut factor = |s: f64| stream.uniform_in((1.0 - s).max(0.0), 1.0 + s) as f32;
        match change {
            0 if strength.brightness > 0.0 => blend(picture, factor(strength.brightness), |_| 0.0),
            1 if strength.contrast > 0.0 => {
                let mean = mean_luma(picture);
                blend(picture, factor(strength.contrast), |_| mean);
            }
            2 if strength.saturation > 0.0 => {
                blend(picture, factor(strength.saturation), |pixel| f32::from(luma(pixel)));
            }
            3 if strength.hue > 0.0 => turn(picture, stream.uniform_in(-strength.hue, strength.hue) as f32),
            _ => {}
        }
    }
}

/// Each value becomes factor · value + (1 − factor) · what `other` gives for its pixel.
fn blend(picture: &mut Picture, factor: f32, other: impl Fn(&[u8]) -> f32) {
    for pixel in picture.values_mut().chunks_exact_mut(3) {
        let rest = (1.0 - factor) * other(pixel);
        for value in pixel {
            *value = to_byte(factor * f32::from(*value) + rest);
        }
    }
}

fn mean_luma(picture: &Picture) -> f32 {
    let sum: u64 = picture.values().chunks_exact(3).map(|pixel| u64::from(luma(pixel))).sum();
    (sum as f64 / (picture.height() * picture.width()) as f64) as f32
}

/// Moves every hue by `shift` of the circle (A. R. Smith, "Color gamut transform pairs", 1978: hue, saturation, value).
fn turn(picture: &mut Picture, shift: f32) {
    for pixel in picture.values_mut().chunks_exact_mut(3) {
        let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(|v| f32::from(v) / 255.0);
        let (value, least) = (r.max(g).max(b), r.min(g).min(b));
        let chroma = value - least;
        if chroma == 0.0 {
            continue;
        }
        // In sixths of the circle, from red.
        let hue = if value == r {
            (g - b) / chroma
        } else if value == g {
            2.0 + (b - r) / chroma
        } else {
            4.0 + (r - g) / chroma
        };
        let hue = (hue + 6.0 * shift + 12.0) % 6.0;
        let (sector, part) = (hue as usize, hue - (hue as usize) as f32);
        let (falling, rising) = (value - chroma * part, least + chroma * part);
        let rgb = match sector {
            0 => [value, rising, least],
            1 => [falling, value, least],
            2 => [least, value, rising],
            3 => [least, falling, value],
            4 => [rising, least, value],
            _ => [value, least, falling],
        };
        for (to, from) in pixel.iter_mut().zip(rgb) {
            *to = to_byte(from * 255.0);
        }
    }
}

/// Adds to every pixel a random amount of the directions in which the colours of ImageNet vary: standard deviation `std`
/// times each direction's own.
///
/// A. Krizhevsky, I. Sutskever, G. E. Hinton, "ImageNet classification with deep convolutional neural networks", 2012,
/// section 4.1; the numbers are those that all reimplementations share, for colours from 0 to 1.
pub(crate) fn lighting(picture: &mut Picture, std: f64, stream: &mut Stream) {
    const DEVIATIONS: [f64; 3] = [0.2175, 0.0188, 0.0045];
    const DIRECTIONS: [[f64; 3]; 3] =
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]];
    let mut amounts = [0.0; 3];
    for (amount, deviation) in amounts.iter_mut().zip(DEVIATIONS) {
        *amount = stream.normal() * std * deviation;
    }
    let shift = DIRECTIONS.map(|row| {
        let sum = row[0] * amounts[0] + row[1] * amounts[1] + row[2] * amounts[2];
        (sum * 255.0) as f32
    });
    for pixel in picture.values_mut().chunks_exact_mut(3) {
        for (value, shift) in pixel.iter_mut().zip(shift) {
            *value = to_byte(f32::from(*value) + shift);
        }
    }
}

/// Rounded half up, within 0 to 255.
fn to_byte(value: f32) -> u8 {
    (value + 0.5).clamp(0.0, 255.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn palette() -> Picture {
        let values = vec![255, 0, 0, 0, 255, 0, 0, 0, 255, 200, 100, 50, 128, 128, 128, 10, 240, 130];
        Picture::new(3, 1, 6, values).unwrap()
    }

    #[test]
    fn factors_of_one_and_no_turn_change_nothing() {
        let mut picture = palette();
        blend(&mut picture, 1.0, |_| 17.0);
        turn(&mut picture, 0.0);
        turn(&mut picture, 1.0);
        assert_eq!(picture, palette());
    }

    #[test]
    fn a_third_of_the_circle_takes_red_to_green_and_grey_stays() {
        let mut picture = palette();
        turn(&mut picture, 1.0 / 3.0);
        assert_eq!(picture.values()[..9], [0, 255, 0, 0, 0, 255, 255, 0, 0]);
        assert_eq!(picture.values()[9..15], [50, 200, 100, 128, 128, 128]);
    }

    #[test]
    fn factors_of_nought_give_black_the_mean_and_grey() {
        let with = |other: &dyn Fn(&[u8]) -> f32| {
            let mut picture = palette();
            blend(&mut picture, 0.0, other);
            picture.into_values()
        };
        assert_eq!(with(&|_| 0.0), [0; 18]);
        assert_eq!(with(&|pixel| f32::from(luma(pixel)))[..3], [76; 3]);
        let mean = mean_luma(&palette());
        assert!((mean - (76.0 + 150.0 + 29.0 + 124.0 + 128.0 + 159.0) / 6.0).abs() < 1.0, "{mean}");
    }

    #[test]
    fn strengths_bound_what_jitter_does() {
        let mut stream = Stream::new(1, "test", &[]);
        let none = Jitter { brightness: 0.0, contrast: 0.0, saturation: 0.0, hue: 0.0 };
        let mut picture = palette();
        jitter(&mut picture, none, &mut stream);
        assert_eq!(picture, palette());
        let grey = Picture::new(3, 1, 1, vec![100; 3]).unwrap();
        let shades = (0..500).map(|_| {
            let mut picture = grey.clone();
            jitter(&mut picture, Jitter { brightness: 0.4, ..none }, &mut stream);
            picture.values()[0]
        });
        let shades: std::collections::BTreeSet<_> = shades.collect();
        assert!(
            *shades.first().unwrap() >= 60 && *shades.last().unwrap() <= 140 && shades.len() > 60,
            "{shades:?}"
        );
        let mut hued = Picture::new(3, 1, 1, vec![200, 100, 50]).unwrap();
        jitter(&mut hued, Jitter { hue: 0.5, ..none }, &mut stream);
        let (most, least) = (*hued.values().iter().max().unwrap(), *hued.values().iter().min().unwrap());
        assert_eq!((most, least), (200, 50), "a turn keeps value and saturation");
    }

    #[test]
    fn light_moves_all_pixels_alike_along_the_colours_of_imagenet() {
        let mut stream = Stream::new(1, "test", &[]);
        let mut squares = [0.0; 3];
        let n = 4000;
        for _ in 0..n {
            let mut picture = Picture::new(3, 1, 2, vec![100, 120, 140, 101, 121, 141]).unwrap();
            lighting(&mut picture, 0.1, &mut stream);
            let v: Vec<f64> = picture.values().iter().map(|&v| f64::from(v)).collect();
            assert!(v[3] - v[0] == 1.0 && v[4] - v[1] == 1.0 && v[5] - v[2] == 1.0);
            for (square, (value, from)) in squares.iter_mut().zip(v.iter().zip([100.0, 120.0, 140.0])) {
                *square += (value - from) * (value - from) / f64::from(n);
            }
        }
        // 255 · 0.1 · sqrt(Σ (direction · deviation)²): 3.17, 3.22 and 3.25; five standard errors of a deviation are 0.18.
        for (square, expected) in squares.iter().zip([3.17, 3.22, 3.25]) {
            assert!((square.sqrt() - expected).abs() < 0.2, "{squares:?}");
        }
    }
}
