//! From JPEG and PNG files to RGB pixels.
//!
//! Every image becomes RGB of 8 bits a channel, upright:
//! - grey is repeated; a palette is looked up; CMYK and YCCK become RGB by (255 − ink) · (255 − black) / 255;
//! - transparency is dropped: the colours under it count, as with PIL's `convert("RGB")`;
//! - of 16 bits the upper 8 count; JPEG with more than 8, and lossless JPEG, is refused;
//! - EXIF orientation is followed. Colour profiles are not.
//!
//! The format is told from the first bytes, not from a file's name.

mod jpeg;
mod png;
mod turbo;

use crate::error::ImageError;
use crate::orientation::Orientation;
use crate::picture::{Picture, Region};
use crate::resize::Window;
use turbo::Turbo;

/// The most pixels that are decoded, 8192 × 8192: a few kilobytes must not take gigabytes of memory.
pub const MAX_PIXELS: usize = 1 << 26;

/// Decodes images, with memory that it uses again.
#[derive(Debug)]
pub struct Decoder {
    turbo: Turbo,
}

/// An encoded image whose header has been read.
#[derive(Clone, Copy, Debug)]
pub struct Encoded<'a> {
    bytes: &'a [u8],
    kind: Kind,
    /// As stored.
    height: usize,
    width: usize,
    orientation: Orientation,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Jpeg(jpeg::Colours),
    Png,
}

/// Pixels of an image, enough to resize what was asked for.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// The pixels, RGB.
    pub picture: Picture,
    /// Where what was asked for lies in it.
    pub(crate) window: Window,
}

impl Encoded<'_> {
    /// Height and width, upright.
    pub fn size(&self) -> (usize, usize) {
        self.orientation.size(self.height, self.width)
    }
}

impl Decoder {
    /// One that has decoded nothing yet.
    pub fn new() -> Result<Self, ImageError> {
        Ok(Self { turbo: Turbo::new()? })
    }

    /// Reads the header of `bytes`.
    pub fn open<'a>(&mut self, bytes: &'a [u8]) -> Result<Encoded<'a>, ImageError> {
        let (kind, height, width, orientation) = if bytes.starts_with(&jpeg::MAGIC) {
            let header = self.turbo.header(bytes)?;
            let markers = jpeg::markers(bytes);
            let colours = jpeg::Colours::new(header.is_cmyk, markers.has_adobe);
            let orientation = markers.exif.map_or(Orientation::default(), Orientation::from_exif);
            (Kind::Jpeg(colours), header.height, header.width, orientation)
        } else if bytes.starts_with(&png::MAGIC) {
            let header = png::header(bytes)?;
            (Kind::Png, header.height, header.width, header.orientation)
        } else {
            return Err(ImageError::Format(beginning(bytes)));
        };
        let encoded = Encoded { bytes, kind, height, width, orientation };
        match height.checked_mul(width) {
            Some(1..=MAX_PIXELS) => Ok(encoded),
            _ => Err(ImageError::TooLarge { width, height }),
        }
    }

    /// The whole image, upright.
    pub fn decode(&mut self, image: &Encoded<'_>) -> Result<Picture, ImageError> {
        let picture = match image.kind {
            Kind::Jpeg(colours) => {
                let all = Region::whole(image.height, image.width);
                let picture =
                    self.turbo.decode(image.bytes, turbo::Part { denominator: 1, region: all }, colours)?;
                colours.to_rgb(picture)
            }
            Kind::Png => png::decode(image.bytes)?,
        };
        Ok(image.orientation.apply(picture))
    }

    /// The whole image of `bytes`, upright, or an error if anything of it is damaged or missing.
    pub fn decode_strictly(&mut self, bytes: &[u8]) -> Result<Picture, ImageError> {
        let image = self.open(bytes)?;
        self.turbo.set_strict(true)?;
        let picture = self.decode(&image);
        self.turbo.set_strict(false)?;
        match picture {
            // All scans have been read by then, but of several none has become pixels.
            Err(e) if turbo::is_left_over(&e) => self.decode(&image),
            picture => picture,
        }
    }

    /// What is needed of an image to make `height` × `width` pixels of `region` (upright): a JPEG is decoded there only,
    /// and at 1/2, 1/4 or 1/8 of its size if what remains is still as large as what is wanted.
    ///
    /// A smaller decoding is libjpeg's: each 8 × 8 block gives 4 × 4, 2 × 2 or 1 pixels from its lowest frequencies. So the
    /// pixels differ a little from those of a full decoding, alike on every machine.
    pub fn decode_region(
        &mut self,
        image: &Encoded<'_>,
        region: Region,
        (height, width): (usize, usize),
    ) -> Result<Decoded, ImageError> {
        let Kind::Jpeg(colours) = image.kind else {
            return Ok(Decoded { picture: self.decode(image)?, window: window(region) });
        };
        if !image.orientation.is_upright() {
            return Ok(Decoded { picture: self.decode(image)?, window: window(region) });
        }
        let fits = |d: &usize| region.height >= d * height && region.width >= d * width;
        let denominator = [8, 4, 2].into_iter().find(fits).unwrap_or(1);
        let scaled = |n: usize| n.div_ceil(denominator);
        let size = (scaled(image.height), scaled(image.width));
        // Neighbours that the upsampling of colours sees, so that the pixels are those of a whole decoding.
        let margin = 2;
        let top = (region.top / denominator).saturating_sub(margin);
        let left = (region.left / denominator).saturating_sub(margin);
        let bottom = (scaled(region.top + region.height) + margin).min(size.0);
        let right = (scaled(region.left + region.width) + margin).min(size.1);
        let wanted = Region { top, left, height: bottom - top, width: right - left };
        let part = self.turbo.align(turbo::Part { denominator, region: wanted }, size);
        let picture = colours.to_rgb(self.turbo.decode(image.bytes, part, colours)?);
        let at = |n: usize, origin: usize| n as f64 / denominator as f64 - origin as f64;
        let window = Window {
            top: at(region.top, part.region.top),
            left: at(region.left, part.region.left),
            height: region.height as f64 / denominator as f64,
            width: region.width as f64 / denominator as f64,
        };
        Ok(Decoded { picture, window })
    }
}

fn window(region: Region) -> Window {
    Window {
        top: region.top as f64,
        left: region.left as f64,
        height: region.height as f64,
        width: region.width as f64,
    }
}

/// The first bytes of a file, to be shown.
fn beginning(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "nothing: it is empty".to_owned();
    }
    let first = &bytes[..bytes.len().min(8)];
    match std::str::from_utf8(first) {
        Ok(text) if text.chars().all(|c| !c.is_control() || c.is_whitespace()) => format!("{text:?}"),
        _ => first.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "),
    }
}

#[cfg(test)]
mod tests;
