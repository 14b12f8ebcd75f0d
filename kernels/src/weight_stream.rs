//! Weights that stream from the host's memory through a ring of slots while the GPU computes.
//!
//! A stream of the ring's own copies pieces to slots, piece `index` of a step to slot `index` modulo
//! their number. The compute stream takes them apart one after the other. Two flags tell one what
//! the other has done: `arrived` and `consumed`. They lie in host memory, since streams refuse flags
//! in what they allocate. Pieces are events of a step ([`event_number`]), so that the takes can be
//! recorded and replayed.

use crate::event::{event_number, has_reached};
use crate::fate::OnGpu;
use crate::gpu::{DeviceMemory, Gpu, GpuError, Span};
use crate::pack::DeviceMatrix;
use crate::pinned::PinnedMemory;
use crate::registered::pieces;
use cudarc::driver::{CudaStream, result, sys};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

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
    stream: OnGpu<Arc<CudaStream>>,
    slots: usize,
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
        let slot_bytes = slot_bytes.next_multiple_of(SLOT_ALIGNMENT);
        let memory = self.alloc(slots * slot_bytes)?;
        let host = self.alloc_pinned(HOST_BYTES)?;
        let host_start = self.address_of(&host)?;
        let stream = self.stream().context().new_stream();
        let stream = stream.map_err(|error| self.failed("making a stream", error))?;
        let stream = OnGpu::new(stream, self);
        // The ring's stream starts with memory that the other has cleared.
        self.synchronize()?;
        Ok(WeightRing { host, host_start, memory, stream, slots, slot_bytes })
    }
}

impl WeightRing {
    /// Whether the slot of piece `index` of the step with this base is free: whether what lay there
    /// in this step was taken, or the ring is released.
    ///
    /// The ring's stream does not wait for that itself. The driver knows nothing of such a wait, and
    /// may put work of the other stream behind it that it waits for.
    pub fn has_room(&self, (base, index): (u32, usize)) -> bool {
        let Some(before) = index.checked_sub(self.slots) else { return true };
        let flag = |place| self.host_flag(place).load(Ordering::Acquire);
        has_reached(flag(CONSUMED), event_number(base, before)) || flag(RELEASED) != 0
    }

    /// Lets the ring's stream copy a piece to its slot, which [has room](Self::has_room), and say
    /// that piece `index` of the step with this base has arrived. Pieces of a step are sent in their
    /// order, after the step before has been waited for. Does not block when the bytes are
    /// [registered](crate::RegisteredMemory).
    ///
    /// # Safety
    /// The bytes stay as they are until the step has been waited for, or the ring has.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a slot is smaller.
    pub unsafe fn send(
        &self,
        gpu: &Gpu,
        bytes: &[u8],
        (base, index): (u32, usize),
    ) -> Result<(), GpuError> {
        let slot = self.slot(index, bytes.len());
        gpu.bound()?;
        let stream = self.stream.cu_stream();
        let number = event_number(base, index);
        let start = bytes.as_ptr().addr();
        for piece in pieces(start..start + bytes.len()) {
            let part = piece.start - start..piece.end - start;
            let to = slot.part(part.start, part.len()).unaligned(part.len(), 1);
            // SAFETY: the slot holds as many bytes; the caller keeps them as they are.
            unsafe { result::memcpy_htod_async(to, &bytes[part], stream) }
                .map_err(|error| gpu.failed("copying to it", error))?;
        }
        // The flag is written behind what the copy wrote.
        let flags = sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
        // SAFETY: the flag lives as long as the stream.
        unsafe { sys::cuStreamWriteValue32_v2(stream, self.flag(ARRIVED), number, flags) }
            .result()
            .map_err(|error| gpu.failed("saying that weights arrived", error))
    }

    /// Starts kernels that wait until piece `index` of the step has arrived, take it apart into all
    /// rows of a matrix, and then say that its slot is free. Quantised weights come as
    /// `Layout::Rows16`, others row by row.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a slot is smaller than the matrix, or the matrix is not [made for
    /// this](DeviceMatrix::changing).
    pub fn take(
        &self,
        gpu: &Gpu,
        matrix: &DeviceMatrix,
        (base, index): (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        assert!(matrix.is_changing(), "products would read what was there before");
        let slot = self.slot(index, matrix.piece_bytes());
        let (arrived, released) = (self.flag(ARRIVED), self.flag(RELEASED));
        // SAFETY: the flags live as long as the ring, and it waits for the GPU when it is dropped.
        unsafe { gpu.await_event((arrived, released), (base, index)) }?;
        if matrix.dtype().is_quantized() {
            matrix.pack_rows16(gpu, slot)?;
        } else {
            matrix.pack(gpu, slot, 0..matrix.rows())?;
        }
        // SAFETY: as above.
        unsafe { gpu.raise_event(self.flag(CONSUMED), (base, index)) }
    }

    /// Waits until all that was sent has arrived: before the memory it came from is freed.
    ///
    /// # Errors
    /// What the GPU failed with before, or [`GpuError::Hung`].
    pub fn synchronize(&self, gpu: &Gpu) -> Result<(), GpuError> {
        gpu.wait_for(&self.stream)
    }

    /// Ends all waits, the GPU's for pieces and the host's for slots, now and until
    /// [`WeightRing::rearm`]: for when not all pieces of a step are sent, or taken. What the step
    /// computes then is of no use.
    pub fn release(&self) {
        self.host_flag(RELEASED).store(1, Ordering::Release);
    }

    /// Makes it ready for a next step after [`WeightRing::release`]. The GPU must have been waited
    /// for, and the ring.
    pub fn rearm(&mut self) {
        self.host_flag(RELEASED).store(0, Ordering::Release);
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
        let start = index % self.slots * self.slot_bytes;
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
