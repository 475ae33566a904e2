//! The `coordinator` program.

use clap::Parser;
use lockstep_coordinator::{cli::Cli, commands};
use std::process::ExitCode;

fn main() -> ExitCode {
    commands::main(Cli::parse())
}
