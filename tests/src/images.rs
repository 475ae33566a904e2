//! Image datasets for tests, made on the spot: CIFAR's files, folders, tar files.
//!
//! Classes differ by where a bright square stands, as in [`crate::data`].

use std::fs;
use std::path::Path;
use turbojpeg::{Compressor, Image, PixelFormat, Subsamp};

/// RGB pixels of an image of a class, row by row. Images of one class differ by `sample`.
pub fn pixels(sample: u32, class: u32, height: u32, width: u32) -> Vec<u8> {
    let mut values = Vec::new();
    for y in 0..height {
        for x in 0..width {
            let bright = y * 4 / height == class / 4 % 4 && x * 4 / width == class % 4;
            let noise = (sample.wrapping_mul(0x9e37_79b1) ^ (y * width + x).wrapping_mul(0x85eb_ca6b)) >> 27;
            let light = if bright { 200 } else { 20 + 100 * x / width } + noise;
            values.extend([light, light / 2 + 30, 255 - light].map(|v| v.min(255) as u8));
        }
    }
    values
}

/// RGB pixels as a JPEG.
pub fn jpeg(pixels: &[u8], height: u32, width: u32) -> Vec<u8> {
    let (height, width) = (height as usize, width as usize);
    let mut compressor = Compressor::new().expect("libjpeg-turbo");
    compressor.set_quality(90).expect("a quality");
    compressor.set_subsamp(Subsamp::Sub2x2).expect("a subsampling");
    let image = Image { pixels, width, pitch: width * 3, height, format: PixelFormat::RGB };
    compressor.compress_to_vec(image).expect("a JPEG")
}

/// RGB pixels as a PNG.
pub fn png(pixels: &[u8], height: u32, width: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().and_then(|mut writer| writer.write_image_data(pixels)).expect("a PNG");
    out
}

/// Image `sample` of `class`, every third a PNG, in sizes that differ.
pub fn encoded(sample: u32, class: u32) -> (&'static str, Vec<u8>) {
    let (height, width) = (24 + sample % 7, 20 + sample % 11);
    let pixels = pixels(sample, class, height, width);
    if sample % 3 == 2 { ("png", png(&pixels, height, width)) } else { ("jpg", jpeg(&pixels, height, width)) }
}

/// Writes CIFAR-10's six files with `per_file` images each, and the classes' names.
pub fn write_cifar10(folder: &Path, per_file: u32) {
    fs::create_dir_all(folder).expect("a folder");
    let files =
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"];
    for (number, file) in (0..).zip(files) {
        let samples = number * per_file..(number + 1) * per_file;
        fs::write(folder.join(file).with_extension("bin"), cifar(samples, &|class| vec![class]))
            .expect("a file");
    }
    let names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
    fs::write(folder.join("batches.meta.txt"), names.join("\n") + "\n\n").expect("the names");
}

/// Writes CIFAR-100's two files with `per_file` images each.
pub fn write_cifar100(folder: &Path, per_file: u32) {
    fs::create_dir_all(folder).expect("a folder");
    for (number, file) in (0..).zip(["train.bin", "test.bin"]) {
        let samples = number * per_file..(number + 1) * per_file;
        fs::write(folder.join(file), cifar(samples, &|class| vec![class / 5, class])).expect("a file");
    }
}

fn cifar(samples: std::ops::Range<u32>, labels: &dyn Fn(u8) -> Vec<u8>) -> Vec<u8> {
    let record = |sample: u32| {
        let class = sample % 10;
        let pixels = pixels(sample, class, 32, 32);
        let planes = (0..3).flat_map(|c| pixels.iter().skip(c).step_by(3).copied().collect::<Vec<_>>());
        labels(class as u8).into_iter().chain(planes).collect::<Vec<_>>()
    };
    samples.flat_map(record).collect()
}

/// Writes a folder per class into `folder`, with `per_class` images each.
pub fn write_classes(folder: &Path, classes: &[&str], per_class: u32, offset: u32) {
    for (class, name) in (0..).zip(classes) {
        let folder = folder.join(name);
        fs::create_dir_all(&folder).expect("a folder");
        for i in 0..per_class {
            let (extension, bytes) = encoded(offset + i * 10 + class, class);
            fs::write(folder.join(format!("{i:03}.{extension}")), bytes).expect("an image");
        }
    }
}

/// A tar file of members.
pub fn tar<'a>(members: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes).expect("a member");
    }
    builder.into_inner().expect("a tar file")
}

/// A tar file of samples, the label in `.cls` and in every fourth in `.json`.
pub fn tar_of_samples(samples: std::ops::Range<u32>, classes: u32) -> Vec<u8> {
    let mut members = Vec::new();
    for sample in samples {
        let class = sample % classes;
        let (extension, bytes) = encoded(sample, class);
        members.push((format!("{sample:06}.{extension}"), bytes));
        members.push(match sample % 4 {
            3 => (format!("{sample:06}.json"), format!("{{\"label\": {class}, \"width\": 20}}").into_bytes()),
            _ => (format!("{sample:06}.cls"), class.to_string().into_bytes()),
        });
        members.push((format!("{sample:06}.txt"), b"a caption, of no use here".to_vec()));
    }
    tar(members.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())))
}
