//! Tests of the core as a whole, against a simulated cluster.

mod random;
mod scenarios;
mod world;
