//! Tests of the running coordinator over real QUIC, with workers and operators that speak the wire.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod cluster;
mod durability;
mod enrolment;
mod jobs;
mod shards;
mod store;
