//! Vectors of elements in memory that a group uses again.

use crate::buffer::Buffer;
use crate::shm::Block;
use bytemuck::Pod;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A vector of elements: leaves on their way into a reduction, or its result.
///
/// One from [`Group::numbers`](crate::Group::numbers) lies where the group's transport reaches it without a copy, and
/// its memory is used again once it is dropped. Fresh memory costs more than the copy into it: 25 MB are 6,000 page
/// faults.
pub struct Numbers<T>(Memory<T>);

enum Memory<T> {
    Own(Vec<T>),
    Pooled(Buffer, PhantomData<T>),
    Shared(Block, PhantomData<T>),
}

impl<T: Pod> Numbers<T> {
    /// Whole elements in `buffer`.
    pub(crate) fn pooled(buffer: Buffer) -> Self {
        Self(Memory::Pooled(buffer, PhantomData))
    }

    /// Whole elements in `block`.
    pub(crate) fn shared(block: Block) -> Self {
        Self(Memory::Shared(block, PhantomData))
    }

    /// Where they are in this rank's arena, if they are there.
    pub(crate) fn offset(&self) -> Option<u64> {
        match &self.0 {
            Memory::Shared(block, _) => Some(block.offset()),
            Memory::Own(_) | Memory::Pooled(..) => None,
        }
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        match &self.0 {
            Memory::Own(own) => own,
            Memory::Pooled(buffer, _) => buffer.elements(),
            Memory::Shared(block, _) => bytemuck::cast_slice(block.bytes()),
        }
    }

    /// The elements, to write to.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        match &mut self.0 {
            Memory::Own(own) => own,
            Memory::Pooled(buffer, _) => buffer.elements_mut(),
            Memory::Shared(block, _) => bytemuck::cast_slice_mut(block.bytes_mut()),
        }
    }
}

impl<T> From<Vec<T>> for Numbers<T> {
    fn from(own: Vec<T>) -> Self {
        Self(Memory::Own(own))
    }
}

impl<T: Pod> Deref for Numbers<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.as_slice()
    }
}

impl<T: Pod> DerefMut for Numbers<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.as_mut_slice()
    }
}

impl<T: Pod> AsRef<[u8]> for Numbers<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(self.as_slice())
    }
}

impl<T: Pod + PartialEq> PartialEq for Numbers<T> {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl<T: Pod + PartialEq, const N: usize> PartialEq<[T; N]> for Numbers<T> {
    fn eq(&self, other: &[T; N]) -> bool {
        self.as_slice() == other
    }
}

impl<T: Pod + PartialEq> PartialEq<Vec<T>> for Numbers<T> {
    fn eq(&self, other: &Vec<T>) -> bool {
        self.as_slice() == other
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for Numbers<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.as_slice()).finish()
    }
}
