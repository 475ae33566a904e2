//! Mapped memory files.

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

/// With these a file's size is fixed for good. A peer that could shrink it would end this process with SIGBUS.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// `f_type` of memory files with ordinary pages. Huge pages of `hugetlbfs` can run out when they are touched,
/// which is a SIGBUS.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A memory file of fixed size, mapped for reading and writing. Its bytes start as zeros, its pages come when
/// they are touched. Unmapped on drop; gone when no process maps it or holds its descriptor any more.
#[derive(Debug)]
pub(crate) struct Segment {
    start: NonNull<u8>,
    len: usize,
    fd: OwnedFd,
}

// SAFETY: the mapping stays where it is until the drop, whichever thread that happens in. The segment itself
// hands out nothing but an address; whoever makes references of it answers for them.
unsafe impl Send for Segment {}
// SAFETY: as above: `&Segment` allows no access to the bytes without `unsafe`.
unsafe impl Sync for Segment {}

impl Segment {
    /// A new segment. `name` shows in `/proc/PID/maps` and nowhere else; it need not be unique.
    pub(crate) fn create(name: &str, bytes: usize) -> io::Result<Self> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
        if limit.is_some_and(|limit| limit < bytes as u64) {
            // The kernel would not only refuse: it would end the process with SIGXFSZ.
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SEALS)?;
        Self::map(fd, bytes)
    }

    /// Maps a segment that a peer made. It must have exactly `expected_bytes`, ordinary pages and a sealed size.
    pub(crate) fn open(fd: OwnedFd, expected_bytes: usize) -> io::Result<Self> {
        let refuse = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let seals = rustix::fs::fcntl_get_seals(&fd)
            .map_err(|_| refuse("a peer's descriptor is not a memory file".to_owned()))?;
        if !seals.contains(SEALS) {
            return Err(refuse("a peer's memory file can still change its size".to_owned()));
        }
        if rustix::fs::fstatfs(&fd)?.f_type as u64 != TMPFS_MAGIC {
            return Err(refuse("a peer's memory file has other than ordinary pages".to_owned()));
        }
        let size = rustix::fs::fstat(&fd)?.st_size;
        if usize::try_from(size) != Ok(expected_bytes) {
            return Err(refuse(format!("a peer's memory file has {size} bytes instead of {expected_bytes}")));
        }
        Self::map(fd, expected_bytes)
    }

    fn map(fd: OwnedFd, len: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses an address range that nothing else uses.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, &fd, 0)? };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, len, fd })
    }

    /// The descriptor to send to a peer.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where the segment begins: a page's beginning. Valid for `len` bytes as long as the segment lives.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Gives the whole pages of a range back to the kernel: they read as zeros from now on, in every process.
    ///
    /// # Safety
    /// Nobody, here or in a peer, uses the range's contents any more.
    pub(crate) unsafe fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|&end| end <= self.len);
        if end.is_none() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: within the mapping by the check above, unused by the caller's promise.
        unsafe {
            let start = self.as_ptr().add(offset).cast();
            rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxRemove)?;
        }
        Ok(())
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `map` and is unmapped only here.
        let unmapped = unsafe { rustix::mm::munmap(self.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}
