//! What the leader and its ranks say to each other, in the frames of `lockstep_common::wire`.

use super::args::Plan;
use lockstep_common::ids::{Rank, WorkerId};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// From a rank, in this order; `Failed` at any time.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromRank {
    /// Its key to be certified: the key itself never leaves the process.
    Hello { csr: Vec<u8> },
    /// Where it accepts other ranks.
    Listening { port: u16 },
    /// Nanoseconds of each all-reduce of one size and column.
    Measured { size: u32, column: u32, nanoseconds: Vec<u64> },
    /// All is measured.
    Finished,
    /// It gives up.
    Failed { message: String },
}

/// To a rank, in this order.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToRank {
    /// Its certificate, and the address to listen on.
    Enrolled { worker: WorkerId, certificate: Vec<u8>, ca: Vec<u8>, listen: IpAddr },
    /// Where all ranks are, and what to measure.
    Start { rank: Rank, addresses: Vec<SocketAddr>, plan: Plan },
}

/// The first words of a second host.
#[derive(Serialize, Deserialize)]
pub(super) struct Join {
    pub(super) secret: [u8; 32],
    /// How many ranks it brings, each on a stream of its own.
    pub(super) ranks: u32,
}

/// The answer.
#[derive(Serialize, Deserialize)]
pub(super) enum Welcome {
    Accepted,
    Refused(String),
}
