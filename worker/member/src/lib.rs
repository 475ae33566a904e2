//! A worker's side of membership, without its input and output: which session runs, what is kept of a job, whom to
//! follow, when to leave.
//!
//! [`Member`] is a state machine. Events go in through `handle_*`, what has to be done comes out of
//! [`Member::poll_action`], in an order that must be kept. The time is an argument, in milliseconds of a clock that never
//! runs backwards; [`Member::poll_timeout`] says when it wants to be told of it. The machine knows neither sockets, files,
//! clocks nor threads, nor libtorch, so that any sequence of events can be tried on it.
//!
//! Orders of a generation older than the newest seen of a job are refused here: a worker that slept through a change of
//! membership cannot be called back into the old one.

mod action;
mod lease;
mod leaving;
mod member;

pub use action::{Action, Leave, Refused, Start};
pub use leaving::{AWAY_PATIENCE_MS, BOUNDARY_PATIENCE_MS};
pub use member::Member;
