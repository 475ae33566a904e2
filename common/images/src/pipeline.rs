//! From a stored sample to the picture that the network gets.

use crate::augment::color::{self, Jitter};
use crate::augment::crop::{self, random_resized_crop};
use crate::augment::flip;
use crate::crops::CropPlan;
use crate::decode::{Decoded, Decoder};
use crate::error::ImageError;
use crate::picture::{Picture, Region};
use crate::resize::{Resizer, Window};
use lockstep_common::dataset::SampleShape;
use lockstep_common::job::{Augment, shorter_side};
use lockstep_common::rng::Stream;

/// What one thread needs to prepare pictures. It remembers nothing but memory.
#[derive(Debug)]
pub struct Workbench {
    decoder: Decoder,
    resizer: Resizer,
}

impl Workbench {
    /// A new one.
    pub fn new() -> Result<Self, ImageError> {
        Ok(Self { decoder: Decoder::new()?, resizer: Resizer::default() })
    }
}

/// A sample as it is stored.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Pixels, channel by channel.
    Planes(SampleShape, &'a [u8]),
    /// A JPEG or PNG file.
    Encoded(&'a [u8]),
}

/// A job's augmentations: decoding, then grey or colour, then each in its order.
#[derive(Clone, Debug)]
pub struct Pipeline {
    channels: Option<usize>,
    steps: Vec<Augment>,
}

impl Pipeline {
    /// `channels` is what pictures are made to have, 1 or 3; without it they keep their own.
    pub fn new(channels: Option<u32>, steps: Vec<Augment>) -> Self {
        Self { channels: channels.map(|c| c as usize), steps }
    }

    /// Prepares one sample. All that is random comes from `stream`, in the order of the steps.
    pub fn run(
        &self,
        bench: &mut Workbench,
        source: Source<'_>,
        stream: &mut Stream,
    ) -> Result<Picture, ImageError> {
        let (mut picture, rest) = match source {
            Source::Planes(shape, planes) => (self.planes(shape, planes)?, &self.steps[..]),
            Source::Encoded(bytes) => self.decode(bench, bytes, stream)?,
        };
        for step in rest {
            picture = apply(step, bench, picture, stream)?;
        }
        Ok(picture)
    }

    /// Shows every part of one sample that `plan` names, in its order, instead of applying the steps.
    pub fn parts(
        &self,
        bench: &mut Workbench,
        source: Source<'_>,
        plan: &CropPlan,
        see: impl FnMut(&Picture),
    ) -> Result<(), ImageError> {
        let (picture, window, original) = match source {
            Source::Planes(shape, planes) => {
                let picture = self.planes(shape, planes)?;
                let (window, size) = (Window::whole(&picture), (picture.height(), picture.width()));
                (picture, window, size)
            }
            Source::Encoded(bytes) => {
                let image = bench.decoder.open(bytes)?;
                let (height, width) = image.size();
                let target = shorter_side((height, width), plan.longest());
                let whole = Region::whole(height, width);
                let Decoded { picture, window } = bench.decoder.decode_region(&image, whole, target)?;
                (self.coloured(picture), window, (height, width))
            }
        };
        plan.each(&mut bench.resizer, &picture, window, original, see)
    }

    fn planes(&self, shape: SampleShape, planes: &[u8]) -> Result<Picture, ImageError> {
        let [channels, height, width] = [shape.channels, shape.height, shape.width].map(|n| n as usize);
        Ok(self.coloured(Picture::from_planes(channels, height, width, planes)?))
    }

    /// Decodes as little as the first step needs and does that step too.
    fn decode(
        &self,
        bench: &mut Workbench,
        bytes: &[u8],
        stream: &mut Stream,
    ) -> Result<(Picture, &[Augment]), ImageError> {
        let image = bench.decoder.open(bytes)?;
        let size = image.size();
        let (region, target) = match self.steps.first() {
            Some(Augment::RandomResizedCrop { size: side, area, aspect }) => {
                let region = random_resized_crop(size, *area, *aspect, stream);
                (region, (*side as usize, *side as usize))
            }
            Some(Augment::Resize { size: side }) => {
                (Region::whole(size.0, size.1), shorter_side(size, *side as usize))
            }
            _ => return Ok((self.coloured(bench.decoder.decode(&image)?), &self.steps)),
        };
        let Decoded { picture, window } = bench.decoder.decode_region(&image, region, target)?;
        let picture = self.coloured(picture);
        let resized = bench.resizer.resize_window(&picture, window, target.0, target.1)?;
        Ok((resized, &self.steps[1..]))
    }

    fn coloured(&self, picture: Picture) -> Picture {
        match self.channels {
            Some(channels) => picture.with_channels(channels),
            None => picture,
        }
    }
}

fn apply(
    step: &Augment,
    bench: &mut Workbench,
    mut picture: Picture,
    stream: &mut Stream,
) -> Result<Picture, ImageError> {
    let size = (picture.height(), picture.width());
    match *step {
        Augment::PadCrop { pixels } => {
            let places = 2 * u64::from(pixels) + 1;
            let (down, right) = (stream.below(places) as isize, stream.below(places) as isize);
            let pad = pixels as isize;
            Ok(crop::cut(&picture, down - pad, right - pad, size.0, size.1))
        }
        Augment::Flip {} => {
            if stream.bernoulli(0.5) {
                flip::horizontally(&mut picture);
            }
            Ok(picture)
        }
        Augment::Resize { size: side } => {
            let (height, width) = shorter_side(size, side as usize);
            bench.resizer.resize(&picture, height, width)
        }
        Augment::CenterCrop { size } => Ok(crop::square(picture, size as usize, None)),
        Augment::RandomCrop { size } => Ok(crop::square(picture, size as usize, Some(stream))),
        Augment::RandomResizedCrop { size: side, area, aspect } => {
            let region = random_resized_crop(size, area, aspect, stream);
            let window = Window {
                top: region.top as f64,
                left: region.left as f64,
                height: region.height as f64,
                width: region.width as f64,
            };
            bench.resizer.resize_window(&picture, window, side as usize, side as usize)
        }
        Augment::ColorJitter { brightness, contrast, saturation, hue } => {
            color::jitter(&mut picture, Jitter { brightness, contrast, saturation, hue }, stream);
            Ok(picture)
        }
        Augment::Lighting { std } => {
            color::lighting(&mut picture, std, stream);
            Ok(picture)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: SampleShape = SampleShape { channels: 1, height: 2, width: 3 };

    fn run(steps: &[Augment], channels: Option<u32>, (epoch, sample): (u64, u64)) -> Picture {
        let mut stream = Stream::new(1, "augment", &[epoch, sample]);
        let source = Source::Planes(SHAPE, &[10, 20, 30, 40, 50, 60]);
        Pipeline::new(channels, steps.to_vec())
            .run(&mut Workbench::new().unwrap(), source, &mut stream)
            .unwrap()
    }

    #[test]
    fn the_same_sample_is_augmented_alike_and_differently_in_another_epoch() {
        let steps = [Augment::PadCrop { pixels: 1 }, Augment::Flip {}];
        assert_eq!(run(&steps, None, (0, 7)), run(&steps, None, (0, 7)));
        let distinct: std::collections::BTreeSet<_> =
            (0..64).map(|epoch| run(&steps, None, (epoch, 7)).into_values()).collect();
        // 9 places times 2 orientations; 64 draws leave one of them out rarely, more than half never.
        assert!(distinct.len() > 9, "{}", distinct.len());
    }

    #[test]
    fn parts_of_an_encoded_image_are_those_of_its_pixels() {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 14, 9);
        encoder.set_color(png::ColorType::Rgb);
        let pixels: Vec<u8> = (0..9 * 14 * 3).map(|i: u32| (i * 37 % 251) as u8).collect();
        encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
        let mut bench = Workbench::new().unwrap();
        let image = bench.decoder.open(&bytes).unwrap();
        let picture = bench.decoder.decode(&image).unwrap();
        let planes: Vec<u8> = (0..3)
            .flat_map(|c| picture.values().iter().skip(c).step_by(3).copied().collect::<Vec<_>>())
            .collect();
        let shape = SampleShape { channels: 3, height: 9, width: 14 };
        let plan = CropPlan::new(lockstep_common::job::Crops::Twelve, 7).unwrap();
        let mut parts = |source| {
            let mut parts = Vec::new();
            let grey = Pipeline::new(Some(1), Vec::new());
            grey.parts(&mut bench, source, &plan, |part| parts.push(part.clone())).unwrap();
            parts
        };
        let of_planes = parts(Source::Planes(shape, &planes));
        assert_eq!(of_planes, parts(Source::Encoded(&bytes)));
        assert!(of_planes.len() == 12 && of_planes.iter().all(|part| part.channels() == 1));
    }

    #[test]
    fn grey_becomes_colour_before_all_else() {
        let picture = run(&[Augment::Resize { size: 4 }], Some(3), (0, 0));
        assert_eq!((picture.channels(), picture.height(), picture.width()), (3, 4, 6));
        let grey = run(&[Augment::Resize { size: 4 }], None, (0, 0));
        assert_eq!(grey.with_channels(3), picture);
    }

    /// Pinned: another value would change every run of every user that augments.
    #[test]
    fn augmentation_is_stable_between_releases() {
        let jitter = Augment::ColorJitter { brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1 };
        let area = [0.08, 1.0];
        let steps = [
            Augment::Resize { size: 40 },
            Augment::RandomResizedCrop { size: 32, area, aspect: [0.75, 4.0 / 3.0] },
            Augment::RandomCrop { size: 30 },
            Augment::PadCrop { pixels: 2 },
            Augment::Flip {},
            jitter,
            Augment::Lighting { std: 0.1 },
            Augment::CenterCrop { size: 28 },
        ];
        let mut hasher = blake3::Hasher::new();
        for sample in 0..20 {
            hasher.update(run(&steps, Some(3), (1, sample)).values());
        }
        assert_eq!(&hasher.finalize().to_hex()[..16], "b65c8063c33371c0");
    }
}
