//! Resizing: a triangle filter that widens when an image shrinks (bilinear with antialiasing).
//!
//! `fast_image_resize` works in fixed point on bytes, with coefficients from IEEE operations, so that SSE4.1, AVX2, NEON
//! and plain code give the same bytes; a test here holds it to that.
//!
//! The filter is that of Pillow's `resize` with `BILINEAR`, which torchvision uses on PIL images, and the bytes are not: a fifth to
//! a quarter of them differ by one, none by more. Pillow makes rows narrower before columns shorter and this library the reverse,
//! which is faster, and each rounds to bytes in between; coefficients of 16 bits instead of 22 account for a twentieth of that. Pillow's
//! arithmetic, written out without vector instructions, took four times as long for 500 x 375 pixels to 298 x 224.

use crate::decode::MAX_PIXELS;
use crate::error::ImageError;
use crate::picture::Picture;
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions};

/// Resizes pictures, with memory that it uses again.
#[derive(Debug, Default)]
pub struct Resizer {
    inner: fast_image_resize::Resizer,
}

/// A rectangle of a picture, in its pixels and fractions of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Window {
    pub(crate) top: f64,
    pub(crate) left: f64,
    pub(crate) height: f64,
    pub(crate) width: f64,
}

impl Window {
    pub(crate) fn whole(picture: &Picture) -> Self {
        Self { top: 0.0, left: 0.0, height: picture.height() as f64, width: picture.width() as f64 }
    }
}

impl Resizer {
    /// The whole of `picture` as `height` × `width` pixels. It has 1 or 3 channels.
    pub fn resize(&mut self, picture: &Picture, height: usize, width: usize) -> Result<Picture, ImageError> {
        self.resize_window(picture, Window::whole(picture), height, width)
    }

    /// What `window` shows of `picture`, as `height` × `width` pixels.
    pub(crate) fn resize_window(
        &mut self,
        picture: &Picture,
        window: Window,
        height: usize,
        width: usize,
    ) -> Result<Picture, ImageError> {
        let refused =
            |what: &dyn std::fmt::Display| ImageError::Shape(format!("it cannot be resized: {what}"));
        let channels = picture.channels();
        let kind = match channels {
            1 => PixelType::U8,
            3 => PixelType::U8x3,
            _ => return Err(refused(&format_args!("it has {channels} channels"))),
        };
        if height.checked_mul(width).is_none_or(|pixels| pixels > MAX_PIXELS) {
            return Err(ImageError::Enlarged { width, height });
        }
        let sizes = [picture.width(), picture.height(), width, height].map(u32::try_from);
        let [Ok(from_width), Ok(from_height), Ok(to_width), Ok(to_height)] = sizes else {
            return Err(refused(&"it is too large"));
        };
        let source =
            ImageRef::new(from_width, from_height, picture.values(), kind).map_err(|e| refused(&e))?;
        let mut target = Image::new(to_width, to_height, kind);
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
            .crop(window.left, window.top, window.width, window.height)
            .use_alpha(false);
        self.inner.resize(&source, &mut target, &options).map_err(|e| refused(&e))?;
        Picture::new(channels, height, width, target.into_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fast_image_resize::CpuExtensions;
    use lockstep_common::rng::Stream;

    fn noise(channels: usize, height: usize, width: usize) -> Picture {
        let mut values = vec![0; channels * height * width];
        Stream::new(1, "noise", &[height as u64, width as u64]).fill_bytes(&mut values);
        Picture::new(channels, height, width, values).unwrap()
    }

    #[test]
    #[allow(unsafe_code)]
    fn every_instruction_set_gives_the_same_bytes() {
        let cases =
            [(375, 500, 224, 224), (28, 28, 75, 75), (28, 28, 32, 32), (101, 67, 3, 50), (7, 9, 64, 64)];
        for channels in [1, 3] {
            for (height, width, to_height, to_width) in cases {
                let picture = noise(channels, height, width);
                let window =
                    Window { top: 0.3, left: 1.7, height: height as f64 - 2.5, width: width as f64 - 2.25 };
                let run = |extensions: CpuExtensions| {
                    let mut resizer = Resizer::default();
                    // SAFETY: only extensions that this processor has are asked for.
                    unsafe { resizer.inner.set_cpu_extensions(extensions) };
                    resizer.resize_window(&picture, window, to_height, to_width).unwrap()
                };
                let plain = run(CpuExtensions::None);
                #[cfg(target_arch = "x86_64")]
                let others = [CpuExtensions::Sse4_1, CpuExtensions::Avx2];
                #[cfg(target_arch = "aarch64")]
                let others = [CpuExtensions::Neon];
                for extensions in others.into_iter().filter(CpuExtensions::is_supported) {
                    assert!(
                        run(extensions) == plain,
                        "{extensions:?} differs for {channels} channels of {height}"
                    );
                }
            }
        }
    }

    /// Pinned: another value would change every run of every user that resizes.
    #[test]
    fn resizing_is_stable_between_releases() {
        let small = Resizer::default().resize(&noise(3, 375, 500), 224, 224).unwrap();
        let large = Resizer::default().resize(&noise(1, 28, 28), 75, 75).unwrap();
        let digests = [small, large].map(|p| blake3::hash(p.values()).to_hex()[..16].to_owned());
        assert_eq!(digests, ["503fbeccb15b897a", "cc9bf92c0f44270f"]);
    }

    #[test]
    fn a_narrow_picture_does_not_become_a_giant() {
        let narrow = noise(3, 100_000, 1);
        let error = Resizer::default().resize(&narrow, 256 * 100_000, 256).unwrap_err().to_string();
        assert!(error.starts_with("a resize would give it 256 x 25600000 pixels, more than"), "{error}");
    }

    #[test]
    fn a_flat_picture_stays_flat_and_halving_averages() {
        let flat = Picture::new(3, 9, 7, vec![200; 189]).unwrap();
        let resized = Resizer::default().resize(&flat, 50, 3).unwrap();
        assert!(resized.values().iter().all(|&v| v == 200));
        // The triangle over [-1, 1] twice as wide: weights 1/8, 3/8, 3/8, 1/8, and at an edge 3/7, 3/7, 1/7.
        let ramp = Picture::new(1, 1, 4, vec![0, 70, 140, 210]).unwrap();
        let halved = Resizer::default().resize(&ramp, 1, 2).unwrap();
        assert_eq!(halved.values(), [50, 160]);
    }
}
