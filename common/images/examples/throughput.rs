//! How many JPEGs one thread decodes and crops to 224 × 224 a second: our side of `make bench-loader`.
//!
//! `throughput FOLDER ROUNDS` reads all files of the folder first, then prepares each once per round, and prints the
//! images per second of every round, one a line.

use lockstep_common::job::Augment;
use lockstep_common::rng::Stream;
use lockstep_images::{Pipeline, Source, Workbench};
use std::hint::black_box;
use std::time::Instant;

type Failure = Box<dyn std::error::Error>;

#[allow(clippy::print_stdout, reason = "its output is what it is for")]
fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), Some(rounds)) = (arguments.next(), arguments.next()) else {
        return Err("usage: throughput FOLDER ROUNDS".into());
    };
    let mut paths: Vec<_> =
        std::fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect::<Result<_, Failure>>()?;
    paths.sort();
    let images = paths.iter().map(std::fs::read).collect::<Result<Vec<_>, _>>()?;
    let crop = Augment::RandomResizedCrop { size: 224, area: [0.08, 1.0], aspect: [3.0 / 4.0, 4.0 / 3.0] };
    let pipeline = Pipeline::new(Some(3), vec![crop]);
    let mut bench = Workbench::new()?;
    for round in 0..rounds.parse()? {
        let started = Instant::now();
        for (i, image) in images.iter().enumerate() {
            let mut stream = Stream::new(1, "augment", &[round, i as u64]);
            black_box(pipeline.run(&mut bench, Source::Encoded(image), &mut stream)?);
        }
        println!("{:.1}", images.len() as f64 / started.elapsed().as_secs_f64());
    }
    Ok(())
}
