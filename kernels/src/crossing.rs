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
/// The same where nothing crosses, for each multiprocessor: as many as it has threads for.
const MOVING_BLOCKS: usize = 4;
/// Elements that are copied at once.
const QUAD: usize = 4;
const QUAD_BYTES: usize = QUAD * size_of::<f32>();

/// Host memory in which rows of f32 cross between GPU and CPU inside a step, each way in memory of
/// its own. Waits of the GPU end when it is dropped.
pub struct Crossing {
    memory: PinnedMemory,
    /// The GPU's address of that memory.
    start: u64,
    /// Blocks of a launch that have written: one u32.
    finished: DeviceMemory,
    ways: Ways,
}

/// Elements that there is room for on either way.
#[derive(Clone, Copy, Debug)]
struct Ways {
    to_cpu: usize,
    to_gpu: usize,
}

/// What the CPU's threads use of a [`Crossing`].
#[derive(Clone, Copy, Debug)]
pub struct CrossingHost<'a> {
    start: NonNull<u8>,
    ways: Ways,
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
    /// Memory in which up to so many elements cross, to the CPU and back to the GPU.
    ///
    /// # Errors
    /// No memory, here or there.
    pub fn crossing(&self, [to_cpu, to_gpu]: [usize; 2]) -> Result<Crossing, GpuError> {
        let memory = self.alloc_pinned(ROWS + way_bytes(to_cpu) + way_bytes(to_gpu))?;
        let start = self.address_of(&memory)?;
        let finished = self.alloc(size_of::<u32>())?;
        Ok(Crossing { memory, start, finished, ways: Ways { to_cpu, to_gpu } })
    }

    /// Starts a kernel that copies `elements` f32 to the host's side and then says that event
    /// `index` of the step has come.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When there are not so many elements, here or there, or they are no multiple of 4.
    pub fn hand_over(
        &self,
        crossing: &Crossing,
        from: Span<'_>,
        elements: usize,
        event: (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        let room = crossing.ways.to_cpu;
        assert!(elements <= room, "{elements} elements cross where there is room for {room}");
        let from = from.of(elements, size_of::<f32>());
        let to = crossing.start + ROWS as u64;
        crossing.launch(self, ("hand_over", HANDED), (from, to, elements), event)
    }

    /// Starts a kernel that waits until the CPU is done with event `index` of the step, or has
    /// released the GPU, and then copies `elements` f32 of the GPU's side to `to`.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When there are not so many elements, here or there, or they are no multiple of 4.
    pub fn take_back(
        &self,
        crossing: &Crossing,
        to: Span<'_>,
        elements: usize,
        event: (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        let Ways { to_cpu, to_gpu: room } = crossing.ways;
        assert!(elements <= room, "{elements} elements cross where there is room for {room}");
        let to = to.of(elements, size_of::<f32>());
        let from = crossing.start + (ROWS + way_bytes(to_cpu)) as u64;
        crossing.launch(self, ("take_back", DONE), (from, to, elements), event)
    }

    /// Starts the kernel that hands rows over on bytes that stay inside the GPU; at last it sets a
    /// flag to event `index`. `finished` is a u32, which is 0 between launches.
    ///
    /// A copy of the driver's would do the same, but might wait at a copy engine behind those from
    /// the host.
    ///
    /// # Safety
    /// The GPU can write the flag until it has come past this.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When the lengths differ, or are no multiple of 16.
    pub(crate) unsafe fn move_and_raise(
        &self,
        (from, to): (Span<'_>, Span<'_>),
        (flag, finished): (u64, Span<'_>),
        (base, index): (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        let bytes = from.bytes();
        assert!(bytes == to.bytes() && bytes.is_multiple_of(QUAD_BYTES), "{from:?} to {to:?}");
        let quads = bytes / QUAD_BYTES;
        let arguments = CrossingArgs {
            from: from.of(bytes, 1),
            to: to.of(bytes, 1),
            flags: flag,
            base: base.of(1, size_of::<u32>()),
            finished: finished.of(1, size_of::<u32>()),
            quads: quads as u32,
            index: index as u32,
        };
        let blocks = quads.div_ceil(THREADS).clamp(1, MOVING_BLOCKS * self.multiprocessors());
        // SAFETY: both spans have as many bytes (checked), and launches follow each other.
        unsafe { self.launch("hand_over", ([blocks, 1, 1], THREADS, 0), &arguments) }
    }
}

/// Bytes of the rows of one way.
fn way_bytes(elements: usize) -> usize {
    (elements * size_of::<f32>()).next_multiple_of(ROWS)
}

impl Crossing {
    /// What the CPU's threads use.
    pub fn host(&self) -> CrossingHost<'_> {
        CrossingHost { start: self.memory.start(), ways: self.ways, lifetime: PhantomData }
    }

    /// Bytes of host memory held.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    fn launch(
        &self,
        gpu: &Gpu,
        (kernel, flags): (&str, usize),
        (from, to, elements): (u64, u64, usize),
        (base, index): (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        assert!(elements.is_multiple_of(QUAD), "rows are copied in fours, got {elements}");
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

    /// Where the rows lie that the GPU hands over, f32, and how many elements these are at most.
    /// They may be read from when their event [has been reached](Self::has_reached) until the CPU
    /// is [done](Self::done) with the event that the GPU waits for before it hands over the next
    /// ones.
    pub fn rows_in(&self) -> (*const f32, usize) {
        // SAFETY: the rows lie behind the flags, in the same memory.
        let rows = unsafe { self.start.as_ptr().add(ROWS) };
        (rows.cast_const().cast(), self.ways.to_cpu)
    }

    /// Where the GPU takes rows back from, f32, and how many elements these are at most.
    /// They may be written from when an event [has been reached](Self::has_reached), whose rows the
    /// GPU handed over after it took the last ones back, until the CPU is [done](Self::done).
    pub fn rows_out(&self) -> (*mut f32, usize) {
        // SAFETY: these rows lie behind the others, in the same memory.
        let rows = unsafe { self.start.as_ptr().add(ROWS + way_bytes(self.ways.to_cpu)) };
        (rows.cast(), self.ways.to_gpu)
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
