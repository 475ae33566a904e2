//! Pixels in memory.

use crate::error::ImageError;

/// Pixels: row by row, from left to right, each with its channels side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    channels: usize,
    height: usize,
    width: usize,
    values: Vec<u8>,
}

/// A rectangle of whole pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its first row.
    pub top: usize,
    /// Its first column.
    pub left: usize,
    /// Its rows.
    pub height: usize,
    /// Its columns.
    pub width: usize,
}

impl Region {
    /// All of an image.
    pub fn whole(height: usize, width: usize) -> Self {
        Self { top: 0, left: 0, height, width }
    }
}

impl Picture {
    /// Takes `values`, which must be as many as the sizes say. There are 1 (grey), 3 (RGB) or 4 channels.
    pub fn new(channels: usize, height: usize, width: usize, values: Vec<u8>) -> Result<Self, ImageError> {
        let expected = height.checked_mul(width).and_then(|n| n.checked_mul(channels));
        if expected != Some(values.len()) || values.is_empty() {
            let what = format!("{} bytes are not {channels} x {height} x {width} pixels", values.len());
            return Err(ImageError::Shape(what));
        }
        Ok(Self { channels, height, width, values })
    }

    /// A black picture.
    pub fn black(channels: usize, height: usize, width: usize) -> Self {
        Self { channels, height, width, values: vec![0; channels * height * width] }
    }

    /// From channels that lie one after the other, as tensors and IDX and CIFAR files have them.
    pub fn from_planes(
        channels: usize,
        height: usize,
        width: usize,
        planes: &[u8],
    ) -> Result<Self, ImageError> {
        if channels == 1 {
            return Self::new(1, height, width, planes.to_vec());
        }
        let mut values = vec![0; planes.len()];
        let plane = height * width;
        for (channel, plane) in planes.chunks_exact(plane.max(1)).enumerate() {
            for (pixel, value) in values.chunks_exact_mut(channels).zip(plane) {
                pixel[channel] = *value;
            }
        }
        Self::new(channels, height, width, values)
    }

    /// Channels of each pixel.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The values, row by row, the channels of a pixel side by side.
    pub fn values(&self) -> &[u8] {
        &self.values
    }

    /// The same, to be changed.
    pub fn values_mut(&mut self) -> &mut [u8] {
        &mut self.values
    }

    /// The memory, to be used again.
    pub fn into_values(self) -> Vec<u8> {
        self.values
    }

    /// One row.
    pub(crate) fn row(&self, y: usize) -> &[u8] {
        let bytes = self.width * self.channels;
        &self.values[y * bytes..(y + 1) * bytes]
    }

    /// One row, to be changed.
    pub(crate) fn row_mut(&mut self, y: usize) -> &mut [u8] {
        let bytes = self.width * self.channels;
        &mut self.values[y * bytes..(y + 1) * bytes]
    }

    /// With 1 or 3 channels. Grey becomes colour by repetition; colour becomes grey by the luma weights of ITU-R
    /// BT.601, in 16 bits of fraction.
    pub fn with_channels(self, channels: usize) -> Self {
        let values = match (self.channels, channels) {
            (1, 3) => self.values.iter().flat_map(|&v| [v; 3]).collect(),
            (3, 1) => self.values.chunks_exact(3).map(luma).collect(),
            _ => return self,
        };
        Self { channels, values, ..self }
    }
}

/// 0.299 R + 0.587 G + 0.114 B, rounded: the weights times 65536 are 19595, 38470 and 7471, and add up to it.
pub(crate) fn luma(rgb: &[u8]) -> u8 {
    let [r, g, b] = [u32::from(rgb[0]), u32::from(rgb[1]), u32::from(rgb[2])];
    ((r * 19_595 + g * 38_470 + b * 7_471 + 0x8000) >> 16) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_become_pixels() {
        let picture = Picture::from_planes(3, 1, 2, &[1, 2, 3, 4, 5, 6]).unwrap();
        assert_eq!(picture.values(), [1, 3, 5, 2, 4, 6]);
        assert!(Picture::from_planes(3, 1, 2, &[1, 2, 3]).is_err());
        assert!(Picture::new(1, 0, 0, Vec::new()).is_err());
    }

    #[test]
    fn grey_and_colour_become_each_other() {
        let grey = Picture::new(1, 1, 2, vec![7, 255]).unwrap();
        let colour = grey.clone().with_channels(3);
        assert_eq!(colour.values(), [7, 7, 7, 255, 255, 255]);
        assert_eq!(colour.with_channels(1), grey);
        let primaries = Picture::new(3, 1, 3, vec![255, 0, 0, 0, 255, 0, 0, 0, 255]).unwrap();
        assert_eq!(primaries.with_channels(1).values(), [76, 150, 29]);
    }
}
