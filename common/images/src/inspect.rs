//! Looking at images while they are imported.

use crate::decode::Decoder;
use crate::error::ImageError;
use lockstep_common::dataset::{ChannelSums, ImageFacts, InspectImage, SampleSize};

/// Decodes an image to the last pixel, strictly.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inspector;

impl InspectImage for Inspector {
    fn inspect(&self, encoded: &[u8]) -> Result<ImageFacts, String> {
        inspect(encoded).map_err(|e| e.to_string())
    }
}

fn inspect(encoded: &[u8]) -> Result<ImageFacts, ImageError> {
    let mut decoder = Decoder::new()?;
    let picture = decoder.decode_strictly(encoded)?;
    let channel = |c: usize| ChannelSums::of(picture.values().iter().skip(c).step_by(3).copied());
    let size = SampleSize { height: picture.height() as u32, width: picture.width() as u32 };
    Ok(ImageFacts { size, sums: [channel(0), channel(1), channel(2)] })
}
