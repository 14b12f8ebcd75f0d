//! Rows that cross between GPU and CPU inside a step (`crossing.cu`). They lie in host memory that
//! the GPU reads and writes over the bus, with a flag each way that says which event has been
//! reached ([`event_number`](crate::event_number)).

use crate::event::has_reached;
use crate::gpu::{DeviceMemory, Gpu, GpuError, Span};
use crate::pinned::PinnedMemory;
use cudarc::driver::DeviceRepr;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where flags lie, and the rows: what GPU and CPU write lies in lines of its own. The GPU reads
/// `done` and `released` at once.
const HANDED: usize = 0;
const DONE: usize = 128;
const RELEASED: usize = DONE + 4;
const ROWS: usize = 256;

const THREADS: usize = 512;
/// As many as keep the bus busy (`crossing.cu`).
const BLOCKS_MAX: usize = 4;
/// Elements that are copied at once.
const QUAD: usize = 4;

/// Host memory in which rows cross between GPU and CPU inside a step, `[rows, cols]` f32 each way.
/// Waits of the GPU end when it is dropped.
pub struct Crossing {
    memory: PinnedMemory,
    /// The GPU's address of that memory.
    start: u64,
    /// Blocks of a launch that have written: one u32.
    finished: DeviceMemory,
    rows: usize,
    cols: usize,
}

/// What the CPU's threads use of a [`Crossing`].
#[derive(Clone, Copy, Debug)]
pub struct CrossingHost<'a> {
    start: NonNull<u8>,
    /// Of the rows of one way.
    elements: usize,
    lifetime: PhantomData<&'a Crossing>,
}

// SAFETY: flags are atomics, and rows are raw pointers, whose contract is told where they are made.
unsafe impl Send for CrossingHost<'_> {}
// SAFETY: as above.
unsafe impl Sync for CrossingHost<'_> {}

#[repr(C)]
#[derive(Clone, Copy)]
struct CrossingArgs {
    from: u64,
    to: u64,
    flags: u64,
    base: u64,
    finished: u64,
    quads: u32,
    index: u32,
}

// SAFETY: plain numbers in the order of `CrossingArgs` in crossing.cu.
unsafe impl DeviceRepr for CrossingArgs {}

impl Gpu {
    /// Memory in which up to `rows` rows of `cols` elements cross, each way.
    ///
    /// # Errors
    /// No memory, here or there.
    ///
    /// # Panics
    /// When a row is no multiple of 4.
    pub fn crossing(&self, rows: usize, cols: usize) -> Result<Crossing, GpuError> {
        assert!(cols.is_multiple_of(QUAD), "rows are copied in fours, got {cols}");
        let memory = self.alloc_pinned(ROWS + 2 * way_bytes(rows * cols))?;
        let start = self.address_of(&memory)?;
        let finished = self.alloc(size_of::<u32>())?;
        Ok(Crossing { memory, start, finished, rows, cols })
    }

    /// Starts a kernel that copies `rows` rows `[rows, cols]` f32 to the host's side and then says
    /// that event `index` of the step has come.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When there are not so many rows, here or there.
    pub fn hand_over(
        &self,
        crossing: &Crossing,
        from: Span<'_>,
        rows: usize,
        event: (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        let elements = crossing.elements(rows);
        let from = from.of(elements, size_of::<f32>());
        let to = crossing.start + ROWS as u64;
        crossing.launch(self, ("hand_over", HANDED), (from, to, elements), event)
    }

    /// Starts a kernel that waits until the CPU is done with event `index` of the step, or has
    /// released the GPU, and then copies `rows` rows of the GPU's side to `to`, `[rows, cols]` f32.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When there are not so many rows, here or there.
    pub fn take_back(
        &self,
        crossing: &Crossing,
        to: Span<'_>,
        rows: usize,
        event: (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        let elements = crossing.elements(rows);
        let to = to.of(elements, size_of::<f32>());
        let from = crossing.start + (ROWS + way_bytes(crossing.rows * crossing.cols)) as u64;
        crossing.launch(self, ("take_back", DONE), (from, to, elements), event)
    }
}

/// Bytes of the rows of one way.
fn way_bytes(elements: usize) -> usize {
    (elements * size_of::<f32>()).next_multiple_of(ROWS)
}

impl Crossing {
    /// What the CPU's threads use.
    pub fn host(&self) -> CrossingHost<'_> {
        let (start, elements) = (self.memory.start(), self.rows * self.cols);
        CrossingHost { start, elements, lifetime: PhantomData }
    }

    /// Bytes of host memory held.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Elements of some rows.
    fn elements(&self, rows: usize) -> usize {
        assert!(rows <= self.rows, "{rows} rows cross where there is room for {}", self.rows);
        rows * self.cols
    }

    fn launch(
        &self,
        gpu: &Gpu,
        (kernel, flags): (&str, usize),
        (from, to, elements): (u64, u64, usize),
        (base, index): (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        let quads = elements / QUAD;
        let arguments = CrossingArgs {
            from,
            to,
            flags: self.start + flags as u64,
            base: base.of(1, size_of::<u32>()),
            finished: self.finished.span().of(1, size_of::<u32>()),
            quads: quads as u32,
            index: index as u32,
        };
        // Without rows the event takes place all the same.
        let blocks = quads.div_ceil(THREADS).clamp(1, BLOCKS_MAX);
        // SAFETY: both sides have as many elements (checked), and launches follow each other.
        unsafe { gpu.launch(kernel, ([blocks, 1, 1], THREADS, 0), &arguments) }
    }
}

impl Drop for Crossing {
    fn drop(&mut self) {
        // The memory is freed when the GPU has come past all that uses it.
        self.host().release();
    }
}

impl<'a> CrossingHost<'a> {
    /// Whether the GPU has handed over the rows of the event with this number.
    pub fn has_reached(&self, number: u32) -> bool {
        has_reached(self.flag(HANDED).load(Ordering::Acquire), number)
    }

    /// Where the rows lie that the GPU hands over, `[rows, cols]` f32. They may be read from when
    /// their event [has been reached](Self::has_reached) until the CPU is [done](Self::done) with
    /// the event that the GPU waits for before it hands over the next ones.
    pub fn rows_in(&self) -> *const f32 {
        // SAFETY: the rows lie behind the flags, in the same memory.
        unsafe { self.start.as_ptr().add(ROWS).cast() }
    }

    /// Where the GPU takes rows back from, `[rows, cols]` f32, and how many elements these are.
    /// They may be written from when an event [has been reached](Self::has_reached), whose rows the
    /// GPU handed over after it took the last ones back, until the CPU is [done](Self::done).
    pub fn rows_out(&self) -> (*mut f32, usize) {
        // SAFETY: these rows lie behind the others, in the same memory.
        let rows = unsafe { self.start.as_ptr().add(ROWS + way_bytes(self.elements)) };
        (rows.cast(), self.elements)
    }

    /// Says that the rows of the event with this number are there to be taken back.
    pub fn done(&self, number: u32) {
        self.flag(DONE).store(number, Ordering::Release);
    }

    /// Ends all waits of the GPU, for good: for when the CPU can't go on.
    /// What the GPU takes back then is whatever lies there.
    pub fn release(&self) {
        self.flag(RELEASED).store(1, Ordering::Release);
    }

    fn flag(&self, place: usize) -> &'a AtomicU32 {
        // SAFETY: the memory outlives the borrow, flags are aligned, and are only used as atomics.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().add(place).cast()) }
    }
}
