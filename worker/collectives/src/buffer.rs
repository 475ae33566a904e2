//! Memory for payloads: aligned for every element type, and used again.
//!
//! Fresh pages cost more than the copy into them (a profile of a plain exchange showed 15–20% of its time in
//! page faults and zeroing), so a dropped [`Buffer`] goes back to its [`Pool`].

use crate::numbers::Numbers;
use bytemuck::Pod;
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;

/// The most memory a pool keeps for later: both directions of a 4 MB window on a few connections, and the leaves and
/// results of some buckets of 25 MB.
const KEEP_BYTES: usize = 256 << 20;

/// Buffers waiting to be used again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pool {
    free: Arc<Mutex<Free>>,
}

#[derive(Debug, Default)]
struct Free {
    buffers: Vec<Vec<u64>>,
    bytes: usize,
}

/// Bytes of a payload, aligned to 8. Their content is arbitrary until written.
#[derive(Debug)]
pub(crate) struct Buffer {
    words: Vec<u64>,
    len: usize,
    pool: Pool,
}

impl Pool {
    /// A buffer of `len` bytes.
    pub(crate) fn take(&self, len: usize) -> Buffer {
        let needed = len.div_ceil(8);
        let mut words = {
            let mut free = self.free.lock();
            // The tightest fit: a small request must not take a bucket's memory away. Of those the last to come back,
            // whose bytes may still be in a cache.
            let fitting = free.buffers.iter().enumerate().rev().filter(|(_, b)| b.capacity() >= needed);
            let words = fitting.min_by_key(|(_, b)| b.capacity()).map(|(i, _)| i);
            let words = words.map(|i| free.buffers.swap_remove(i)).unwrap_or_default();
            free.bytes -= words.capacity() * 8;
            words
        };
        if words.len() < needed {
            words.resize(needed, 0);
        }
        Buffer { words, len, pool: self.clone() }
    }

    /// A buffer that holds a copy of `parts`, one after the other.
    pub(crate) fn copy<'a>(&self, parts: impl Iterator<Item = &'a [u8]> + Clone) -> Buffer {
        let mut buffer = self.take(parts.clone().map(<[u8]>::len).sum());
        let mut rest = buffer.bytes_mut();
        for part in parts {
            let (head, tail) = rest.split_at_mut(part.len());
            head.copy_from_slice(part);
            rest = tail;
        }
        buffer
    }
}

impl Buffer {
    pub(crate) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The content as elements; a rest shorter than one element is left out.
    pub(crate) fn elements<T: Pod>(&self) -> &[T] {
        let whole = self.len / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice(&self.bytes()[..whole])
    }

    /// The same, to write to.
    pub(crate) fn elements_mut<T: Pod>(&mut self) -> &mut [T] {
        let whole = self.len / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice_mut(&mut self.bytes_mut()[..whole])
    }

    /// The content to share; the memory goes back to the pool with the last share.
    pub(crate) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let words = std::mem::take(&mut self.words);
        let bytes = words.capacity() * 8;
        let mut free = self.pool.free.lock();
        if bytes > 0 && free.bytes + bytes <= KEEP_BYTES {
            free.bytes += bytes;
            free.buffers.push(words);
        }
    }
}

/// A vector of elements shared as bytes, without a copy.
pub(crate) struct Shared<T>(pub(crate) Arc<Numbers<T>>);

impl<T: Pod> AsRef<[u8]> for Shared<T> {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref().as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_used_again() {
        let pool = Pool::default();
        let first = pool.take(1000);
        let address = first.bytes().as_ptr();
        drop(first.freeze());
        let again = pool.take(900);
        assert_eq!(again.bytes().as_ptr(), address);
        assert_eq!(again.len(), 900);
    }

    #[test]
    fn parts_are_copied_in_order() {
        let buffer = Pool::default().copy([&b"abc"[..], b"", b"de"].into_iter());
        assert_eq!(buffer.bytes(), b"abcde");
        assert_eq!(buffer.elements::<u32>(), [u32::from_le_bytes(*b"abcd")]);
    }
}
