//! The threads that decode and augment, beside those that train.

use crate::train::error::TrainError;
use lockstep_images::Workbench;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::cell::RefCell;

/// Threads that prepare samples. Who waits for them does nothing else meanwhile.
#[derive(Debug)]
pub(crate) struct Pool(ThreadPool);

impl Pool {
    /// One of `threads` threads.
    pub(crate) fn new(threads: usize) -> Result<Self, TrainError> {
        let builder =
            ThreadPoolBuilder::new().num_threads(threads.max(1)).thread_name(|i| format!("decode-{i}"));
        let pool = builder.build();
        pool.map(Self).map_err(|e| TrainError::Fatal(format!("cannot start the threads that decode: {e}")))
    }

    /// Runs `work`, whose parallel parts run on these threads.
    pub(crate) fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.0.install(work)
    }
}

thread_local! {
    static BENCH: RefCell<Option<Workbench>> = const { RefCell::new(None) };
}

/// Runs `work` with this thread's memory for decoding.
pub(super) fn with_bench<R>(
    work: impl FnOnce(&mut Workbench) -> Result<R, TrainError>,
) -> Result<R, TrainError> {
    BENCH.with_borrow_mut(|bench| {
        let bench = match bench {
            Some(bench) => bench,
            None => bench.insert(Workbench::new().map_err(|e| TrainError::Fatal(e.to_string()))?),
        };
        work(bench)
    })
}
