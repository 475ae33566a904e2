//! Tests of the core as a whole, against a simulated cluster.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod endings;
mod flight;
mod joining;
mod misfortunes;
mod random;
mod scenarios;
mod world;
