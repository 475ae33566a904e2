//! Networks: variables, layers (synchronized batch norm among them), losses, optimizers and the architectures.
//!
//! This crate knows no sockets. Whatever crosses logical shards goes through
//! [`BatchNormSync`](forward::BatchNormSync) and through the gradients that [`shim::on_gradient`] hands out.
//!
//! One logical shard is one thread with one intra-op thread and a graph of its own over a
//! [`replica`](vars::Vars::replica) of the master variables, so its bits do not depend on which worker computes
//! it or what else runs there.

pub mod bytes;
pub mod checksum;
pub mod error;
pub mod forward;
pub mod init;
pub mod layers;
pub mod loss;
pub mod models;
pub mod moments;
pub mod optim;
pub mod schedule;
pub mod shim;
pub mod vars;
pub mod weights;

pub use error::NnError;
