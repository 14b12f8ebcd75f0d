//! Weights that stream from the host's memory through a ring of slots while the GPU computes.
//!
//! A stream of the ring's own copies pieces to slots, piece `index` of a step to slot `index`
//! modulo their number. The compute stream takes them apart one after the other. Two flags tell one
//! what the other has done: `arrived` and `consumed`. They lie in host memory, and all that the
//! stream of the ring waits for is the host's to wait for. Pieces are events of a step
//! ([`event_number`]), so that the takes can be recorded and replayed.

use crate::event::{event_number, has_reached};
use crate::fate::OnGpu;
use crate::gpu::{DeviceMemory, Gpu, GpuError, Span};
use crate::pack::{DeviceMatrix, has_planes};
use crate::pinned::PinnedMemory;
use crate::registered::pieces;
use cudarc::driver::{CudaEvent, CudaStream, result, sys};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tandem_cpu_kernels::Layout;

/// Between two looks at flags and copies.
const LOOK_EVERY: Duration = Duration::from_micros(10);
/// Slots start at multiples of this.
const SLOT_ALIGNMENT: usize = 256;
/// Where flags lie in host memory: `released` is the host's.
const CONSUMED: usize = 0;
const ARRIVED: usize = 128;
const RELEASED: usize = 256;
const HOST_BYTES: usize = 384;

/// A ring of slots in the GPU's memory and a stream of its own that fills it. Waits end when it is
/// dropped.
pub struct WeightRing {
    // Dropped first: it waits for all streams of the GPU.
    host: PinnedMemory,
    /// The GPU's address of that memory.
    host_start: u64,
    memory: DeviceMemory,
    /// Blocks of a launch that have moved their part of a piece: one u32.
    moved: DeviceMemory,
    stream: OnGpu<Arc<CudaStream>>,
    /// By slot: behind the last copy to it.
    copied: Vec<OnGpu<CudaEvent>>,
    slot_bytes: usize,
}

// SAFETY: its host memory is used as atomics alone, and streams may be used by any thread.
unsafe impl Sync for WeightRing {}

impl Gpu {
    /// A ring of `slots` slots for pieces of up to `slot_bytes` bytes.
    ///
    /// # Errors
    /// No memory, here or there, or what the driver refuses.
    ///
    /// # Panics
    /// Without slots.
    pub fn weight_ring(&self, slots: usize, slot_bytes: usize) -> Result<WeightRing, GpuError> {
        assert!(slots > 0, "a ring has slots");
        let memory = self.alloc(WeightRing::bytes_of((slots, slot_bytes)))?;
        let slot_bytes = slot_bytes.next_multiple_of(SLOT_ALIGNMENT);
        let moved = self.alloc(size_of::<u32>())?;
        let host = self.alloc_pinned(HOST_BYTES)?;
        let host_start = self.address_of(&host)?;
        let stream = self.new_stream()?;
        let copied = (0..slots).map(|_| self.new_event()).collect::<Result<_, _>>()?;
        // The ring's stream starts with memory that the other has cleared.
        self.synchronize()?;
        Ok(WeightRing { host, host_start, memory, moved, stream, copied, slot_bytes })
    }
}

impl WeightRing {
    /// Copies the pieces of a step to the GPU in their order, each as its slot becomes free, and
    /// says of each that it has arrived: for a thread of its own, after the step before has been
    /// waited for, in the step's [turn](Gpu::stream_turn). Ends early where `gives_up` says so, or
    /// the ring is released.
    ///
    /// All waiting is the host's. Where the ring's stream waits for a flag, or writes one, the
    /// driver may put that behind, or before, work of the other stream that waits for it: it knows
    /// nothing of flags.
    ///
    /// # Safety
    /// The bytes stay as they are until the ring [has been waited for](Self::synchronize).
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a slot is smaller than a piece.
    pub unsafe fn send<'b>(
        &self,
        gpu: &Gpu,
        base: u32,
        pieces: impl IntoIterator<Item = &'b [u8]>,
        gives_up: impl Fn() -> bool,
    ) -> Result<(), GpuError> {
        let (mut sent, mut arrived) = (0, 0);
        let mut pieces = pieces.into_iter();
        let mut next = pieces.next();
        while next.is_some() || arrived < sent {
            if arrived < sent && self.has_come(gpu, arrived)? {
                self.host_flag(ARRIVED).store(event_number(base, arrived), Ordering::Release);
                arrived += 1;
            } else if let Some(piece) = next.filter(|_| self.has_room((base, sent))) {
                // SAFETY: as the caller promises.
                unsafe { self.copy(gpu, piece, sent)? };
                sent += 1;
                next = pieces.next();
            } else if gives_up() || self.host_flag(RELEASED).load(Ordering::Acquire) != 0 {
                return Ok(());
            } else {
                // A piece takes longer, and several are on their way.
                std::thread::sleep(LOOK_EVERY);
            }
        }
        Ok(())
    }

    /// Whether the slot of piece `index` of the step with this base is free: whether what lay there
    /// in this step was taken.
    fn has_room(&self, (base, index): (u32, usize)) -> bool {
        let before = index.checked_sub(self.copied.len());
        let consumed = self.host_flag(CONSUMED).load(Ordering::Acquire);
        before.is_none_or(|before| has_reached(consumed, event_number(base, before)))
    }

    /// Whether the copy of piece `index` is done.
    fn has_come(&self, gpu: &Gpu, index: usize) -> Result<bool, GpuError> {
        let event = &self.copied[index % self.copied.len()];
        // SAFETY: the event lives.
        match unsafe { result::event::query(event.cu_event()) } {
            Ok(()) => Ok(true),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => Err(gpu.failed("copying to it", error)),
        }
    }

    /// Starts the copy of piece `index` to its slot.
    ///
    /// # Safety
    /// As of [`WeightRing::send`].
    unsafe fn copy(&self, gpu: &Gpu, bytes: &[u8], index: usize) -> Result<(), GpuError> {
        let slot = self.slot(index, bytes.len());
        gpu.bound()?;
        let start = bytes.as_ptr().addr();
        for piece in pieces(start..start + bytes.len()) {
            let part = piece.start - start..piece.end - start;
            let to = slot.part(part.start, part.len()).unaligned(part.len(), 1);
            // SAFETY: the slot holds as many bytes; the caller keeps them as they are.
            unsafe { result::memcpy_htod_async(to, &bytes[part], self.stream.cu_stream()) }
                .map_err(|error| gpu.failed("copying to it", error))?;
        }
        let event = &self.copied[index % self.copied.len()];
        event.record(&self.stream).map_err(|error| gpu.failed("marking its work", error))
    }

    /// Starts kernels that wait until piece `index` of the step has arrived, take it apart into
    /// some rows of a matrix, and then say that its slot is free. They come in the layout in which
    /// the CPU's kernels read them.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a slot is smaller than the rows, the matrix is not [made for
    /// this](DeviceMatrix::changing), or as [`DeviceMatrix::pack_rows16`] and
    /// [`DeviceMatrix::pack`].
    pub fn take(
        &self,
        gpu: &Gpu,
        (matrix, layout, rows): (&DeviceMatrix, Layout, Range<usize>),
        (base, index): (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        assert!(matrix.is_changing(), "products would read what was there before");
        let slot = self.slot(index, matrix.piece_bytes(layout, &rows));
        let (event, consumed) = ((base, index), self.flag(CONSUMED));
        let (arrived, released) = (self.flag(ARRIVED), self.flag(RELEASED));
        // SAFETY: the flags live as long as the ring, and it waits for the GPU when it is dropped.
        unsafe { gpu.await_event((arrived, released), event) }?;
        match layout {
            Layout::Rows16 => matrix.pack_rows16(gpu, slot, rows)?,
            Layout::RowMajor if has_planes(matrix.dtype()) => matrix.pack(gpu, slot, rows)?,
            Layout::RowMajor => {
                let moved = (slot, matrix.float_rows(rows));
                // SAFETY: as above.
                return unsafe { gpu.move_and_raise(moved, (consumed, self.moved.span()), event) };
            }
        }
        // SAFETY: as above.
        unsafe { gpu.raise_event(consumed, event) }
    }

    /// Waits until all that was sent has arrived: before the memory it came from is freed.
    ///
    /// # Errors
    /// What the GPU failed with before, or [`GpuError::Hung`].
    pub fn synchronize(&self, gpu: &Gpu) -> Result<(), GpuError> {
        gpu.wait_for(&self.stream)
    }

    /// Ends all waits, the GPU's for pieces and the host's for slots, for good: for when not all
    /// pieces of a step are sent, or taken. What the step computes then is of no use.
    pub fn release(&self) {
        self.host_flag(RELEASED).store(1, Ordering::Release);
    }

    /// Bytes that some slots for pieces of up to so many bytes take on a GPU.
    pub fn bytes_of((slots, slot_bytes): (usize, usize)) -> usize {
        slots * slot_bytes.next_multiple_of(SLOT_ALIGNMENT)
    }

    /// Bytes of the GPU's memory held.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The GPU's address of a flag.
    fn flag(&self, place: usize) -> u64 {
        self.host_start + place as u64
    }

    fn slot(&self, index: usize, bytes: usize) -> Span<'_> {
        assert!(bytes <= self.slot_bytes, "{bytes} bytes into a slot of {}", self.slot_bytes);
        let start = index % self.copied.len() * self.slot_bytes;
        self.memory.span().part(start, bytes)
    }

    fn host_flag(&self, place: usize) -> &AtomicU32 {
        // SAFETY: the memory is this value's, flags are aligned, and only used as atomics.
        unsafe { AtomicU32::from_ptr(self.host.start().as_ptr().add(place).cast()) }
    }
}

impl Drop for WeightRing {
    fn drop(&mut self) {
        self.release();
    }
}
