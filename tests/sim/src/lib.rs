//! A whole cluster in one thread, so that thousands of unlucky days can be tried, and each of them again.
//!
//! The coordinator's core and the workers' membership are the real ones. The network, the disks, the clocks, the
//! processes around them and the training are modelled here, and everything that a real cluster leaves to chance is drawn
//! from one seed. [`run`] lives through one seed and returns what became of it; [`judge`] says what must hold meanwhile.

mod chain;
mod chaos;
mod cluster;
mod fetch;
mod group;
mod hub;
mod judge;
mod network;
mod outbox;
mod plan;
mod process;
mod scheduler;
mod seeds;
mod store;
mod trace;
mod training;
mod words;

pub use cluster::{Report, run, run_traced};
pub use plan::{Breakage, Plan};
pub use seeds::{Verdict, first_failure, try_seeds};
