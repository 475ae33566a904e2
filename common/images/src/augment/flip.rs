//! Mirroring.

use crate::picture::Picture;

/// Left and right change places.
pub(crate) fn horizontally(picture: &mut Picture) {
    let (channels, bytes) = (picture.channels(), picture.width() * picture.channels());
    for row in picture.values_mut().chunks_exact_mut(bytes) {
        row.reverse();
        // That turned each pixel's channels around as well.
        if channels > 1 {
            row.chunks_exact_mut(channels).for_each(<[u8]>::reverse);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_change_places_and_channels_do_not() {
        let mut colour = Picture::new(3, 2, 2, vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]).unwrap();
        horizontally(&mut colour);
        assert_eq!(colour.values(), [4, 5, 6, 1, 2, 3, 10, 11, 12, 7, 8, 9]);
    }
}
