//! EXIF orientation: how a camera was held.

use crate::picture::Picture;

/// What must be done to the stored pixels so that the image is upright: the values 1 to 8 of the EXIF tag 0x0112.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Orientation {
    /// Rows and columns change places, first of all.
    transposed: bool,
    /// Then left and right change places.
    mirrored: bool,
    /// Then top and bottom do.
    flipped: bool,
}

impl Orientation {
    /// The one that EXIF data (the TIFF part of it) names; upright if it names none or cannot be read that far.
    pub(crate) fn from_exif(tiff: &[u8]) -> Self {
        let exif = exif::Reader::new().continue_on_error(true).read_raw(tiff.to_vec());
        let Ok(exif) = exif.or_else(|e| e.distill_partial_result(|_| ())) else { return Self::default() };
        let field = exif.get_field(exif::Tag::Orientation, exif::In::PRIMARY);
        let [transposed, mirrored, flipped] = match field.and_then(|f| f.value.get_uint(0)) {
            Some(2) => [false, true, false],
            Some(3) => [false, true, true],
            Some(4) => [false, false, true],
            Some(5) => [true, false, false],
            Some(6) => [true, true, false],
            Some(7) => [true, true, true],
            Some(8) => [true, false, true],
            _ => [false; 3],
        };
        Self { transposed, mirrored, flipped }
    }

    pub(crate) fn is_upright(self) -> bool {
        self == Self::default()
    }

    /// Height and width upright, of an image stored with these.
    pub(crate) fn size(self, height: usize, width: usize) -> (usize, usize) {
        if self.transposed { (width, height) } else { (height, width) }
    }

    /// The upright picture.
    pub(crate) fn apply(self, stored: Picture) -> Picture {
        if self.is_upright() {
            return stored;
        }
        let (height, width) = self.size(stored.height(), stored.width());
        let channels = stored.channels();
        let mut upright = Picture::black(channels, height, width);
        for y in 0..height {
            let row = upright.row_mut(y);
            let from_y = if self.flipped { height - 1 - y } else { y };
            for (x, pixel) in row.chunks_exact_mut(channels).enumerate() {
                let from_x = if self.mirrored { width - 1 - x } else { x };
                let (y, x) = if self.transposed { (from_x, from_y) } else { (from_y, from_x) };
                pixel.copy_from_slice(&stored.row(y)[x * channels..(x + 1) * channels]);
            }
        }
        upright
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// EXIF data of one entry, the orientation.
    pub(crate) fn exif(value: u8) -> Vec<u8> {
        let mut tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
        tiff.extend([value, 0, 0, 0, 0, 0, 0, 0]);
        tiff
    }

    /// Each stored picture is the letter F seen by a camera held in that way; all are the same upright.
    #[test]
    fn every_orientation_comes_out_upright() {
        let upright = ["##", "#.", "##", "#."];
        let stored: [(u8, &[&str]); 8] = [
            (1, &["##", "#.", "##", "#."]),
            (2, &["##", ".#", "##", ".#"]),
            (3, &[".#", "##", ".#", "##"]),
            (4, &["#.", "##", "#.", "##"]),
            (5, &["####", "#.#."]),
            (6, &["#.#.", "####"]),
            (7, &[".#.#", "####"]),
            (8, &["####", ".#.#"]),
        ];
        let picture =
            |rows: &[&str]| Picture::new(1, rows.len(), rows[0].len(), rows.concat().into_bytes()).unwrap();
        for (value, rows) in stored {
            let orientation = Orientation::from_exif(&exif(value));
            let stored = picture(rows);
            assert_eq!(orientation.size(stored.height(), stored.width()), (4, 2), "orientation {value}");
            assert_eq!(orientation.apply(stored), picture(&upright), "orientation {value}");
        }
    }

    #[test]
    fn what_is_broken_beside_it_does_not_hide_the_orientation() {
        // Two entries, the second with a value far outside of the file.
        let tiff = b"II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\
            \x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0\0\0\0\0";
        assert_eq!(Orientation::from_exif(tiff), Orientation::from_exif(&exif(6)));
    }

    #[test]
    fn what_is_no_exif_data_is_upright() {
        for tiff in [&b""[..], b"II*", &exif(0), &exif(9), &exif(6)[..15]] {
            assert!(Orientation::from_exif(tiff).is_upright(), "{tiff:?}");
        }
    }
}
