//! PNG, with the `png` crate.

use super::MAX_PIXELS;
use crate::error::ImageError;
use crate::orientation::Orientation;
use crate::picture::Picture;
use png::{ColorType, DecodeOptions, Decoder, Limits, Reader, Transformations};
use std::io::Cursor;

/// What every PNG begins with.
pub(super) const MAGIC: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// Memory for what is not pixels, such as texts and profiles.
const MAX_OTHER_BYTES: usize = 64 << 20;

/// What a PNG's header says.
pub(super) struct Header {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) orientation: Orientation,
}

pub(super) fn header(bytes: &[u8]) -> Result<Header, ImageError> {
    let reader = open(bytes)?;
    let info = reader.info();
    let exif = info.exif_metadata.as_deref().map_or(Orientation::default(), Orientation::from_exif);
    Ok(Header { height: info.height as usize, width: info.width as usize, orientation: exif })
}

/// The first frame as RGB of 8 bits. Every checksum is compared.
pub(super) fn decode(bytes: &[u8]) -> Result<Picture, ImageError> {
    let mut reader = open(bytes)?;
    let damaged = |e: png::DecodingError| ImageError::Png(e.to_string());
    let length = reader.output_buffer_size().ok_or_else(|| ImageError::Png("it is too large".to_owned()))?;
    let mut values = vec![0; length];
    let info = reader.next_frame(&mut values).map_err(damaged)?;
    reader.finish().map_err(damaged)?;
    let channels = match info.color_type {
        ColorType::Grayscale => 1,
        ColorType::GrayscaleAlpha => 2,
        ColorType::Rgb => 3,
        ColorType::Rgba => 4,
        ColorType::Indexed => return Err(ImageError::Png("its palette is missing".to_owned())),
    };
    let colours = if channels < 3 { 1 } else { 3 };
    if channels != colours {
        values = values.chunks_exact(channels).flat_map(|pixel| &pixel[..colours]).copied().collect();
    }
    let picture = Picture::new(colours, info.height as usize, info.width as usize, values)?;
    Ok(picture.with_channels(3))
}

fn open(bytes: &[u8]) -> Result<Reader<Cursor<&[u8]>>, ImageError> {
    let damaged = |e: png::DecodingError| ImageError::Png(e.to_string());
    let mut options = DecodeOptions::default();
    options.set_ignore_adler32(false);
    options.set_ignore_checksums(false);
    let mut decoder = Decoder::new_with_options(Cursor::new(bytes), options);
    decoder.set_limits(Limits { bytes: MAX_OTHER_BYTES });
    decoder.set_ignore_text_chunk(true);
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    // Before any memory for pixels is taken.
    let info = decoder.read_header_info().map_err(damaged)?;
    let (height, width) = (info.height as usize, info.width as usize);
    if height.checked_mul(width).is_none_or(|n| n > MAX_PIXELS) {
        return Err(ImageError::TooLarge { width, height });
    }
    decoder.read_info().map_err(damaged)
}
