//! Gradients from GPU to GPU over NCCL.
//!
//! Everything here is compiled on every machine and loaded on none until a group asks for NCCL: a host without a
//! GPU starts without any CUDA library. Without one, the choice of libraries, the choice of backend
//! and the geometry of the pieces are tested.
//!
//! ```text
//! choose       which ranks may use NCCL, from their devices' names
//! Library      the process's one libnccl, the one that libtorch_cuda brought
//! Device, Stream, Event     CUDA's driver, as far as it is needed
//! NcclComm     one communicator per generation, beside the generation's Group
//! NcclWork     an all-reduce in flight
//! ```
//!
//! NCCL knows neither tags nor ranks at fault nor deadlines. So the [`Group`](crate::Group) of the same ranks
//! stays the judge of who is alive: every wait for NCCL asks it, has the job's time-out, and ends with
//! `ncclCommAbort`. All ranks must start the same reductions in the same order.
//!
//! **Exact reduction.** NCCL's own sum depends on how it splits the data, so in an exact group it only carries.
//! Each rank receives every rank's nodes for its share of the elements, adds them in the tree's order, and sends
//! the sums around, which takes as many bytes as NCCL's all-reduce where every rank has one node.
#![allow(unsafe_code)]

mod choice;
mod comm;
mod cuda;
mod error;
mod library;
mod pieces;
mod reduce;

pub use choice::{Choice, RankDevice, choose};
pub use comm::{NcclComm, UniqueId};
pub use cuda::{Device, Event, Stream};
pub use error::NcclError;
pub use library::Library;
pub use reduce::{Add, DeviceElement, NcclWork, Nodes};
