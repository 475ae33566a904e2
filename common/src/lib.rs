//! What every Lockstep process shares: identifiers, the job file, the wire, datasets, checkpoints, TLS.
//!
//! This crate knows neither libtorch nor the command line. Everything here is deterministic or does plain
//! I/O; the training itself lives in `worker`, the scheduling decisions in `coordinator/core`.

pub mod audit;
pub mod checkpoint;
pub mod dataset;
pub mod device;
pub mod digest;
pub mod durable;
pub mod http;
pub mod ids;
pub mod job;
pub mod moments;
pub mod net;
pub mod one_line;
pub mod output;
pub mod placement;
pub mod product;
pub mod rng;
pub mod sampler;
pub mod shown;
pub mod suggest;
pub mod token;
pub mod wire;
