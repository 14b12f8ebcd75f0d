//! A global allocator that counts what the current thread holds, so that a test can bound it.
//!
//! In a test: `#[global_allocator] static A: CountingAllocator = CountingAllocator;`

#![allow(dead_code, reason = "each test binary uses its part")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

pub struct CountingAllocator;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that is being torn down has no counters any more.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
    if bytes > 0 {
        let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
    }
}

// SAFETY: every call is passed on to `System` with its arguments unchanged; counting touches only
// thread-locals without destructors and allocates nothing.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, which is `System`'s too.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What a piece of work took on this thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Most bytes held at once, beyond those held before.
    pub peak_bytes: usize,
    /// Number of allocations.
    pub allocations: usize,
}

/// Runs `work` and says what it took. Not to be nested.
pub fn measure<T>(work: impl FnOnce() -> T) -> (T, Usage) {
    let before = LIVE.get();
    let calls = CALLS.get();
    PEAK.set(before);
    let result = work();
    let peak_bytes = usize::try_from(PEAK.get() - before).unwrap_or(0);
    (result, Usage { peak_bytes, allocations: CALLS.get() - calls })
}
