//! `worker bench allreduce`: times all-reduces between real processes over real links.
//!
//! The process that a person starts leads. Every rank is a process of its own, `worker bench rank`, which hears what
//! to do on its standard input and answers on its standard output; the ranks of a second host are led over a QUIC
//! connection that carries the same bytes. Rank to rank they speak as the ranks of a job do: one group per backend
//! under compare, inside the certificate authority of this one run.

mod args;
mod lead;
mod measure;
mod peer;
mod rank;
mod report;
mod talk;
mod wire;

pub(crate) use args::AllreduceArgs;

use crate::cli::BenchCommand;
use crate::network;
use anyhow::Result;

/// Runs a benchmark to its end.
pub(crate) fn run(command: BenchCommand) -> Result<()> {
    let runtime = network::runtime()?;
    match command {
        BenchCommand::Rank => rank::run(&runtime),
        BenchCommand::Allreduce(args) => {
            args.check();
            match &args.peer {
                Some(leader) => runtime.block_on(peer::follow(leader, &args)),
                None => runtime.block_on(lead::lead(&args)),
            }
        }
    }
}
