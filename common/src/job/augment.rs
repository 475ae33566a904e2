//! What is done to images before a network gets them, and which size they have then.

use super::{ChannelOrder, Crops, DataSpec, PixelScale};
use crate::dataset::{Manifest, SampleShape, SampleSize};
use serde::{Deserialize, Serialize};

/// One step of preparing a sample; what is random in it is keyed by (seed, epoch, sample).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Augment {
    /// Zero-pads each side by `pixels` and crops the original size at a random place.
    PadCrop {
        /// Padding on each side.
        pixels: u32,
    },
    /// Mirrors left and right with probability one half.
    Flip {},
    /// Makes the shorter side `size` pixels long, the other in proportion, by a triangle filter that widens when an image
    /// shrinks. Pillow's and torchvision's bilinear resizing is this to one level of 255; of a JPEG that is at least twice as large,
    /// which is decoded at 1/2, 1/4 or 1/8 of its size, to a few more.
    Resize {
        /// The shorter side.
        size: u32,
    },
    /// The middle `size` × `size` pixels.
    CenterCrop {
        /// The side.
        size: u32,
    },
    /// `size` × `size` pixels at a random place.
    RandomCrop {
        /// The side.
        size: u32,
    },
    /// A random part of the image, as `size` × `size` pixels.
    RandomResizedCrop {
        /// The side.
        size: u32,
        /// The least and the greatest share of the image's area.
        #[serde(default = "default_area")]
        area: [f64; 2],
        /// The least and the greatest width over height.
        #[serde(default = "default_aspect")]
        aspect: [f64; 2],
    },
    /// Brightness, contrast, saturation and hue change in a random order.
    ColorJitter {
        /// The factor's distance from 1.
        #[serde(default)]
        brightness: f64,
        /// The factor's distance from 1.
        #[serde(default)]
        contrast: f64,
        /// The factor's distance from 1.
        #[serde(default)]
        saturation: f64,
        /// The share of the circle of hues by which they turn, at most a half.
        #[serde(default)]
        hue: f64,
    },
    /// Adds a random amount of the directions in which ImageNet's colours vary.
    Lighting {
        /// The amount's standard deviation.
        #[serde(default = "default_std")]
        std: f64,
    },
}

/// Of "Going deeper with convolutions", section 6.
fn default_area() -> [f64; 2] {
    [0.08, 1.0]
}

fn default_aspect() -> [f64; 2] {
    [3.0 / 4.0, 4.0 / 3.0]
}

/// Of "ImageNet classification with deep convolutional neural networks", section 4.1.
fn default_std() -> f64 {
    0.1
}

/// The largest side that a step may ask for.
const MAX_SIDE: u32 = 4096;

impl Augment {
    /// Its name in job files.
    pub fn name(&self) -> &'static str {
        match self {
            Self::PadCrop { .. } => "pad-crop",
            Self::Flip {} => "flip",
            Self::Resize { .. } => "resize",
            Self::CenterCrop { .. } => "center-crop",
            Self::RandomCrop { .. } => "random-crop",
            Self::RandomResizedCrop { .. } => "random-resized-crop",
            Self::ColorJitter { .. } => "color-jitter",
            Self::Lighting { .. } => "lighting",
        }
    }

    /// Whether it may follow a whitening: it only moves the numbers of an image, whatever they are.
    fn only_moves(&self) -> bool {
        matches!(self, Self::PadCrop { .. } | Self::Flip {})
    }

    /// Whether it does the same to a sample every time.
    fn is_fixed(&self) -> bool {
        matches!(self, Self::Resize { .. } | Self::CenterCrop { .. })
    }

    /// What is wrong with its values, as the end of a sentence.
    fn problem(&self) -> Option<String> {
        let outside =
            |key: &str, value: String, range: &str| Some(format!("`{key}` is {value}; it must be {range}"));
        let side = |size: u32| match size {
            1..=MAX_SIDE => None,
            _ => outside("size", size.to_string(), &format!("1 to {MAX_SIDE}")),
        };
        match *self {
            Self::PadCrop { pixels: 1..=1024 } | Self::Flip {} => None,
            Self::PadCrop { pixels } => outside("pixels", pixels.to_string(), "1 to 1024"),
            Self::Resize { size } | Self::CenterCrop { size } | Self::RandomCrop { size } => side(size),
            Self::RandomResizedCrop { size, area, aspect } => {
                let within = |[low, high]: [f64; 2], most: f64| 0.0 < low && low <= high && high <= most;
                if !within(area, 1.0) {
                    return outside("area", format!("{area:?}"), "[least, most] with 0 < least <= most <= 1");
                }
                if !within(aspect, 100.0) {
                    return outside(
                        "aspect",
                        format!("{aspect:?}"),
                        "[least, most] with 0 < least <= most <= 100",
                    );
                }
                side(size)
            }
            Self::ColorJitter { brightness, contrast, saturation, hue } => {
                let factors =
                    [("brightness", brightness), ("contrast", contrast), ("saturation", saturation)];
                if let Some((key, value)) = factors.into_iter().find(|(_, v)| !(0.0..=10.0).contains(v)) {
                    return outside(key, value.to_string(), "0 to 10");
                }
                if (0.0..=0.5).contains(&hue) { None } else { outside("hue", hue.to_string(), "0 to 0.5") }
            }
            Self::Lighting { std } => {
                if (0.0..=10.0).contains(&std) {
                    None
                } else {
                    outside("std", std.to_string(), "0 to 10")
                }
            }
        }
    }
}

/// Height and width of an image of (`height`, `width`) whose shorter side is made `side` pixels long. The other is rounded
/// down, as torchvision does, and at least 1.
pub fn shorter_side((height, width): (usize, usize), side: usize) -> (usize, usize) {
    let other = |long: usize, short: usize| (side * long / short.max(1)).max(1);
    if height <= width { (side, other(width, height)) } else { (other(height, width), side) }
}

impl DataSpec {
    /// What is wrong with the keys by themselves: the key and the end of a sentence.
    pub(super) fn problem(&self) -> Option<(&'static str, String)> {
        for (key, steps) in [("augment", &self.augment), ("evaluate", &self.evaluate)] {
            for (i, step) in steps.iter().enumerate() {
                if let Some(problem) = step.problem() {
                    return Some((key, format!("step {} of `{key}`, `{}`: {problem}", i + 1, step.name())));
                }
            }
        }
        if let Some(step) = self.evaluate.iter().find(|step| !step.is_fixed()) {
            let what = format!(
                "`{}` is random, and evaluation is not; `evaluate` takes `resize` and `center-crop`",
                step.name()
            );
            return Some(("evaluate", what));
        }
        if self.channels.is_some_and(|c| c != 1 && c != 3) {
            return Some(("channels", "`channels` must be 1 (grey) or 3 (red, green, blue)".to_owned()));
        }
        let given = self.mean.is_some() || self.std.is_some();
        if given && (self.mean.is_none() || self.std.is_none() || self.scale != PixelScale::Standardize) {
            let what = "`mean` and `std` go together, with `scale = \"standardize\"`";
            return Some(("mean", what.to_owned()));
        }
        if let Some(fault) = self.whitening_problem() {
            return Some(fault);
        }
        if self.mean.iter().flatten().any(|m| !m.is_finite()) {
            return Some((
                "mean",
                "`mean` must be numbers, one per channel, of pixels from 0 to 1".to_owned(),
            ));
        }
        if self.std.iter().flatten().any(|s| !(*s > 0.0 && s.is_finite())) {
            return Some((
                "std",
                "`std` must be numbers above 0, one per channel, of pixels from 0 to 1".to_owned(),
            ));
        }
        None
    }

    /// What does not go together with `whiten`, if the job has that.
    fn whitening_problem(&self) -> Option<(&'static str, String)> {
        self.whiten?;
        if self.scale != PixelScale::Gcn {
            return Some((
                "whiten",
                "`whiten` is fitted to images of normalized contrast; add `scale = \"gcn\"`".to_owned(),
            ));
        }
        if self.channels.is_some() {
            let what = "`whiten` is fitted to the channels that the images have; remove `channels`";
            return Some(("channels", what.to_owned()));
        }
        if self.channel_order != ChannelOrder::Rgb {
            let what = "`whiten` is fitted to red, green and blue in this order; remove `channel_order`";
            return Some(("channel_order", what.to_owned()));
        }
        if let Some(step) = self.augment.iter().find(|step| !step.only_moves()) {
            let what = format!(
                "`{}` changes pixels or sizes, and `whiten` is fitted to whole images as they are; with it `augment` takes `flip` and \
                 `pad-crop`, which come behind it",
                step.name()
            );
            return Some(("augment", what));
        }
        if !self.evaluate.is_empty() {
            let what = "`whiten` is fitted to whole images as they are; remove `evaluate`";
            return Some(("evaluate", what.to_owned()));
        }
        None
    }

    /// What is wrong with `train` as the training set by which images are whitened, if they are: the end of a sentence.
    pub fn lacking_whitening(&self, train: &Manifest) -> Option<String> {
        let name = &train.name;
        (self.whiten.is_some() && train.whitening.is_none()).then(|| {
            format!(
                "dataset `{name}` has no whitening; `coordinator dataset whiten {name} {name}-zca` makes `{name}-zca` of it, which \
                 has one"
            )
        })
    }

    /// What keeps samples of `data` from being whitened in an evaluation with `crops`: the end of a sentence.
    pub(super) fn unwhitenable(&self, data: &Manifest, crops: Crops) -> Option<String> {
        self.whiten?;
        if data.fixed_size().is_none() {
            return Some(format!(
                "the images of `{}` differ in size, and those that are whitened are all of one",
                data.name
            ));
        }
        let what = "a whitening is fitted to whole images, and crops are resized; leave `crops` at 1";
        (crops != Crops::One).then(|| what.to_owned())
    }

    /// The shape of every training sample of `data` when a network gets it; or the key that does not fit the dataset, and
    /// what is wrong.
    pub fn training_shape(&self, data: &Manifest) -> Result<SampleShape, (&'static str, String)> {
        if let Some(what) = self.lacking_whitening(data) {
            return Err(("whiten", what));
        }
        self.shape(data, "augment", &self.augment)
    }

    pub(super) fn shape(
        &self,
        data: &Manifest,
        key: &'static str,
        steps: &[Augment],
    ) -> Result<SampleShape, (&'static str, String)> {
        let name = &data.name;
        let channels = self.channels.unwrap_or(data.shape.channels);
        if self.channel_order == ChannelOrder::Bgr && channels != 3 {
            let what =
                format!("the images of `{name}` have no colours to reorder; set `channels = 3` or remove it");
            return Err(("channel_order", what));
        }
        let mut size = data.fixed_size();
        for step in steps {
            size = match *step {
                Augment::PadCrop { .. } | Augment::Flip {} => size,
                Augment::Resize { size: side } => size.map(|s| {
                    let (height, width) = shorter_side((s.height as usize, s.width as usize), side as usize);
                    SampleSize { height: height as u32, width: width as u32 }
                }),
                Augment::CenterCrop { size: side } | Augment::RandomCrop { size: side } => {
                    if let Some(SampleSize { height, width }) = size.filter(|s| s.height.min(s.width) < side)
                    {
                        let what = format!(
                            "`{}` takes {side} x {side} pixels of images of `{name}` that have {height} x {width} then; \
                             put a `resize` before it",
                            step.name()
                        );
                        return Err((key, what));
                    }
                    Some(SampleSize { height: side, width: side })
                }
                Augment::RandomResizedCrop { size: side, .. } => {
                    Some(SampleSize { height: side, width: side })
                }
                Augment::ColorJitter { .. } | Augment::Lighting { .. } if channels != 3 => {
                    let what = format!(
                        "`{}` needs colours, and `{name}` is grey; set `channels = 3` or remove it",
                        step.name()
                    );
                    return Err((key, what));
                }
                Augment::ColorJitter { .. } | Augment::Lighting { .. } => size,
            };
        }
        let Some(SampleSize { height, width }) = size else {
            let crop = if key == "augment" { "`random-resized-crop`" } else { "`resize` and `center-crop`" };
            let what =
                format!("the images of `{name}` differ in size; `{key}` must bring them to one, with {crop}");
            return Err((key, what));
        };
        for (key, values) in [("mean", &self.mean), ("std", &self.std)] {
            if let Some(values) = values.as_ref().filter(|v| v.len() != channels as usize) {
                let what =
                    format!("`{key}` has {} numbers and the images have {channels} channels", values.len());
                return Err((key, what));
            }
        }
        Ok(SampleShape { channels, height, width })
    }

    /// Mean and standard deviation by which pixels (0 to 1) are standardized: those given, or the training set's.
    pub fn statistics(&self, train: &Manifest) -> (Vec<f64>, Vec<f64>) {
        if let (Some(mean), Some(std)) = (&self.mean, &self.std) {
            return (mean.clone(), std.clone());
        }
        let fit = |values: &[f64], combine: fn(&[f64]) -> f64| match (values.len(), self.channels) {
            (1, Some(3)) => vec![values[0]; 3],
            (3, Some(1)) => vec![combine(values)],
            _ => values.to_vec(),
        };
        // Of grey made from colours, what these weights give: exact for the mean, an upper bound for the deviation.
        let luma = |v: &[f64]| 0.299 * v[0] + 0.587 * v[1] + 0.114 * v[2];
        (fit(&train.mean, luma), fit(&train.std, luma))
    }
}
