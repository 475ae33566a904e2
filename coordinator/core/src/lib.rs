//! The coordinator's decisions, without its input and output: membership, generations, queue, placement, recovery.
//!
//! [`Core`] is a state machine. Events go in through `handle_*` and commands, what has to be done comes out of
//! [`Core::poll_action`], in an order that must be kept: a `Persist…` is durable before the actions
//! behind it are carried out. The time is an argument, in milliseconds of a clock that never runs backwards. The
//! core knows neither sockets, files, clocks nor randomness, so that any sequence of events can be tried on it.

mod addresses;
mod bench;
mod cause;
mod core;
mod decide;
mod flight;
mod generation;
mod jobs;
mod joining;
mod pace;
mod presence;
mod record;
mod recovery;
mod start;
mod stragglers;
mod words;
mod workers;

pub use crate::core::{Action, Config, Core, Reception, Restored};
pub use addresses::{Route, Way, routes};
pub use cause::{Cause, Gone, StartReason, Who};
pub use decide::{Decision, WaitReason, Waiting, decide};
pub use jobs::CommandError;
pub use record::{Ending, JobRecord, NewJob, WorkerRecord};
pub use workers::{Activity, WorkerView};
