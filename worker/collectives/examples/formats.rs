//! How fast the wire formats convert and add, on one core: `cargo run --release -p lockstep-collectives --example
//! formats`. All figures are for 25 MB of `f32` gradients, whatever they travel as.

#![allow(clippy::print_stdout, reason = "a program that prints a table")]

use lockstep_collectives::formats::{Block8, bf16, f16, narrow, widen};
use lockstep_collectives::{Element, Group, ReduceOp, Tag, TagKind};
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;
use lockstep_common::rng::Stream;
use std::time::{Duration, Instant};

const LEN: usize = 25_000_000 / 4;
const ROUNDS: usize = 15;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut stream = Stream::new(1, "gradient", &[]);
    let values: Vec<f32> = (0..LEN).map(|_| stream.normal() as f32).collect();
    let mut back = vec![0f32; LEN];
    println!("{:<16} {:>9} {:>9}", "", "ms", "GB/s");

    time("f32 copy", || back.copy_from_slice(&values));
    let mut sums = values.clone();
    time("f32 add", || f32::add(&mut sums, &values));

    let mut narrowed = vec![bf16::ZERO; LEN];
    time("bf16 narrow", || narrow(&values, &mut narrowed));
    time("bf16 widen", || widen(&narrowed, &mut back));
    let mut sums = narrowed.clone();
    time("bf16 add", || bf16::add(&mut sums, &narrowed));

    let halves: Vec<f16> = values.iter().copied().map(f16::from_f32).collect();
    let mut sums = halves.clone();
    time("f16 add", || f16::add(&mut sums, &halves));

    let mut residual = vec![0f32; LEN];
    let mut blocks = vec![bytemuck::Zeroable::zeroed(); LEN.div_ceil(Block8::LEN)];
    time("int8 quantise", || Block8::quantise(&values, &mut residual, &mut blocks));
    time("int8 dequantise", || Block8::dequantise(&blocks, &mut back));
    let mut sums = blocks.clone();
    time("int8 add", || Block8::add(&mut sums, &blocks));

    println!("\n{:<16} {:>9}", "", "bytes sent by each of 2 ranks");
    println!("{:<16} {:>9}", "f32", sent(&values)?);
    println!("{:<16} {:>9}", "bf16", sent(&narrowed)?);
    println!("{:<16} {:>9}", "int8", sent(&blocks)?);
    Ok(())
}

/// Prints the median time of `work` over [`LEN`] numbers.
fn time(name: &str, mut work: impl FnMut()) {
    let mut seconds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    let median = seconds[ROUNDS / 2];
    println!("{name:<16} {:>9.2} {:>9.2}", median * 1e3, (LEN * 4) as f64 / median * 1e-9);
}

/// What a rank sends in an all-reduce of `leaf` with one other.
fn sent<T: Element>(leaf: &[T]) -> Result<u64, Box<dyn std::error::Error>> {
    let groups = Group::in_process(&Placement::even(2, 2), Reduction::Exact, Duration::from_secs(30))?;
    let tag = Tag::new(0, 0, TagKind::Gradient);
    let start = |group: &Group| group.all_reduce(tag, vec![leaf.to_vec()], ReduceOp::Sum);
    let pending = groups.iter().map(start).collect::<Result<Vec<_>, _>>()?;
    for pending in pending {
        pending.wait()?;
    }
    Ok(groups[0].stats().bytes_sent)
}
