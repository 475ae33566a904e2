//! What of a JPEG lies outside of its pixels: markers and kinds of colour.

use crate::picture::Picture;

/// Start of image, and the first byte of the next marker.
pub(super) const MAGIC: [u8; 3] = [0xff, 0xd8, 0xff];

/// How the channels of a JPEG become RGB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colours {
    /// libjpeg-turbo gives RGB.
    Rgb,
    /// Four inks, 255 the most.
    Cmyk,
    /// Four inks, 0 the most, as Adobe's programs write them.
    InvertedCmyk,
}

impl Colours {
    pub(super) fn new(is_cmyk: bool, has_adobe: bool) -> Self {
        match (is_cmyk, has_adobe) {
            (false, _) => Self::Rgb,
            (true, false) => Self::Cmyk,
            (true, true) => Self::InvertedCmyk,
        }
    }

    /// Channels that libjpeg-turbo is asked for.
    pub(super) fn channels(self) -> usize {
        if self == Self::Rgb { 3 } else { 4 }
    }

    pub(super) fn to_rgb(self, picture: Picture) -> Picture {
        let light = match self {
            Self::Rgb => return picture,
            Self::Cmyk => |ink: u8| u32::from(255 - ink),
            Self::InvertedCmyk => |ink: u8| u32::from(ink),
        };
        let mut rgb = Picture::black(3, picture.height(), picture.width());
        for (rgb, cmyk) in rgb.values_mut().chunks_exact_mut(3).zip(picture.values().chunks_exact(4)) {
            for (channel, ink) in rgb.iter_mut().zip(cmyk) {
                // Rounded to nearest.
                *channel = ((light(*ink) * light(cmyk[3]) + 127) / 255) as u8;
            }
        }
        rgb
    }
}

/// What the markers before the pixels tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Markers<'a> {
    /// The TIFF part of the EXIF data.
    pub(super) exif: Option<&'a [u8]>,
    /// Whether Adobe's marker is there.
    pub(super) has_adobe: bool,
    /// The largest horizontal sampling factor of the channels; 0 if it is not told.
    pub(super) horizontal_sampling: usize,
}

/// Looks through the segments up to the first scan. What is damaged there ends the search; the decoder says so itself.
pub(super) fn markers(jpeg: &[u8]) -> Markers<'_> {
    const APP1: u8 = 0xe1;
    const APP14: u8 = 0xee;
    const HUFFMAN_TABLES: u8 = 0xc4;
    const EXTENSION: u8 = 0xc8;
    const ARITHMETIC_TABLES: u8 = 0xcc;
    const START_OF_SCAN: u8 = 0xda;
    let mut found = Markers::default();
    let mut rest = jpeg.get(2..).unwrap_or_default();
    loop {
        let Some((&0xff, after)) = rest.split_first() else { return found };
        // Any number of 0xff may stand before a marker's code.
        let skip = after.iter().take_while(|b| **b == 0xff).count();
        let Some((&code, segment)) = after[skip..].split_first() else { return found };
        if code == START_OF_SCAN {
            return found;
        }
        let Some(length) = segment.first_chunk::<2>().map(|b| usize::from(u16::from_be_bytes(*b))) else {
            return found;
        };
        let (Some(body), Some(next)) = (segment.get(2..length), segment.get(length..)) else { return found };
        match code {
            APP1 if found.exif.is_none() => found.exif = body.strip_prefix(b"Exif\0\0"),
            APP14 => found.has_adobe |= body.starts_with(b"Adobe"),
            0xc0..=0xcf if !matches!(code, HUFFMAN_TABLES | EXTENSION | ARITHMETIC_TABLES) => {
                // Precision, height, width and the number of channels; then of each its name, factors and table.
                let factors =
                    body.get(6..).unwrap_or_default().chunks_exact(3).map(|channel| channel[1] >> 4);
                found.horizontal_sampling = factors.max().unwrap_or_default().into();
            }
            _ => {}
        }
        rest = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_found_and_damage_ends_the_search() {
        let jpeg = b"\xff\xd8\xff\xe0\0\x04ab\xff\xff\xe1\0\x0aExif\0\0II\xff\xee\0\x07Adobe\
            \xff\xc2\0\x0e\x08\0\x01\0\x01\x02\x01\x12\0\x02\x21\0\xff\xc4\0\x02\xff\xda\0\x02\xff\xee\0\x02";
        let all = markers(jpeg);
        assert_eq!(all, Markers { exif: Some(b"II"), has_adobe: true, horizontal_sampling: 2 });
        for length in 0..jpeg.len() {
            let part = markers(&jpeg[..length]);
            assert!(part.exif.is_none() || part.exif == all.exif, "{length}");
        }
        assert_eq!(markers(b"\xff\xd8\xff\xe1\0\0"), Markers::default());
    }

    #[test]
    fn inks_become_light() {
        let inks = Picture::new(4, 1, 3, vec![0, 0, 0, 0, 255, 0, 0, 0, 0, 128, 0, 255]).unwrap();
        let rgb = Colours::Cmyk.to_rgb(inks.clone());
        assert_eq!(rgb.values(), [255, 255, 255, 0, 255, 255, 0, 0, 0]);
        let inverted = inks.values().iter().map(|v| 255 - v).collect();
        assert_eq!(Colours::InvertedCmyk.to_rgb(Picture::new(4, 1, 3, inverted).unwrap()), rgb);
    }
}
