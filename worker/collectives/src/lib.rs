//! How the ranks of one generation of one job combine what they computed.
//!
//! A [`Group`] is one rank's handle on the others. Its collectives are asynchronous: they return a [`Pending`]
//! at once, several are in flight in any order, and each is told from the others by its [`Tag`].
//!
//! ```text
//! Group          tags, checks, what the caller sees
//!   Engine       which collectives are in flight, early frames, the first cause of a failure
//!     Gather         small payloads, bytes, barriers: everyone sends to everyone, half a round trip
//!     Doubling       small payloads and barriers of more than 64 ranks: log2 W rounds, each twice the last one's size
//!     Chunked        large reductions between hosts: reduce-scatter and all-gather in pieces, reducing while receiving
//!     HostReduction  large reductions within a host, in memory that its ranks share; between hosts it hands on to Chunked
//!   Transport    moves frames between ranks: in this process, through rings in shared memory, or over QUIC
//! ```
//!
//! **Exact reduction.** The logical shards are the leaves of one fixed binary tree ([`tree`]). A rank reduces
//! the whole subtrees it owns, the ranks exchange those nodes, and whoever combines them does so in the tree's
//! order: the sum's bits depend neither on the number of ranks nor on which shards they own. Only the payload
//! bits of a NaN are left open, as IEEE 754 leaves them.
//!
//! This crate never knows models, libtorch or the coordinator.

mod buffer;
mod chunked;
mod doubling;
mod ends;
mod engine;
mod error;
mod flight;
pub mod formats;
mod frame;
mod gather;
mod group;
mod inquiry;
mod local;
pub mod nccl;
mod numbers;
mod op;
mod pending;
mod progress;
pub mod quic;
mod shm;
mod tag;
#[cfg(test)]
mod tests;
mod transport;
pub mod tree;

pub use engine::Stats;
pub use error::{CollectiveError, Moment};
pub use flight::{FlightSnapshot, Past, Waiting};
pub use group::Group;
pub use numbers::Numbers;
pub use op::{Element, ReduceOp};
pub use pending::Pending;
pub use tag::{Tag, TagKind};
