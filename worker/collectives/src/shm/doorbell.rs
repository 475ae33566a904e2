//! How ranks of one host wake each other.
//!
//! Every rank has one word that its peers may write. It says who, if anybody, sleeps and wants to be woken.
//!
//! **No wake-up is lost.** A peer first publishes its frame, then looks at the word ([`Doorbell::ring`]). A
//! sleeper first sets the word ([`Doorbell::arm`]), then looks for frames once more, and sleeps only if there
//! are none. On both sides a sequentially consistent fence stands between the write and the look, so at least
//! one of the two sees what the other wrote: the sleeper the frame, or the peer the set word. In the second case
//! the peer clears the word and wakes. The kernel compares the word again as it puts the sleeper to sleep, so a
//! word cleared in between keeps it awake. When two peers ring at once, only the first finds the word set; if the
//! sleeper wakes for that one and arms again before the second has swapped, the second finds it set again; if
//! after, then the second's swap comes before the new arming in the order of changes of this one word, and as
//! both are read-modify-writes with acquire and release, the look that follows the arming sees the second frame.

use super::segment::Segment;
use rustix::io::Errno;
use rustix::thread::futex;
use rustix::time::{ClockId, Timespec};
use std::io;
use std::num::NonZeroU32;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::Duration;

/// A segment has whole pages anyway.
const BYTES: usize = 4096;

/// The word's value while somebody polls, so that nobody need be woken.
const AWAKE: u32 = 0;

/// Who may sleep at a doorbell. The value is both the word's and the bit by which the kernel finds the sleeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sleeper {
    /// A thread that waits for a collective's result.
    Waiter = 1,
    /// The thread that makes progress while nobody waits.
    Background = 2,
}

impl Sleeper {
    fn bits(self) -> NonZeroU32 {
        match self {
            Self::Waiter => NonZeroU32::MIN,
            Self::Background => NonZeroU32::MIN.saturating_add(1),
        }
    }
}

/// A rank's doorbell: its own to sleep at, or a peer's to ring. Clones are the same one.
#[derive(Clone, Debug)]
pub(crate) struct Doorbell(Arc<Segment>);

impl Doorbell {
    /// A new doorbell at which nobody sleeps.
    pub(crate) fn create() -> io::Result<Self> {
        Segment::create("lockstep-doorbell", BYTES).map(|segment| Self(Arc::new(segment)))
    }

    /// A peer's.
    pub(crate) fn open(fd: OwnedFd) -> io::Result<Self> {
        Segment::open(fd, BYTES).map(|segment| Self(Arc::new(segment)))
    }

    /// The descriptor to send to a peer.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    /// Wakes who sleeps here. To be called after what it announces has been published; costs one fence and no
    /// system call while somebody polls.
    pub(crate) fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.word().load(Ordering::Relaxed) == AWAKE {
            return;
        }
        if let Some(sleepers) = NonZeroU32::new(self.word().swap(AWAKE, Ordering::AcqRel)) {
            // It fails only for addresses that are not mapped.
            let _ = futex::wake_bitset(self.word(), futex::Flags::empty(), i32::MAX as u32, sleepers);
        }
    }

    /// As [`ring`](Self::ring), but only for a waiter: the background thread may sleep on.
    pub(crate) fn wake_waiter(&self) {
        fence(Ordering::SeqCst);
        let waiter = Sleeper::Waiter as u32;
        if self.word().compare_exchange(waiter, AWAKE, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            let _ = futex::wake_bitset(
                self.word(),
                futex::Flags::empty(),
                i32::MAX as u32,
                Sleeper::Waiter.bits(),
            );
        }
    }

    /// From now on rings cost no system call: the caller polls.
    pub(crate) fn disarm(&self) {
        self.word().swap(AWAKE, Ordering::AcqRel);
    }

    /// From now on a ring wakes `who`, whether it sleeps already or not yet.
    ///
    /// The caller must look for work once more before anybody sleeps: work published before this call woke
    /// nobody.
    pub(crate) fn arm(&self, who: Sleeper) {
        self.word().swap(who as u32, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }

    /// Sleeps until a ring for `who`, for `timeout` at most. Returns at once if the word is not what `who` armed
    /// it to, and may return early for no reason. Leaves the word as it is.
    pub(crate) fn sleep(&self, who: Sleeper, timeout: Option<Duration>) {
        // A bitset wait takes a point in time, not a span.
        let until = timeout.and_then(|timeout| {
            let now = Duration::try_from(rustix::time::clock_gettime(ClockId::Monotonic)).ok()?;
            Timespec::try_from(now.checked_add(timeout)?).ok()
        });
        let slept =
            futex::wait_bitset(self.word(), futex::Flags::empty(), who as u32, until.as_ref(), who.bits());
        debug_assert!(
            matches!(slept, Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT)),
            "{slept:?}"
        );
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: a page's beginning, hence aligned, mapped as long as `self` lives; every process accesses it
        // as an atomic only.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().cast()) }
    }
}
