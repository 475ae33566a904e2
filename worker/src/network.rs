//! The threads that move bytes.

use anyhow::{Context, Result};
use std::num::NonZero;
use std::thread::available_parallelism;
use tokio::runtime::{Builder, Runtime};

/// The most threads that are of use: a connection's packets pass through two tasks, one per socket and one per connection.
const MOST_THREADS: usize = 2;

/// The runtime of a worker's network.
///
/// It has a thread for every two cores. With more, the threads of the ranks of a small machine wait for each other's
/// cores and caches: on two cores a large all-reduce of two ranks takes a tenth longer.
pub(crate) fn runtime() -> Result<Runtime> {
    let cores = available_parallelism().map_or(1, NonZero::get);
    Builder::new_multi_thread()
        .worker_threads((cores / 2).clamp(1, MOST_THREADS))
        .thread_name("network")
        .enable_all()
        .build()
        .context("cannot start the network threads")
}
