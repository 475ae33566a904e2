//! Training state on its way from worker to worker.
//!
//! A rank that is behind fetches the state from those that hold it ([`heal`]); a worker that wants to join fetches a copy of
//! a running job's state and applies the updates that the members make ([`follow`]). On the other side each session has
//! a [`desk`], at which visitors ask; the [`station`] lets them in.
//!
//! The state travels in chunks, each with its hash in a [`pack::Manifest`] that all sources must agree on.

pub(crate) mod desk;
pub(crate) mod fetch;
pub(crate) mod follow;
pub(crate) mod heal;
pub(crate) mod message;
pub(crate) mod pack;
pub(crate) mod station;
pub(crate) mod update;

#[cfg(test)]
mod tests;
