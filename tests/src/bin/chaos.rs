//! `make chaos`: real processes under a schedule of failures drawn from a seed.

use clap::{Parser, ValueEnum};
use lockstep_tests::chaos::schedule::Extent;
use lockstep_tests::chaos::workload::Workload;
use lockstep_tests::chaos::{Options, run};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Kills, stops and cuts off real processes in the midst of jobs; every job must end as if nothing had happened.
#[derive(Parser)]
struct Args {
    /// Of the schedule: one seed gives one schedule.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many events.
    #[arg(long, default_value_t = 60)]
    events: usize,
    /// For how many minutes there are events, instead of their number.
    #[arg(long)]
    minutes: Option<f64>,
    /// The mean time between events, in seconds.
    #[arg(long, default_value_t = 2.0)]
    mean_s: f64,
    /// What is trained meanwhile.
    #[arg(long, value_enum, default_value_t = Size::Demo)]
    jobs: Size,
    /// Keep all workers on this host, even as root.
    #[arg(long)]
    one_host: bool,
    /// Write the run as one JSON object.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    /// Small networks on a small dataset.
    Small,
    /// The demo's networks on Fashion-MNIST.
    Demo,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let extent = match args.minutes {
        Some(minutes) => Extent::Lasting(Duration::from_secs_f64(60.0 * minutes)),
        None => Extent::Events(args.events),
    };
    let workload = match args.jobs {
        Size::Small => Workload::Small,
        Size::Demo => Workload::Demo,
    };
    let mean = Duration::from_secs_f64(args.mean_s);
    let options = Options { seed: args.seed, extent, mean, workload, hosts: !args.one_host };
    let account = run(&options, &|line| eprintln!("{line}"));
    let mut written = write!(std::io::stdout(), "{account}");
    if let Some(path) = args.json {
        written = written.and(std::fs::write(path, format!("{:#}\n", account.json())));
    }
    match written {
        Ok(()) if account.is_good() => ExitCode::SUCCESS,
        Ok(()) => {
            eprintln!("all files of the run are in {}", account.stage.place.keep().display());
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}
