use super::*;
use proptest::prelude::*;
use turbojpeg::{Compressor, Image, PixelFormat, Subsamp};

/// A photograph of sorts: slopes, an edge and some noise.
pub(crate) fn photo(height: usize, width: usize) -> Vec<u8> {
    let mut noise = vec![0; height * width];
    lockstep_common::rng::Stream::new(1, "photo", &[]).fill_bytes(&mut noise);
    (0..height * width)
        .flat_map(|at| {
            let (y, x) = (at / width, at % width);
            let n = usize::from(noise[at]) / 16;
            let edge = if (x + y) % 97 < 40 { 60 } else { 0 };
            [x * 150 / width + n + edge, y * 150 / height + n + edge, (x + y) * 100 / (width + height) + n]
                .map(|v| v.min(255) as u8)
        })
        .collect()
}

fn jpeg(height: usize, width: usize, subsampling: Subsamp) -> Vec<u8> {
    encode(height, width, PixelFormat::RGB, &photo(height, width), subsampling)
}

fn progressive_jpeg(height: usize, width: usize, subsampling: Subsamp) -> Vec<u8> {
    let mut compressor = Compressor::new().unwrap();
    compressor.set_progressive(true).unwrap();
    encode_with(compressor, height, width, PixelFormat::RGB, &photo(height, width), subsampling)
}

/// The same number of blocks, of other factors: by libjpeg-turbo's names still 4:4:4, in units twice as wide.
fn with_wide_units(mut jpeg: Vec<u8>) -> Vec<u8> {
    let frame = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    for channel in [11, 14, 17] {
        jpeg[frame + channel] = 0x21;
    }
    jpeg
}

fn encode(height: usize, width: usize, format: PixelFormat, pixels: &[u8], subsampling: Subsamp) -> Vec<u8> {
    encode_with(Compressor::new().unwrap(), height, width, format, pixels, subsampling)
}

fn encode_with(
    mut compressor: Compressor,
    height: usize,
    width: usize,
    format: PixelFormat,
    pixels: &[u8],
    subsampling: Subsamp,
) -> Vec<u8> {
    compressor.set_quality(90).unwrap();
    compressor.set_subsamp(subsampling).unwrap();
    let image = Image { pixels, width, pitch: width * format.size(), height, format };
    compressor.compress_to_vec(image).unwrap()
}

fn png(color: ::png::ColorType, depth: ::png::BitDepth, (width, height): (u32, u32), data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut out, width, height);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if color == ::png::ColorType::Indexed {
        encoder.set_palette(vec![1, 2, 3, 250, 251, 252]);
        encoder.set_trns(vec![0, 255]);
    }
    encoder.write_header().unwrap().write_image_data(data).unwrap();
    out
}

fn decode(bytes: &[u8]) -> Result<Picture, ImageError> {
    Decoder::new().unwrap().decode_strictly(bytes)
}

fn crop(picture: &Picture, region: Region) -> Picture {
    let rows = region.top..region.top + region.height;
    let columns = region.left * 3..(region.left + region.width) * 3;
    let values = rows.flat_map(|y| picture.row(y)[columns.clone()].to_vec()).collect();
    Picture::new(3, region.height, region.width, values).unwrap()
}

#[derive(Clone, Copy, Debug)]
enum Form {
    Baseline(Subsamp),
    Progressive(Subsamp),
    WideUnits,
    Cmyk,
}

impl Form {
    fn encode(self, height: usize, width: usize) -> Vec<u8> {
        match self {
            Self::Baseline(subsampling) => jpeg(height, width, subsampling),
            Self::Progressive(subsampling) => progressive_jpeg(height, width, subsampling),
            Self::WideUnits => with_wide_units(jpeg(height, width.next_multiple_of(16), Subsamp::None)),
            Self::Cmyk => {
                let inks = photo(height, width.next_multiple_of(4) * 4 / 3 + 4);
                encode(height, width, PixelFormat::CMYK, &inks[..height * width * 4], Subsamp::None)
            }
        }
    }
}

fn form() -> impl Strategy<Value = Form> {
    use Subsamp::*;
    let subsampling = prop::sample::select(vec![Sub2x2, None, Sub2x1, Sub1x2, Sub4x1, Sub1x4, Gray]);
    prop_oneof![
        4 => subsampling.clone().prop_map(Form::Baseline),
        2 => subsampling.prop_map(Form::Progressive),
        1 => Just(Form::WideUnits),
        1 => Just(Form::Cmyk),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// What is left out must not change what is not.
    #[test]
    fn a_part_is_what_a_whole_decoding_has_there(
        form in form(), height in 1usize..200, width in 1usize..200, a: [prop::sample::Index; 4],
    ) {
        let bytes = form.encode(height, width);
        let top = a[0].index(height);
        let left = a[1].index(width);
        let region = Region { top, left, height: 1 + a[2].index(height - top), width: 1 + a[3].index(width - left) };
        let mut decoder = Decoder::new().unwrap();
        let image = decoder.open(&bytes).unwrap();
        let whole = decoder.decode(&image).unwrap();
        let part = decoder.decode_region(&image, region, (region.height, region.width)).unwrap();
        let at = Region { top: part.window.top as usize, left: part.window.left as usize, ..region };
        prop_assert_eq!((part.window.height, part.window.width), (region.height as f64, region.width as f64));
        prop_assert!(crop(&part.picture, at) == crop(&whole, region), "{:?} of {}x{}", region, height, width);
    }

    /// The same of what is decoded at a fraction of the size.
    #[test]
    fn a_part_of_a_smaller_decoding_is_what_the_whole_of_it_has_there(
        form in form(), denominator in prop::sample::select(vec![2usize, 4, 8]),
        height in 64usize..300, width in 64usize..300, a: [prop::sample::Index; 4],
    ) {
        let bytes = form.encode(height, width);
        let (least, mut decoder) = (2 * denominator, Decoder::new().unwrap());
        let image = decoder.open(&bytes).unwrap();
        let (height, width) = image.size();
        let smaller = |n: usize| n / denominator;
        let whole = Region::whole(height, width);
        let whole = decoder.decode_region(&image, whole, (smaller(height), smaller(width))).unwrap().picture;
        let (top, left) = (a[0].index(height - least), a[1].index(width - least));
        let rows = least + a[2].index(height - top - least);
        let columns = least + a[3].index(width - left - least);
        let region = Region { top, left, height: rows, width: columns };
        let part = decoder.decode_region(&image, region, (smaller(rows), smaller(columns))).unwrap();
        let span = |from: usize, length: usize| {
            let first = from / denominator;
            (first, (from + length).div_ceil(denominator) - first)
        };
        let ((top, rows), (left, columns)) = (span(region.top, rows), span(region.left, columns));
        let wanted = Region { top, left, height: rows, width: columns };
        let at = Region { top: part.window.top as usize, left: part.window.left as usize, ..wanted };
        prop_assert!(crop(&part.picture, at) == crop(&whole, wanted), "{:?} of {}x{} at 1/{}", region, height, width, denominator);
    }

    #[test]
    fn any_damage_gives_an_error_or_pixels(at: prop::sample::Index, value: u8, cut: prop::sample::Index, is_png: bool) {
        let mut bytes = match is_png {
            false => jpeg(60, 40, Subsamp::Sub2x2),
            true => png(::png::ColorType::Rgb, ::png::BitDepth::Eight, (40, 60), &photo(60, 40)),
        };
        let at = at.index(bytes.len());
        bytes[at] = value;
        let _ = decode(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(decode(&bytes).is_err());
    }
}

#[test]
fn a_large_region_is_decoded_at_the_smallest_size_that_suffices() {
    let bytes = jpeg(900, 1201, Subsamp::Sub2x2);
    let mut decoder = Decoder::new().unwrap();
    let image = decoder.open(&bytes).unwrap();
    let cases = [(900, 1201, 1), (450, 600, 2), (451, 600, 1), (225, 300, 4), (112, 150, 8), (20, 20, 8)];
    for (height, width, denominator) in cases {
        let decoded = decoder.decode_region(&image, Region::whole(900, 1201), (height, width)).unwrap();
        let size = (decoded.picture.height(), decoded.picture.width());
        assert_eq!(
            size,
            (900usize.div_ceil(denominator), 1201usize.div_ceil(denominator)),
            "{height} x {width}"
        );
        assert_eq!(decoded.window.width, 1201.0 / denominator as f64);
    }
    let region = Region { top: 101, left: 333, height: 700, width: 800 };
    let mut resizer = crate::resize::Resizer::default();
    let mut small = |target: (usize, usize)| {
        let part = decoder.decode_region(&image, region, target).unwrap();
        resizer.resize_window(&part.picture, part.window, 100, 100).unwrap()
    };
    let (full, quarter) = (small((700, 800)), small((175, 200)));
    let difference: u32 =
        full.values().iter().zip(quarter.values()).map(|(a, b)| u32::from(a.abs_diff(*b))).sum();
    let mean = f64::from(difference) / full.values().len() as f64;
    assert!(mean < 2.0, "the same place and nearly the same colours, not {mean} apart");
}

#[test]
fn every_kind_of_png_becomes_rgb() {
    use ::png::{BitDepth::*, ColorType::*};
    let rgb = |values: &[u8]| values.to_vec();
    for (color, depth, data, expected) in [
        (Rgb, Eight, &[1, 2, 3, 4, 5, 6][..], rgb(&[1, 2, 3, 4, 5, 6])),
        (Rgba, Eight, &[1, 2, 3, 0, 4, 5, 6, 128], rgb(&[1, 2, 3, 4, 5, 6])),
        (Grayscale, Eight, &[7, 9], rgb(&[7, 7, 7, 9, 9, 9])),
        (GrayscaleAlpha, Eight, &[7, 0, 9, 255], rgb(&[7, 7, 7, 9, 9, 9])),
        (Grayscale, One, &[0b0100_0000], rgb(&[0, 0, 0, 255, 255, 255])),
        (Grayscale, Sixteen, &[0x12, 0xff, 0x34, 0x00], rgb(&[0x12, 0x12, 0x12, 0x34, 0x34, 0x34])),
        (Rgb, Sixteen, &[1, 255, 2, 255, 3, 255, 4, 0, 5, 0, 6, 0], rgb(&[1, 2, 3, 4, 5, 6])),
        (Indexed, Eight, &[1, 0], rgb(&[250, 251, 252, 1, 2, 3])),
    ] {
        let picture = decode(&png(color, depth, (2, 1), data)).unwrap();
        assert_eq!((picture.height(), picture.width(), picture.channels()), (1, 2, 3));
        assert_eq!(picture.values(), expected, "{color:?} {depth:?}");
    }
}

#[test]
fn grey_and_cmyk_jpegs_become_rgb() {
    let grey = decode(&encode(8, 8, PixelFormat::GRAY, &[90; 64], Subsamp::Gray)).unwrap();
    assert!(grey.channels() == 3 && grey.values().iter().all(|&v| v.abs_diff(90) <= 1));
    // libjpeg-turbo writes Adobe's marker, so the inks count as inverted.
    let inks: Vec<u8> = [255, 128, 0, 255].repeat(64);
    let cmyk = decode(&encode(8, 8, PixelFormat::CMYK, &inks, Subsamp::None)).unwrap();
    for pixel in cmyk.values().chunks_exact(3) {
        assert!(pixel.iter().zip([255u8, 128, 0]).all(|(a, b)| a.abs_diff(b) <= 3), "{pixel:?}");
    }
}

#[test]
fn a_jpegs_orientation_is_followed_by_size_and_pixels() {
    let stored = jpeg(40, 60, Subsamp::None);
    let mut turned = vec![0xff, 0xd8, 0xff, 0xe1, 0, 34];
    turned.extend(b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0");
    turned.extend(&stored[2..]);
    let mut decoder = Decoder::new().unwrap();
    let image = decoder.open(&turned).unwrap();
    assert_eq!(image.size(), (60, 40));
    let (upright, as_stored) = (decoder.decode(&image).unwrap(), decode(&stored).unwrap());
    for (y, x) in [(0, 0), (59, 39), (13, 22)] {
        assert_eq!(upright.row(y)[x * 3..x * 3 + 3], as_stored.row(39 - x)[y * 3..y * 3 + 3]);
    }
    let region = Region { top: 5, left: 7, height: 30, width: 20 };
    let part = decoder.decode_region(&image, region, (30, 20)).unwrap();
    assert_eq!((part.picture, part.window.top, part.window.left), (upright, 5.0, 7.0));
}

#[test]
fn what_is_no_whole_image_is_refused_with_a_reason() {
    let whole_jpeg = jpeg(64, 64, Subsamp::Sub2x2);
    let whole_png = png(::png::ColorType::Rgb, ::png::BitDepth::Eight, (40, 60), &photo(60, 40));
    let error = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
    assert!(error(b"").contains("it is empty"));
    assert_eq!(error(b"Hello, world"), "it is neither JPEG nor PNG; it begins with \"Hello, w\"");
    assert!(error(b"GIF89a\0\x01\x02").contains("47 49 46 38"));
    assert!(error(&whole_jpeg[..whole_jpeg.len() / 2]).contains("Premature end"));
    assert!(error(&whole_jpeg[..20]).starts_with("damaged JPEG: "));
    assert!(error(&whole_png[..whole_png.len() / 2]).starts_with("damaged PNG: "));
    let mut flipped = whole_png.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    assert!(error(&flipped).starts_with("damaged PNG: "));
    // A header of 100,000 × 100,000 with the right checksum, before any pixel.
    let mut bomb = Vec::new();
    ::png::Encoder::new(&mut bomb, 100_000, 100_000).write_header().unwrap();
    assert_eq!(error(&bomb), "it has 100000 x 100000 pixels, more than the 67108864 that are read");
    let mut large = whole_jpeg.clone();
    let frame = large.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    large[frame + 5..frame + 9].copy_from_slice(&[0xea, 0x60, 0xea, 0x60]);
    assert_eq!(error(&large), "it has 60000 x 60000 pixels, more than the 67108864 that are read");
    let mut compressor = Compressor::new().unwrap();
    compressor.set_lossless(true).unwrap();
    let lossless = encode_with(compressor, 64, 64, PixelFormat::RGB, &photo(64, 64), Subsamp::None);
    assert!(error(&lossless).starts_with("a JPEG with lossless compression is not read"));
}

#[test]
fn bytes_left_over_at_the_end_harm_nothing() {
    for whole in [jpeg(64, 64, Subsamp::Sub2x2), progressive_jpeg(64, 64, Subsamp::Sub2x2)] {
        let mut ending = whole.clone();
        let end = ending.len() - 2;
        ending.splice(end..end, [7; 20]);
        assert_eq!(decode(&ending), decode(&whole));
    }
}

/// Pinned: another value would change every run of every user with JPEGs. The test runs itself again with less of the
/// processor, by the variables that libjpeg-turbo reads.
#[test]
fn decoding_is_stable_between_releases_and_instruction_sets() {
    let digest = || {
        let mut hasher = blake3::Hasher::new();
        for (subsampling, target) in
            [(Subsamp::Sub2x2, 300), (Subsamp::None, 300), (Subsamp::Sub2x2, 140), (Subsamp::Sub2x1, 60)]
        {
            let bytes = jpeg(300, 333, subsampling);
            hasher.update(&bytes);
            let mut decoder = Decoder::new().unwrap();
            let image = decoder.open(&bytes).unwrap();
            let part = decoder.decode_region(&image, Region::whole(300, 333), (target, target)).unwrap();
            hasher.update(part.picture.values());
        }
        hasher.finalize().to_hex()[..16].to_owned()
    };
    assert_eq!(digest(), "0dc0d16f4c89d32f");
    let slower = ["JSIMD_FORCENONE", "JSIMD_FORCESSE2"];
    if slower.iter().any(|name| std::env::var_os(name).is_some()) {
        return;
    }
    for plain in slower {
        let name = "decode::tests::decoding_is_stable_between_releases_and_instruction_sets";
        let again = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(plain, "1")
            .output()
            .unwrap();
        assert!(again.status.success(), "{plain}: {}", String::from_utf8_lossy(&again.stdout));
    }
}
