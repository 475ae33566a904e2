//! Memory shared by ranks of one host.
//!
//! ```text
//! reduction   large reductions, in place
//! neighbours  who reads the rings, and when
//! meeting     how the ranks of a host find each other
//! introduce   two processes swap descriptors over a Unix socket, and each learns at once when the other dies
//! ring        frames one way between two ranks, copied in and out
//! arena       a rank's large allocation, which its peers map: payloads are read and written where they lie
//! doorbell    one word per rank by which its peers wake it
//! segment     a mapped memory file, which the three above live in
//! ```
//!
//! Everything lives in memory files without a name: the kernel frees them with the last process that maps them,
//! so that a killed rank leaves nothing behind.
//!
//! **Trust.** A peer has proven itself over the cluster's TLS and runs as the same user, so it could do to this
//! process what it likes by other means. What it writes is nevertheless checked wherever it is used as a
//! cursor, a length or a size: a defect over there must end in an error here, not in a crash. Payloads are plain
//! numbers; a peer that changes them while they are read makes wrong numbers, which the replicas' digests show.

#![allow(unsafe_code)]

mod arena;
mod doorbell;
mod introduce;
mod meeting;
mod neighbours;
mod reduction;
mod ring;
mod segment;
#[cfg(test)]
mod tests;

pub(crate) use arena::Block;
pub(crate) use meeting::{in_process, share};
pub(crate) use neighbours::{Neighbours, Waited};
pub(crate) use reduction::{Circle, Goal, HostReduction, Hosts, Mates};
