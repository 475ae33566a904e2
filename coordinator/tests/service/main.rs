//! Tests of the running coordinator over real QUIC, with workers and operators that speak the wire.

mod cluster;
mod durability;
mod enrolment;
mod jobs;
mod shards;
