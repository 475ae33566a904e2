//! Frames one way between two ranks: a ring with one producer and one consumer.
//!
//! ```text
//! control   head (the consumer's cursor), tail (the producer's), starved; each on cache lines of its own
//! data      frames one after the other, none across the ring's end
//! frame     64 bytes: header, payload length, kind; then the payload, padded to 64 bytes
//! ```
//!
//! The cursors count bytes since the beginning and never wrap. Each side trusts its own copy of its own cursor
//! and checks the other's whenever it reads it.

use super::segment::Segment;
use crate::frame::{HEADER_LEN, MAX_PAYLOAD_BYTES};
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Frames and payloads begin at multiples of it: a cache line, and wider than any vector.
const ALIGN: usize = 64;

/// Bytes in front of the data: three times two cache lines (processors prefetch them in pairs), rounded up.
const CONTROL_BYTES: usize = 512;

/// The smallest power of two in which a frame of [`MAX_PAYLOAD_BYTES`] always fits when the ring is empty.
pub(crate) const CAPACITY_BYTES: usize = (2 * (MAX_PAYLOAD_BYTES + ALIGN)).next_power_of_two();

const KIND_FRAME: u32 = 0x6d61_7246;
/// The rest of the ring up to its end is unused.
const KIND_SKIP: u32 = 0x7069_6b53;

/// Why a ring is unusable. All but the first two mean that the shared memory was overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RingError {
    #[error(
        "a ring of {capacity} bytes at {offset} of a segment of {segment}: not a power of two, or outside"
    )]
    Place { offset: usize, capacity: usize, segment: usize },
    #[error("a payload of {len} bytes for a ring whose frames have at most {most}")]
    TooLong { len: usize, most: usize },
    #[error(
        "shared memory: the peer's cursor is {theirs}, which does not fit {ours} in a ring of {capacity} bytes"
    )]
    Cursor { ours: u64, theirs: u64, capacity: usize },
    #[error("shared memory: a frame at {at} has the unknown kind {kind:#x}")]
    Kind { at: u64, kind: u32 },
    #[error("shared memory: a frame at {at} announces {len} bytes of payload, more than are there")]
    Length { at: u64, len: u32 },
}

/// Bytes of a segment that a ring of `capacity` takes.
pub(crate) const fn ring_bytes(capacity: usize) -> usize {
    CONTROL_BYTES + capacity
}

/// A value without neighbours that others write.
#[repr(C, align(128))]
struct Line<T>(T);

#[repr(C)]
struct Control {
    head: Line<AtomicU64>,
    tail: Line<AtomicU64>,
    /// Not 0 while the producer waits for space.
    starved: Line<AtomicU32>,
}

const _: () =
    assert!(size_of::<Control>() <= CONTROL_BYTES && CONTROL_BYTES.is_multiple_of(align_of::<Control>()));

/// What both ends know of their ring.
struct Shared {
    segment: Arc<Segment>,
    offset: usize,
    capacity: usize,
}

impl Shared {
    fn new(segment: Arc<Segment>, offset: usize, capacity: usize) -> Result<Self, RingError> {
        let end = capacity.checked_add(CONTROL_BYTES).and_then(|bytes| offset.checked_add(bytes));
        let within = end.is_some_and(|end| end <= segment.len());
        if !within
            || !offset.is_multiple_of(CONTROL_BYTES)
            || !capacity.is_power_of_two()
            || capacity < 4 * ALIGN
        {
            return Err(RingError::Place { offset, capacity, segment: segment.len() });
        }
        Ok(Self { segment, offset, capacity })
    }

    fn control(&self) -> &Control {
        // SAFETY: `new` checked bounds and alignment. All bit patterns are valid, every process accesses the
        // fields as atomics only, and the segment lives as long as `self`.
        unsafe { &*self.segment.as_ptr().add(self.offset).cast::<Control>() }
    }

    /// Where the byte of a cursor lies.
    fn data(&self, cursor: u64) -> *mut u8 {
        // SAFETY: less than `capacity` bytes after the control area: within the segment, as `new` checked.
        unsafe { self.segment.as_ptr().add(self.offset + CONTROL_BYTES + self.position(cursor)) }
    }

    fn position(&self, cursor: u64) -> usize {
        cursor as usize & (self.capacity - 1)
    }

    /// Bytes from a cursor to the ring's end.
    fn rest(&self, cursor: u64) -> usize {
        self.capacity - self.position(cursor)
    }

    /// Any frame up to this fits into an empty ring, wherever its cursors are: what is skipped is shorter than
    /// the frame.
    fn max_payload(&self) -> usize {
        (self.capacity / 2 - ALIGN).min(MAX_PAYLOAD_BYTES)
    }

    /// `from..to` in bytes, if that can be what lies in the ring.
    fn used(&self, head: u64, tail: u64) -> Option<usize> {
        let used = tail.wrapping_sub(head);
        (used <= self.capacity as u64 && used.is_multiple_of(ALIGN as u64)).then_some(used as usize)
    }
}

/// The end that sends. Its methods take `&mut self`: the owner serialises.
pub(crate) struct Producer {
    shared: Shared,
    tail: u64,
    /// The consumer's cursor when it was last read: what lies before it is free.
    head: u64,
}

impl Producer {
    /// The sending end of a new ring, `ring_bytes(capacity)` long, at `offset` (a multiple of 512) of a segment
    /// that is still zero there. `capacity` is a power of two. There must be no other producer.
    pub(crate) fn new(segment: Arc<Segment>, offset: usize, capacity: usize) -> Result<Self, RingError> {
        Shared::new(segment, offset, capacity).map(|shared| Self { shared, tail: 0, head: 0 })
    }

    /// Copies a frame into the ring. `false`: there is no space now, and the consumer's `pop` will say when the
    /// producer should try again. The caller rings the consumer's doorbell afterwards.
    pub(crate) fn push(&mut self, header: &[u8; HEADER_LEN], payload: &[Bytes]) -> Result<bool, RingError> {
        let len: usize = payload.iter().map(Bytes::len).sum();
        let most = self.shared.max_payload();
        if len > most {
            return Err(RingError::TooLong { len, most });
        }
        let frame = ALIGN + len.next_multiple_of(ALIGN);
        let rest = self.shared.rest(self.tail);
        let skip = if frame > rest { rest } else { 0 };
        if !self.make_room(skip + frame)? {
            return Ok(false);
        }
        if skip > 0 {
            self.write_head(self.tail, &[0; HEADER_LEN], 0, KIND_SKIP);
        }
        let at = self.tail + skip as u64;
        self.write_head(at, header, len as u32, KIND_FRAME);
        let mut target = self.shared.data(at).wrapping_add(ALIGN);
        for part in payload {
            // SAFETY: `make_room` found the frame's bytes free, they do not cross the ring's end, and the
            // consumer does not look at them before `tail` says so.
            unsafe { target.copy_from_nonoverlapping(part.as_ptr(), part.len()) };
            target = target.wrapping_add(part.len());
        }
        self.tail = at + frame as u64;
        self.shared.control().tail.0.store(self.tail, Ordering::Release);
        Ok(true)
    }

    /// Whether `bytes` are free. If not, the consumer is asked to tell.
    fn make_room(&mut self, bytes: usize) -> Result<bool, RingError> {
        let control = self.shared.control();
        let free = |head| self.shared.used(head, self.tail).map(|used| self.shared.capacity - used >= bytes);
        if free(self.head) == Some(true) {
            return Ok(true);
        }
        for attempt in 0..2 {
            // A frame is read before its space is freed, hence before it is written over.
            let head = control.head.0.load(Ordering::Acquire);
            let capacity = self.shared.capacity;
            let room = free(head).ok_or(RingError::Cursor { ours: self.tail, theirs: head, capacity })?;
            self.head = head;
            if room {
                return Ok(true);
            }
            if attempt == 0 {
                // As with a doorbell: flag, fence, look again here; cursor, fence, look at the flag in `pop`.
                control.starved.0.store(1, Ordering::Relaxed);
                fence(Ordering::SeqCst);
            }
        }
        Ok(false)
    }

    fn write_head(&self, at: u64, header: &[u8; HEADER_LEN], len: u32, kind: u32) {
        let mut head = [0; ALIGN];
        head[..HEADER_LEN].copy_from_slice(header);
        head[ALIGN - 8..ALIGN - 4].copy_from_slice(&len.to_le_bytes());
        head[ALIGN - 4..].copy_from_slice(&kind.to_le_bytes());
        // SAFETY: cursors are multiples of 64, so 64 bytes lie before the ring's end; free as in `push`.
        unsafe { self.shared.data(at).copy_from_nonoverlapping(head.as_ptr(), ALIGN) };
    }
}

/// A frame that was taken out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Popped<R> {
    /// What the caller made of it.
    pub(crate) value: R,
    /// The producer waits for space and there is enough again: ring its doorbell.
    pub(crate) starved: bool,
}

/// The end that receives.
pub(crate) struct Consumer {
    shared: Shared,
    head: u64,
    /// The producer's cursor when it was last read: frames up to it are there.
    tail: u64,
}

impl Consumer {
    /// The receiving end of the ring whose producer was made with the same numbers.
    pub(crate) fn new(segment: Arc<Segment>, offset: usize, capacity: usize) -> Result<Self, RingError> {
        Shared::new(segment, offset, capacity).map(|shared| Self { shared, head: 0, tail: 0 })
    }

    /// Whether there is nothing to take.
    pub(crate) fn is_empty(&self) -> bool {
        self.tail == self.head && self.shared.control().tail.0.load(Ordering::Acquire) == self.head
    }

    /// Hands the oldest frame's header and payload to `take`, then frees its space. The payload begins at a
    /// multiple of 64. `None`: there is no frame.
    ///
    /// After an error the ring stays as it is, and every further call gives an error.
    pub(crate) fn pop<R>(
        &mut self,
        take: impl FnOnce(&[u8; HEADER_LEN], &[u8]) -> R,
    ) -> Result<Option<Popped<R>>, RingError> {
        let control = self.shared.control();
        if self.tail == self.head {
            let tail = control.tail.0.load(Ordering::Acquire);
            let cursor = RingError::Cursor { ours: self.head, theirs: tail, capacity: self.shared.capacity };
            if self.shared.used(self.head, tail).ok_or(cursor)? == 0 {
                return Ok(None);
            }
            self.tail = tail;
        }
        let mut at = self.head;
        let (mut header, mut len, mut kind) = self.read_head(at);
        if kind == KIND_SKIP && self.shared.position(at) > 0 {
            at += self.shared.rest(at) as u64;
            if at >= self.tail {
                return Err(RingError::Kind { at: self.head, kind });
            }
            (header, len, kind) = self.read_head(at);
        }
        if kind != KIND_FRAME {
            return Err(RingError::Kind { at, kind });
        }
        let frame = ALIGN + (len as usize).next_multiple_of(ALIGN);
        let there = self.shared.rest(at).min((self.tail - at) as usize);
        if len as usize > self.shared.max_payload() || frame > there {
            return Err(RingError::Length { at, len });
        }
        // SAFETY: the frame lies within the ring, by the checks of numbers that were copied out of it first. It
        // was published by the tail's release, and the producer leaves it alone until `head` passes it.
        let payload = unsafe { std::slice::from_raw_parts(self.shared.data(at).add(ALIGN), len as usize) };
        let value = take(&header, payload);

        self.head = at + frame as u64;
        control.head.0.store(self.head, Ordering::Release);
        // Waking the producer for each frame would be a system call for each. Half a ring is reached by whoever
        // goes on taking, at the latest when the ring is empty; and then every frame fits.
        let used = (self.tail - self.head) as usize;
        fence(Ordering::SeqCst);
        let starved = control.starved.0.load(Ordering::Relaxed) != 0
            && used <= self.shared.capacity / 2
            && control.starved.0.swap(0, Ordering::AcqRel) != 0;
        Ok(Some(Popped { value, starved }))
    }

    /// A copy, so that nobody changes it between check and use.
    fn read_head(&self, at: u64) -> ([u8; HEADER_LEN], u32, u32) {
        // SAFETY: cursors are multiples of 64, so 64 bytes lie before the ring's end; published as in `pop`.
        let head: [u8; ALIGN] = unsafe { self.shared.data(at).cast::<[u8; ALIGN]>().read_volatile() };
        let word =
            |from: usize| u32::from_le_bytes([head[from], head[from + 1], head[from + 2], head[from + 3]]);
        let mut header = [0; HEADER_LEN];
        header.copy_from_slice(&head[..HEADER_LEN]);
        (header, word(ALIGN - 8), word(ALIGN - 4))
    }
}
