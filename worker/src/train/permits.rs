//! How many lanes compute at a time.
//!
//! A worker of T threads runs at most T lanes at once, though it may own more: each then runs from one exchange
//! to the next with the core's cache to itself. A lane gives its permit back while it waits for peers.

use parking_lot::{Condvar, Mutex};

pub(crate) struct Permits {
    free: Mutex<usize>,
    returned: Condvar,
}

impl Permits {
    pub(crate) fn new(threads: usize) -> Self {
        Self { free: Mutex::new(threads), returned: Condvar::new() }
    }

    /// Runs `work` with a permit, which is given back also when it panics.
    pub(crate) fn with<T>(&self, work: impl FnOnce() -> T) -> T {
        struct Held<'a>(&'a Permits);
        impl Drop for Held<'_> {
            fn drop(&mut self) {
                self.0.release();
            }
        }
        self.acquire();
        let _held = Held(self);
        work()
    }

    /// Waits for a permit.
    pub(crate) fn acquire(&self) {
        let mut free = self.free.lock();
        while *free == 0 {
            self.returned.wait(&mut free);
        }
        *free -= 1;
    }

    /// Gives one back.
    pub(crate) fn release(&self) {
        *self.free.lock() += 1;
        self.returned.notify_one();
    }

    /// Runs `wait` without the permit that the caller holds.
    pub(crate) fn without<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.release();
        let result = wait();
        self.acquire();
        result
    }
}
