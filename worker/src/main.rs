//! The `worker` program: joins a cluster and trains what its coordinator assigns.

mod agent;
mod bench;
mod cli;
mod commands;
mod control;
mod data;
mod evaluation;
mod fault;
mod flight;
mod identity;
mod kept;
mod lease;
mod ledger;
mod mesh;
mod metrics;
mod models;
mod network;
mod pace;
mod report;
mod session;
mod state;
mod tasks;
mod train;
mod uptime;
mod weights;

use clap::Parser;
use lockstep_common::one_line::one_line;
use std::io::IsTerminal;
use std::process::ExitCode;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("LOCKSTEP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
    if let Err(error) = fault::arm() {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    let result = match cli::Cli::parse().command {
        cli::Command::Join(args) => match agent::prepare(&args) {
            Ok(()) => agent::join(*args),
            Err(error) => {
                eprintln!("error: {}", one_line(error.chain()));
                return ExitCode::from(2);
            }
        },
        cli::Command::Bench(command) => bench::run(command),
        cli::Command::Eval(args) => commands::eval(&args),
        cli::Command::Predict(args) => commands::predict(&args),
        cli::Command::Models { json } => models::list(json),
        cli::Command::Weights { file } => weights::describe(&file),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(error.chain()));
            ExitCode::FAILURE
        }
    }
}
