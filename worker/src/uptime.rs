//! The time since this host's start. It goes on while the host is suspended, as the clocks of the others do.

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// How long the host has run.
pub(crate) fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}
