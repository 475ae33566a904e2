//! `lockstep-sim`: runs seeds of the simulation, or shows what happens in one.

use clap::Parser;
use lockstep_sim::{Plan, run_traced, try_seeds};
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

/// Lives through many simulated days of a cluster, each drawn from a seed.
#[derive(Parser)]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 2_000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Only this seed, with all that happens.
    #[arg(long)]
    trace: Option<u64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut out = std::io::stdout().lock();
    let result = match args.trace {
        Some(seed) => trace(seed, &mut out),
        None => all(&args, &mut out),
    };
    // Whoever reads may have gone away.
    result.unwrap_or(ExitCode::FAILURE)
}

fn trace(seed: u64, out: &mut impl Write) -> std::io::Result<ExitCode> {
    let report = run_traced(Plan { seed, breakage: None });
    for line in &report.lines {
        writeln!(out, "{line}")?;
    }
    let breach = report.breach.as_deref();
    writeln!(out, "seed {seed}: {}; trace {}", breach.unwrap_or("all is well"), report.trace_hash)?;
    Ok(if breach.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn all(args: &Args, out: &mut impl Write) -> std::io::Result<ExitCode> {
    let started = Instant::now();
    let verdict = try_seeds(args.from..args.from + args.seeds);
    for failure in &verdict.failures {
        writeln!(out, "seed {}: {}", failure.plan.seed, failure.breach.as_deref().unwrap_or_default())?;
    }
    writeln!(
        out,
        "{} seeds in {:.1} s, {} failed; {} events, {} generations, {} steps done again, {:.1} simulated hours",
        verdict.seeds,
        started.elapsed().as_secs_f64(),
        verdict.failures.len(),
        verdict.events,
        verdict.generations,
        verdict.recomputed,
        verdict.simulated_ms as f64 / 3.6e6,
    )?;
    Ok(if verdict.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
