//! Datasets for tests: a small one made on the spot, and the real Fashion-MNIST.

use std::fs;
use std::path::{Path, PathBuf};

/// Writes IDX files of `train` and `test` images of `side` × `side` pixels into `folder`.
///
/// The ten classes differ by where a bright square stands on a noisy ground, so a few steps of training show.
pub fn write_idx(folder: &Path, train: u32, test: u32, side: u32) {
    fs::create_dir_all(folder).expect("the folder of the dataset");
    for (split, count, offset) in [("train", train, 0), ("t10k", test, train)] {
        let (mut images, mut labels) = (header(0x803, &[count, side, side]), header(0x801, &[count]));
        for sample in offset..offset + count {
            let label = sample.wrapping_mul(7) % 10;
            labels.push(label as u8);
            images
                .extend((0..side * side).map(|pixel| shade(sample, label, pixel / side, pixel % side, side)));
        }
        fs::write(folder.join(format!("{split}-images-idx3-ubyte")), images).expect("images");
        fs::write(folder.join(format!("{split}-labels-idx1-ubyte")), labels).expect("labels");
    }
}

fn header(magic: u32, sizes: &[u32]) -> Vec<u8> {
    [&[magic], sizes].concat().iter().flat_map(|n| n.to_be_bytes()).collect()
}

fn shade(sample: u32, label: u32, row: u32, column: u32, side: u32) -> u8 {
    let cell = (side / 4).max(1);
    let bright = row / cell == label / 4 && column / cell == label % 4;
    let mixed = (sample.wrapping_mul(0x9e37_79b1) ^ (row * side + column).wrapping_mul(0x85eb_ca6b))
        .wrapping_mul(0xc2b2_ae35);
    let noise = (mixed >> 26) as u8;
    if bright { 190 + noise } else { noise }
}

/// The folder of the real Fashion-MNIST.
pub fn fashion_mnist() -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folders = [
        std::env::var_os("FASHION_MNIST").map(PathBuf::from),
        Some(PathBuf::from("/usr/share/datasets/fashion-mnist")),
        Some(repository.join(".deps/fashion-mnist")),
    ];
    let complete = |folder: &PathBuf| {
        ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
            .iter()
            .all(|file| folder.join(file).is_file() || folder.join(format!("{file}.gz")).is_file())
    };
    folders.into_iter().flatten().find(complete).expect(
        "Fashion-MNIST is not on this machine: run `make data`, or export FASHION_MNIST with its folder",
    )
}
