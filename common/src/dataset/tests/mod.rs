//! Tests on real files: IDX in, shards and samples out.

mod cache;
mod import;
mod sources;
mod whitening;

use super::{ImportOutcome, Manifest, Store};
use std::io::Write;
use std::path::Path;
use tempfile::TempDir;

/// Side of a test image: a shard of 4 MiB then holds 64 of them.
const SIDE: u32 = 256;
const PIXELS: usize = (SIDE * SIDE) as usize;

/// A store in a folder that lives as long as the test.
struct Fixture {
    dir: TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { dir, store }
    }

    /// With `samples` images imported as `d/train`.
    fn with_dataset(samples: u32) -> (Self, Manifest) {
        let fixture = Self::new();
        let source = fixture.source("source");
        write_pair(&source, "train", samples, Compression::Plain);
        let outcome = fixture.import(&source).remove(0);
        (fixture, outcome.manifest().clone())
    }

    fn source(&self, name: &str) -> std::path::PathBuf {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn import(&self, source: &Path) -> Vec<ImportOutcome> {
        self.store.import_idx("d", source, |_| ()).unwrap()
    }
}

#[derive(Clone, Copy)]
enum Compression {
    Plain,
    Gzip,
}

/// Image `i` has label `i % 10`; its pixels depend on `i` and the place.
fn pixel(i: u32, at: usize) -> u8 {
    (i as usize * 31 + at * 7 + at / 251) as u8
}

fn images(samples: u32) -> Vec<u8> {
    let mut out = vec![0, 0, 8, 3];
    for size in [samples, SIDE, SIDE] {
        out.extend(size.to_be_bytes());
    }
    out.extend((0..samples).flat_map(|i| (0..PIXELS).map(move |at| pixel(i, at))));
    out
}

fn labels(samples: u32) -> Vec<u8> {
    let mut out = vec![0, 0, 8, 1];
    out.extend(samples.to_be_bytes());
    out.extend((0..samples).map(|i| (i % 10) as u8));
    out
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn write_pair(dir: &Path, prefix: &str, samples: u32, compression: Compression) {
    for (stem, content) in [("images-idx3", images(samples)), ("labels-idx1", labels(samples))] {
        let plain = dir.join(format!("{prefix}-{stem}-ubyte"));
        match compression {
            Compression::Plain => std::fs::write(plain, content).unwrap(),
            Compression::Gzip => std::fs::write(plain.with_extension("gz"), gzip(&content)).unwrap(),
        }
    }
}

/// Flips one bit in the middle of a file.
fn flip(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn truncate(path: &Path, by: usize) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() - by]).unwrap();
}
