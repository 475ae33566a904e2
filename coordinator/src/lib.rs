//! The coordinator's shell around `lockstep-core`: QUIC, HTTP, the durable store, the command line.
//!
//! [`service::Service`] is the running coordinator, the same for `coordinator serve` and, embedded, for
//! `coordinator run`. [`commands`] is what a person types. Nothing here knows libtorch.

mod audit_log;
pub mod cli;
pub mod client;
pub mod commands;
pub mod data_dir;
mod jobs_dir;
pub mod metrics;
mod output;
mod run;
pub mod service;
pub mod store;
