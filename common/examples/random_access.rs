//! How many samples a second a worker reads in random order from a dataset that is larger than the memory it may take.
//!
//! `random_access FOLDER SAMPLES SAMPLE_BYTES MEMORY_BYTES THREADS` makes a dataset of samples of random bytes in the
//! folder, reads every sample once in a random order, then again in another, and prints for each time the samples per
//! second. Nothing is decoded: what is left is the cost of the store.

use lockstep_common::dataset::{
    ChannelSums, DatasetReader, ImageFacts, ImageImport, InspectImage, SampleSize, ShardCache, SourceFormat,
    Store,
};
use lockstep_common::rng::Stream;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

type Failure = Box<dyn std::error::Error>;

/// Takes any bytes for an image.
struct Anything;

impl InspectImage for Anything {
    fn inspect(&self, _: &[u8]) -> Result<ImageFacts, String> {
        let sums = ChannelSums { count: 1, sum: 1, squares: 1 };
        Ok(ImageFacts { size: SampleSize { height: 1, width: 1 }, sums: [sums; 3] })
    }
}

#[allow(clippy::print_stdout, reason = "its output is what it is for")]
fn main() -> Result<(), Failure> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [folder, samples, sample_bytes, memory_bytes, threads] = arguments.as_slice() else {
        return Err("usage: random_access FOLDER SAMPLES SAMPLE_BYTES MEMORY_BYTES THREADS".into());
    };
    let folder = Path::new(folder);
    let source = folder.join("source.tar");
    write_tar(&source, samples.parse()?, sample_bytes.parse()?)?;
    let store = Store::open(&folder.join("store"))?;
    let images = ImageImport { inspect: &Anything, skip_corrupt: false, classes_of: None };
    store.import("random", SourceFormat::WebDataset, &source, images, |_| ())?;
    std::fs::remove_file(&source)?;

    let cache = ShardCache::new(&folder.join("cache"), 0)?
        .with_local([store.shards_dir().to_path_buf()])
        .with_memory_bytes(memory_bytes.parse()?);
    let reader = DatasetReader::new(Arc::new(store.manifest("random")?), Arc::new(cache))?;
    for epoch in 0..2 {
        let order = Stream::new(1, "order", &[epoch]).permutation(reader.len());
        let next = AtomicU64::new(0);
        let started = Instant::now();
        std::thread::scope(|scope| -> Result<(), Failure> {
            let read = || -> Result<(), String> {
                while let Some(sample) = order.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    black_box(reader.sample(*sample).map_err(|e| e.to_string())?.bytes());
                }
                Ok(())
            };
            let threads: Vec<_> = (0..threads.parse()?).map(|_| scope.spawn(read)).collect();
            for thread in threads {
                thread.join().map_err(|_| "a thread panicked")??;
            }
            Ok(())
        })?;
        println!("{:.0}", order.len() as f64 / started.elapsed().as_secs_f64());
    }
    Ok(())
}

/// A tar file of samples of random bytes, all of class 0.
fn write_tar(path: &Path, samples: u64, sample_bytes: usize) -> Result<(), Failure> {
    let mut builder = tar::Builder::new(std::fs::File::create(path)?);
    let mut bytes = vec![0; sample_bytes];
    for sample in 0..samples {
        Stream::new(1, "sample", &[sample]).fill_bytes(&mut bytes);
        for (extension, content) in [("jpg", bytes.as_slice()), ("cls", b"0")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, format!("{sample:08}.{extension}"), content)?;
        }
    }
    builder.finish()?;
    Ok(())
}
