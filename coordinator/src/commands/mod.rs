//! The commands, and the one place where errors become exit codes.

mod audit;
mod checkpoint;
mod dataset;
mod flight;
mod queue;
mod serve;
mod token;

pub(crate) use queue::JobReport;

use crate::cli::{Cli, Command};
use crate::data_dir::DataDir;
use crate::output::{note, unsaid};
use crate::run;
use anyhow::{Context, Result};
use lockstep_common::one_line::one_line;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Runs the command line.
pub fn main(cli: Cli) -> ExitCode {
    let code = match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            note(format_args!("error: {}", one_line(error.chain())));
            ExitCode::FAILURE
        }
    };
    match unsaid() {
        None => code,
        Some(error) => {
            note(format_args!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode> {
    let root = cli.data_dir.map_or_else(default_data_dir, Ok)?;
    let dir = DataDir::open(&root)?;
    start_logging(if matches!(cli.command, Command::Serve(_)) { "info" } else { "error" });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()
        .context("cannot start the network threads")?;
    let result = match cli.command {
        Command::Run(args) => runtime.block_on(run::run(dir, args)),
        Command::Serve(args) => runtime.block_on(serve::serve(dir, &args)).map(done),
        Command::Token(command) => runtime.block_on(token::run(&dir, &command)).map(done),
        Command::Login { coordinator, token } => {
            runtime.block_on(token::login(&dir, &coordinator, &token)).map(done)
        }
        Command::Dataset(command) => dataset::run(&dir, command),
        Command::Checkpoint(command) => checkpoint::run(&dir, command),
        Command::Audit { job, samples, json } => audit::run(&dir, job, samples, json.json),
        Command::Submit { job, json } => runtime.block_on(queue::submit(&dir, &job, json.json)).map(done),
        Command::Jobs { json } => runtime.block_on(queue::jobs(&dir, json.json)).map(done),
        Command::Status { job, json } => runtime.block_on(queue::status(&dir, job, json.json)).map(done),
        Command::Logs { job, follow, json } => {
            runtime.block_on(queue::logs(&dir, job, follow, json.json)).map(done)
        }
        Command::Cancel { job, json } => runtime.block_on(queue::cancel(&dir, job, json.json)).map(done),
        Command::Pause { job, json } => runtime.block_on(queue::pause(&dir, job, json.json)).map(done),
        Command::Resume { job, json } => runtime.block_on(queue::resume(&dir, job, json.json)).map(done),
        Command::Workers { json } => runtime.block_on(queue::workers(&dir, json.json)).map(done),
    };
    runtime.shutdown_background();
    result
}

fn done((): ()) -> ExitCode {
    ExitCode::SUCCESS
}

fn default_data_dir() -> Result<PathBuf> {
    let home =
        std::env::var_os("HOME").context("HOME is not set; say with --data-dir where to keep everything")?;
    Ok(PathBuf::from(home).join(".lockstep"))
}

/// Logs to standard error; `LOCKSTEP_LOG` says how much, in the syntax of `tracing`.
fn start_logging(level: &str) {
    let filter = EnvFilter::try_from_env("LOCKSTEP_LOG").unwrap_or_else(|_| {
        EnvFilter::new(format!("warn,lockstep_coordinator={level},lockstep_common={level}"))
    });
    // A second call, in tests, leaves the first in place.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .try_init();
}
