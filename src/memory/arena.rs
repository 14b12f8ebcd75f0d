//! Host buffers for weights and KV: aligned, zeroed by the kernel, and on huge pages if wanted.
//!
//! Memory comes from anonymous mappings, whose pages exist once they are touched: whoever writes a
//! chunk first pays its page faults and decides its NUMA node, so filling is done in parallel. One
//! mapping of gigabytes by one thread would fault 4 KiB at a time, at a fraction of the bandwidth.

use rustix::mm::{MapFlags, ProtFlags};
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Every buffer and every range of an arena starts at a multiple of this: one cache line, the
/// widest vector, and what direct reads need at least.
pub const ALIGNMENT: usize = 64;

/// The size of a huge page on x86-64 and most ARM systems. Buffers of at least this size start at a
/// multiple of it, or their first and last pages could not be huge.
const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;

/// Whether to ask for transparent huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// Ask; a system without them is no error.
    Advise,
    /// Do not ask.
    SystemDefault,
}

/// Why there is no buffer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArenaError {
    /// The operating system gives no memory.
    #[error("the system gives no {bytes} bytes of memory: {reason}")]
    Allocation {
        /// Bytes asked for.
        bytes: usize,
        /// What it said.
        reason: String,
    },
    /// An arena has less left than asked for.
    #[error("an arena of {capacity} bytes has no {need} left after {used}")]
    Full {
        /// Bytes asked for.
        need: usize,
        /// Bytes given out, gaps of alignment included.
        used: usize,
        /// Bytes of the arena.
        capacity: usize,
    },
}

/// A zeroed buffer of bytes that starts at a multiple of [`ALIGNMENT`].
#[derive(Debug)]
pub struct AlignedBytes {
    start: NonNull<u8>,
    len: usize,
    /// What was mapped, if anything: `start ..` lies inside.
    mapping: Option<(NonNull<u8>, usize)>,
}

// SAFETY: the buffer owns its mapping alone, like a `Vec<u8>`.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared access is reading only, like a `Vec<u8>`.
unsafe impl Sync for AlignedBytes {}

/// A cache line, so that a pointer to it has the alignment of a buffer.
#[repr(align(64))]
struct EmptyLine;

impl AlignedBytes {
    /// A zeroed buffer of `len` bytes. No page of it exists until it is touched.
    ///
    /// # Errors
    /// [`ArenaError::Allocation`] when the system refuses.
    pub fn zeroed(len: usize, huge_pages: HugePages) -> Result<AlignedBytes, ArenaError> {
        if len == 0 {
            let start = NonNull::<EmptyLine>::dangling().cast();
            return Ok(AlignedBytes { start, len, mapping: None });
        }
        let refuse = |reason: String| ArenaError::Allocation { bytes: len, reason };
        let slack = if len >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let mapped = len
            .checked_next_multiple_of(PAGE)
            .and_then(|pages| pages.checked_add(slack))
            .filter(|bytes| isize::try_from(*bytes).is_ok())
            .ok_or_else(|| refuse("larger than the address space".to_owned()))?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new private mapping at an address of the system's choice touches nothing else.
        let base =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), mapped, protection, flags) };
        let base = base.map_err(|error| refuse(error.to_string()))?.cast::<u8>();
        let base = NonNull::new(base).ok_or_else(|| refuse("mapped at address 0".to_owned()))?;
        let shift = if slack == 0 { 0 } else { base.as_ptr().align_offset(HUGE_PAGE) };
        // SAFETY: `shift` is less than the slack, so `len` bytes from there are mapped.
        let start = unsafe { base.add(shift) };
        if huge_pages == HugePages::Advise && len >= HUGE_PAGE {
            advise_huge(start, mapped - shift);
        }
        Ok(AlignedBytes { start, len, mapping: Some((base, mapped)) })
    }

    /// Pointer to the first byte, valid for as many as the buffer has while it lives.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes are mapped (or none is read), initialised to zero by the system.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the buffer is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if let Some((base, mapped)) = self.mapping {
            // SAFETY: this is the mapping that `zeroed` made, and nothing borrows it any more. The
            // call fails only for ranges that are no mapping.
            let _ = unsafe { rustix::mm::munmap(base.as_ptr().cast(), mapped) };
        }
    }
}

/// Asks for huge pages where memory from elsewhere is large enough to have some, best before it is
/// first touched.
pub fn prefer_huge_pages(bytes: &mut [u8]) {
    let skipped = bytes.as_ptr().align_offset(PAGE);
    if let Some(pages) = bytes.get_mut(skipped..).filter(|bytes| bytes.len() >= HUGE_PAGE) {
        let len = pages.len() / PAGE * PAGE;
        advise_huge(NonNull::from(pages).cast(), len);
    }
}

/// Has the whole pages of some memory exist, all at once, before somebody needs them. A system that
/// can't do that has them come one by one, as ever.
pub fn populate(bytes: &[u8]) {
    let skipped = bytes.as_ptr().align_offset(PAGE);
    let Some(pages) = bytes.get(skipped..) else { return };
    #[cfg(target_os = "linux")]
    // SAFETY: the pages are mapped, since they are borrowed, and keep what they hold.
    let _ = unsafe {
        let (start, len) = (pages.as_ptr().cast_mut().cast(), pages.len() / PAGE * PAGE);
        rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxPopulateWrite)
    };
}

/// Asks for huge pages. Systems without them refuse, and the buffer works all the same.
#[cfg(target_os = "linux")]
fn advise_huge(start: NonNull<u8>, len: usize) {
    // SAFETY: the range lies in a mapping of ours, and the advice changes no content.
    let _ = unsafe {
        rustix::mm::madvise(start.as_ptr().cast(), len, rustix::mm::Advice::LinuxHugepage)
    };
}

#[cfg(not(target_os = "linux"))]
fn advise_huge(_start: NonNull<u8>, _len: usize) {}

/// A buffer cut into chunks of equal size (the last may be shorter), each of which can be claimed
/// once, from any thread. For filling a buffer in parallel: workers claim until none is left.
pub struct DisjointChunks<'a> {
    start: NonNull<u8>,
    len: usize,
    chunk_bytes: usize,
    claimed: Vec<AtomicBool>,
    next: AtomicUsize,
    _buffer: std::marker::PhantomData<&'a mut [u8]>,
}

// SAFETY: it hands out each part of an exclusively borrowed buffer at most once.
unsafe impl Send for DisjointChunks<'_> {}
// SAFETY: as above; claims are atomic.
unsafe impl Sync for DisjointChunks<'_> {}

impl<'a> DisjointChunks<'a> {
    /// Cuts `bytes` into chunks of `chunk_bytes`.
    ///
    /// # Panics
    /// When `chunk_bytes` is 0.
    pub fn new(bytes: &'a mut [u8], chunk_bytes: usize) -> DisjointChunks<'a> {
        assert!(chunk_bytes > 0, "chunks of 0 bytes");
        let count = bytes.len().div_ceil(chunk_bytes);
        DisjointChunks {
            len: bytes.len(),
            start: NonNull::from(bytes).cast(),
            chunk_bytes,
            claimed: (0..count).map(|_| AtomicBool::new(false)).collect(),
            next: AtomicUsize::new(0),
            _buffer: std::marker::PhantomData,
        }
    }

    /// Number of chunks.
    pub fn count(&self) -> usize {
        self.claimed.len()
    }

    /// Chunk `index`, for the first caller that asks for it; `None` for all others and beyond the
    /// last chunk.
    pub fn claim(&self, index: usize) -> Option<&'a mut [u8]> {
        let claimed = self.claimed.get(index)?;
        if claimed.swap(true, Ordering::Relaxed) {
            return None;
        }
        let offset = index * self.chunk_bytes;
        let len = self.chunk_bytes.min(self.len - offset);
        // SAFETY: the chunk lies in the buffer, which is borrowed for `'a`, and the flag just taken
        // makes this the only reference to it. What others wrote to other chunks is not read.
        unsafe { Some(std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset), len)) }
    }

    /// The lowest chunk that nobody has claimed through this method, with its index.
    pub fn claim_next(&self) -> Option<(usize, &'a mut [u8])> {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count() {
                // Keep the counter from ever wrapping, however often this is asked.
                self.next.store(self.count(), Ordering::Relaxed);
                return None;
            }
            if let Some(chunk) = self.claim(index) {
                return Some((index, chunk));
            }
        }
    }
}

/// A range of an arena.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ArenaRange {
    bytes: Range<usize>,
}

impl ArenaRange {
    /// Offsets in the arena.
    pub fn offsets(&self) -> Range<usize> {
        self.bytes.clone()
    }
}

/// One buffer that ranges are cut from, in order and for good: many tensors, one mapping.
#[derive(Debug)]
pub struct HostArena {
    bytes: AlignedBytes,
    used: usize,
}

impl HostArena {
    /// An arena over a buffer.
    pub fn new(bytes: AlignedBytes) -> HostArena {
        HostArena { bytes, used: 0 }
    }

    /// The next `len` bytes that start at a multiple of [`ALIGNMENT`].
    ///
    /// # Errors
    /// [`ArenaError::Full`] when fewer are left.
    pub fn allot(&mut self, len: usize) -> Result<ArenaRange, ArenaError> {
        let capacity = self.bytes.len();
        let start = self.used.next_multiple_of(ALIGNMENT);
        let end = start.checked_add(len).filter(|end| *end <= capacity);
        let end = end.ok_or(ArenaError::Full { need: len, used: self.used, capacity })?;
        self.used = end;
        Ok(ArenaRange { bytes: start..end })
    }

    /// Bytes that an arena needs for buffers of these sizes.
    pub fn bytes_for(sizes: impl IntoIterator<Item = usize>) -> usize {
        sizes.into_iter().fold(0, |used: usize, size| used.next_multiple_of(ALIGNMENT) + size)
    }

    /// The bytes of a range.
    ///
    /// # Panics
    /// When the range is another arena's and lies outside this one.
    pub fn bytes(&self, range: &ArenaRange) -> &[u8] {
        &self.bytes[range.offsets()]
    }

    /// The bytes of a range, for writing.
    ///
    /// # Panics
    /// As [`HostArena::bytes`].
    pub fn bytes_mut(&mut self, range: &ArenaRange) -> &mut [u8] {
        &mut self.bytes[range.offsets()]
    }

    /// The whole buffer, for writing in parallel.
    pub fn all_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}
