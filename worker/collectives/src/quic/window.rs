//! How much a peer may send ahead of what has been read from it.
//!
//! What is on its way fills caches: a window of several megabytes on a short link means that every byte is fetched from
//! main memory at each step from the socket to the result, which costs a fifth of the time of a large all-reduce. A long
//! link needs such a window. So the windows that a connection begins with suit any link, and the connection's own is
//! then fitted to the shortest round trip that has been seen.

use super::pace;
use lockstep_common::net;
use parking_lot::Mutex;
use std::time::Duration;

/// The largest windows of a stream and, beyond it, of the connection, which must not be blocked by a full bulk lane.
const STREAM_BYTES: u32 = 4 << 20;
const SPARE_BYTES: u32 = 2 << 20;

/// The smallest of either.
const LEAST_BYTES: u32 = 128 << 10;

/// What may be on its way over the shortest link: 8 ms at 1 Gbit/s, and half of a core's second-level cache or less.
const SHORT_BYTES: u32 = 1 << 20;

/// What one core reads, decrypts and adds in a second, at most: as many bytes fill a round trip.
const BYTES_PER_SECOND: f64 = 1e9;

/// The windows that a connection begins with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Windows {
    pub(super) stream: u32,
    pub(super) connection: u32,
}

impl Windows {
    /// Together half of the receive buffer that the kernel grants: a larger one overruns it, and the losses cost a factor
    /// of two to four.
    pub(super) fn largest() -> Self {
        // Without a socket there are no connections either, which `bind` reports.
        let buffer = net::receive_buffer_bytes().unwrap_or_default() as u64;
        let third = u32::try_from(buffer / 2 / 3).unwrap_or(u32::MAX);
        let stream = (2 * third).clamp(LEAST_BYTES, STREAM_BYTES);
        Self { stream, connection: stream + third.clamp(LEAST_BYTES, SPARE_BYTES) }
    }

    /// The connection's window over a link with this round trip.
    fn fitting(self, round_trip: Duration) -> u32 {
        let fills = round_trip.as_secs_f64() * BYTES_PER_SECOND;
        (f64::from(SHORT_BYTES) + fills).min(f64::from(self.connection)) as u32
    }
}

/// A connection's receive window as it changes.
pub(super) struct ReceiveWindow {
    connection: quinn::Connection,
    largest: Windows,
    state: Mutex<State>,
}

struct State {
    /// How many lanes are not read for now.
    paused: u32,
    now: u32,
}

impl ReceiveWindow {
    /// The window of a connection that has begun with the `largest` one.
    pub(super) fn new(connection: quinn::Connection, largest: Windows) -> Self {
        let window =
            Self { connection, largest, state: Mutex::new(State { paused: 0, now: largest.connection }) };
        window.fit();
        window
    }

    /// Fits the window to the round trip that is known by now.
    pub(super) fn fit(&self) {
        self.set(&mut self.state.lock());
    }

    /// While a lane is not read the other must not be blocked: until the result is dropped, the window is the largest.
    pub(super) fn pause(&self) -> Pause<'_> {
        let mut state = self.state.lock();
        state.paused += 1;
        self.set(&mut state);
        Pause(self)
    }

    fn set(&self, state: &mut State) {
        let wanted = match state.paused {
            0 => self.largest.fitting(pace::round_trip(&self.connection)),
            _ => self.largest.connection,
        };
        if wanted != state.now {
            state.now = wanted;
            self.connection.set_receive_window(wanted.into());
        }
    }
}

/// A lane that is not read for now.
pub(super) struct Pause<'a>(&'a ReceiveWindow);

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.paused -= 1;
        self.0.set(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_link_gets_a_small_window_and_a_long_one_the_largest() {
        let largest = Windows { stream: STREAM_BYTES, connection: STREAM_BYTES + SPARE_BYTES };
        let over = |microseconds| largest.fitting(Duration::from_micros(microseconds));
        assert_eq!(over(0), SHORT_BYTES);
        assert!(over(100) < 5 << 18, "{}", over(100));
        assert_eq!(over(40_000), largest.connection);
        let small = Windows { stream: LEAST_BYTES, connection: 2 * LEAST_BYTES };
        assert_eq!(small.fitting(Duration::ZERO), small.connection);
    }
}
