//! A rank's large allocation that its peers map.
//!
//! What lies in it needs no copying to reach a peer: the peer reads it, or writes a result, where it lies. It is
//! far larger than anything that will be in it; only pages that were touched take memory.

use super::segment::Segment;
use parking_lot::Mutex;
use rustix::process::{Resource, getrlimit};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Address space of an arena: twice a model of 8 billion f32 elements. 47 bits of addresses have room for the
/// arenas of 2,000 ranks.
const MOST_BYTES: u64 = 64 << 30;

/// Less than this is not worth sharing.
const LEAST_BYTES: u64 = 64 << 20;

/// How much of freed blocks stays in memory, to be used again without the kernel clearing pages first.
const KEPT_BYTES: usize = 256 << 20;

const PAGE: usize = 4096;
const LINE: usize = 64;

/// Blocks above this size begin at a page and take whole pages, so that they can be given back to the kernel.
const LARGE_BYTES: usize = 64 << 10;

/// This rank's arena. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Arena(Arc<Inner>);

struct Inner {
    segment: Segment,
    retired: AtomicBool,
    spaces: Mutex<Spaces>,
}

/// Which bytes nobody has. A byte is in a block, kept, or in an extent.
#[derive(Default)]
struct Spaces {
    /// Unused ranges by offset, never two side by side: offset to length.
    extents: BTreeMap<usize, usize>,
    /// Freed blocks whose pages stay, by length and age: the youngest of a length is the warmest.
    kept: BTreeMap<(usize, u64), usize>,
    /// The same by age: age to length.
    ages: BTreeMap<u64, usize>,
    kept_bytes: usize,
    most_kept_bytes: usize,
    clock: u64,
}

/// A part of an arena, returned to it on drop. At multiples of 64, above 64 KiB at multiples of 4096. Its bytes
/// start as anything.
///
/// Whoever told a peer the offset keeps the block until the peer is done with it.
pub(crate) struct Block {
    arena: Arena,
    offset: usize,
    len: usize,
}

/// A peer's arena.
pub(crate) struct PeerArena(Segment);

impl Arena {
    /// An arena of 64 GiB of address space, or as much less as this process's limits allow.
    pub(crate) fn create() -> io::Result<Self> {
        // Peers' arenas and everything else must fit beside it.
        let addresses = getrlimit(Resource::As).current.unwrap_or(u64::MAX) / 8;
        let files = getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX);
        let most = MOST_BYTES.min(addresses).min(files);
        let mut bytes = if most.is_power_of_two() { most } else { most.next_power_of_two() / 2 };
        loop {
            match Self::with_bytes(bytes as usize, KEPT_BYTES) {
                Err(_) if bytes / 2 >= LEAST_BYTES => bytes /= 2,
                made => return made,
            }
        }
    }

    pub(super) fn with_bytes(bytes: usize, most_kept_bytes: usize) -> io::Result<Self> {
        let segment = Segment::create("lockstep-arena", bytes)?;
        let extents = BTreeMap::from([(0, bytes)]);
        let spaces = Mutex::new(Spaces { extents, most_kept_bytes, ..Spaces::default() });
        Ok(Self(Arc::new(Inner { segment, retired: AtomicBool::new(false), spaces })))
    }

    /// The descriptor to send to a peer.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.segment.fd()
    }

    /// Bytes of address space.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.segment.len() as u64
    }

    /// From now on there is no room: a peer may still write to blocks that were dropped in disorder.
    pub(crate) fn retire(&self) {
        self.0.retired.store(true, Ordering::Release);
    }

    /// A block of `bytes`; `None` when there is no room.
    pub(crate) fn allocate(&self, bytes: usize) -> Option<Block> {
        if self.0.retired.load(Ordering::Acquire) {
            return None;
        }
        let rounded = rounded(bytes)?;
        let offset = self.0.spaces.lock().take(rounded)?;
        Some(Block { arena: self.clone(), offset, len: bytes })
    }
}

/// What a block of `bytes` takes.
fn rounded(bytes: usize) -> Option<usize> {
    bytes.max(1).checked_next_multiple_of(if bytes > LARGE_BYTES { PAGE } else { LINE })
}

impl Spaces {
    fn take(&mut self, len: usize) -> Option<usize> {
        let same = self.kept.range((len, 0)..=(len, u64::MAX)).next_back().map(|(&key, _)| key);
        if let Some(key) = same {
            return self.unkeep(key);
        }
        loop {
            if let Some(offset) = self.carve(len) {
                return Some(offset);
            }
            let (&age, &kept_len) = self.ages.first_key_value()?;
            let offset = self.unkeep((kept_len, age))?;
            self.merge(offset, kept_len);
        }
    }

    /// The first part of `len` bytes of an extent.
    fn carve(&mut self, len: usize) -> Option<usize> {
        let align = if len > LARGE_BYTES { PAGE } else { LINE };
        let (start, size, offset) = self.extents.iter().find_map(|(&start, &size)| {
            let offset = start.checked_next_multiple_of(align)?;
            (offset - start + len <= size).then_some((start, size, offset))
        })?;
        self.extents.remove(&start);
        if offset > start {
            self.extents.insert(start, offset - start);
        }
        let end = start + size;
        if offset + len < end {
            self.extents.insert(offset + len, end - offset - len);
        }
        Some(offset)
    }

    /// Puts a range among the extents, together with its neighbours.
    fn merge(&mut self, offset: usize, len: usize) {
        let (mut start, mut end) = (offset, offset + len);
        if let Some((&before, &size)) = self.extents.range(..start).next_back()
            && before + size == start
        {
            start = before;
        }
        if let Some(size) = self.extents.remove(&end) {
            end += size;
        }
        self.extents.insert(start, end - start);
    }

    fn keep(&mut self, offset: usize, len: usize) {
        self.clock += 1;
        self.kept.insert((len, self.clock), offset);
        self.ages.insert(self.clock, len);
        self.kept_bytes += len;
    }

    fn unkeep(&mut self, (len, age): (usize, u64)) -> Option<usize> {
        self.ages.remove(&age);
        self.kept_bytes -= len;
        self.kept.remove(&(len, age))
    }

    /// The oldest kept block, if more is kept than should be.
    fn surplus(&mut self) -> Option<(usize, usize)> {
        if self.kept_bytes <= self.most_kept_bytes {
            return None;
        }
        let (&age, &len) = self.ages.first_key_value()?;
        Some((self.unkeep((len, age))?, len))
    }
}

impl Block {
    /// Where it lies in the arena: what a peer needs to know.
    pub(crate) fn offset(&self) -> u64 {
        self.offset as u64
    }

    /// Bytes, as asked for.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it lies in this process. Valid as long as the block.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.arena.0.segment.as_ptr().wrapping_add(self.offset)
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: within the segment, in no other block, shared with `&self`. Peers write to a block only
        // when this rank has asked them to, and then nobody here looks before they are done.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    /// Its bytes.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, exclusive with `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.len) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Some(len) = rounded(self.len) else { return };
        let Inner { segment, spaces, .. } = &*self.arena.0;
        spaces.lock().keep(self.offset, len);
        loop {
            // The kernel takes its time: not under the lock. The range is in nobody's list meanwhile.
            let Some((offset, len)) = spaces.lock().surplus() else { return };
            if len > LARGE_BYTES {
                // SAFETY: whole pages of a block that was dropped and given to nobody since. Should the kernel
                // refuse, the memory stays in use, which harms nothing else.
                let _ = unsafe { segment.discard(offset, len) };
            }
            spaces.lock().merge(offset, len);
        }
    }
}

impl PeerArena {
    /// Maps the arena of `bytes` bytes behind a descriptor that a peer sent.
    pub(crate) fn open(fd: OwnedFd, bytes: u64) -> io::Result<Self> {
        if bytes > MOST_BYTES {
            let what = format!("a peer announces an arena of {bytes} bytes, more than {MOST_BYTES}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Segment::open(fd, bytes as usize).map(Self)
    }

    /// `len` bytes at `offset`; `None` outside the arena.
    ///
    /// # Safety
    /// As long as the slice lives, nobody writes there: the peer has said so in a frame, and what it waits for
    /// before it uses the bytes otherwise comes after the slice's end.
    pub(crate) unsafe fn read(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let start = self.at(offset, len)?;
        // SAFETY: within the mapping; the rest is the caller's promise.
        Some(unsafe { std::slice::from_raw_parts(start, len) })
    }

    /// Where `len` bytes at `offset` begin, to be written; `None` outside the arena. Valid as long as `self`.
    ///
    /// Writing there is sound only while the peer has asked for it and nobody else reads or writes there.
    pub(crate) fn write(&self, offset: u64, len: usize) -> Option<*mut u8> {
        self.at(offset, len)
    }

    fn at(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(len)?;
        (end <= self.0.len()).then(|| self.0.as_ptr().wrapping_add(offset))
    }
}
