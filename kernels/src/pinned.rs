//! Host memory that the GPU copies from and to by itself.

use crate::fate::Fate;
use crate::gpu::{Gpu, GpuError, Span};
use cudarc::driver::{CudaContext, DriverError, result, sys};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Page-locked host memory; freed when dropped, after all copies from and to it. That of a GPU that
/// is lost stays: nobody knows when its copies end.
pub struct PinnedMemory {
    start: NonNull<u8>,
    bytes: usize,
    context: Arc<CudaContext>,
    fate: Arc<Fate>,
}

// SAFETY: it is plain memory that this value owns.
unsafe impl Send for PinnedMemory {}
// SAFETY: shared references only read it; what uses its start says who writes when.
unsafe impl Sync for PinnedMemory {}

impl Gpu {
    /// `bytes` zeroed bytes of pinned host memory, aligned to a page.
    ///
    /// # Errors
    /// [`GpuError::HostOutOfMemory`] where the system has no memory to lock, or what the driver
    /// refuses.
    pub fn alloc_pinned(&self, bytes: usize) -> Result<PinnedMemory, GpuError> {
        self.bound()?;
        let (_turn, bytes) = (self.turn(), bytes.max(1));
        // SAFETY: the context is this thread's; the memory is initialised below.
        let start = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|error| self.not_locked("locking host memory", bytes, error))?;
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| GpuError::Failed {
            ordinal: self.ordinal(),
            what: "locking host memory",
            reason: "the driver gave none".into(),
        })?;
        // SAFETY: as many bytes were just allocated.
        unsafe { start.write_bytes(0, bytes) };
        let context = Arc::clone(self.stream().context());
        Ok(PinnedMemory { start, bytes, context, fate: Arc::clone(self.fate()) })
    }

    /// What a refusal to lock so many bytes of host memory means: it is the system that lacks them.
    pub(crate) fn not_locked(
        &self,
        what: &'static str,
        bytes: usize,
        error: DriverError,
    ) -> GpuError {
        let is_full = lacks_memory(self.ordinal(), bytes, error);
        is_full.unwrap_or_else(|| self.failed(what, error))
    }

    /// Whether host memory is pinned or registered, so that the GPU copies from it by itself.
    pub(crate) fn knows(&self, address: usize) -> bool {
        let mut kind = 0u32;
        let mut which = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        let mut to = (&raw mut kind).cast();
        // SAFETY: there is one attribute, whose answer is 32 bits; any address may be asked about.
        let told =
            unsafe { sys::cuPointerGetAttributes(1, &raw mut which, &raw mut to, address as u64) };
        // Of all other memory it is 0.
        told == sys::CUresult::CUDA_SUCCESS && kind == sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32
    }

    /// Where kernels find pinned memory.
    ///
    /// # Errors
    /// What the driver refuses.
    pub(crate) fn address_of(&self, memory: &PinnedMemory) -> Result<u64, GpuError> {
        let mut address = 0;
        self.bound()?;
        // SAFETY: the memory was made by the driver, and flags must be 0.
        unsafe {
            sys::cuMemHostGetDevicePointer_v2(&raw mut address, memory.start.as_ptr().cast(), 0)
        }
        .result()
        .map_err(|error| self.failed("finding host memory", error))?;
        Ok(address)
    }

    /// Starts a copy of the first `bytes` bytes to the start of a span.
    ///
    /// # Safety
    /// The memory lives and is not written until the GPU has come past the copy.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When there are not so many bytes, here or there.
    pub unsafe fn send(
        &self,
        from: &PinnedMemory,
        bytes: usize,
        to: Span<'_>,
    ) -> Result<(), GpuError> {
        let to = to.of(bytes, 1);
        self.bound()?;
        // SAFETY: both hold as many bytes; the caller keeps the memory as it is.
        unsafe { result::memcpy_htod_async(to, &from[..bytes], self.stream().cu_stream()) }
            .map_err(|error| self.failed("copying to it", error))
    }

    /// Starts a copy from the start of a span to the first `bytes` bytes.
    ///
    /// # Safety
    /// The memory lives and is not used until the GPU has come past the copy.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When there are not so many bytes, here or there.
    pub unsafe fn fetch(
        &self,
        from: Span<'_>,
        to: &mut PinnedMemory,
        bytes: usize,
    ) -> Result<(), GpuError> {
        let from = from.of(bytes, 1);
        self.bound()?;
        let stream = self.stream().cu_stream();
        // SAFETY: both hold as many bytes; the caller leaves the memory alone.
        unsafe { result::memcpy_dtoh_async(&mut to[..bytes], from, stream) }
            .map_err(|error| self.failed("copying from it", error))
    }

    /// Copies spans one behind the other to the start of pinned memory, and waits for them.
    ///
    /// # Errors
    /// What the driver refuses, or what any kernel before has failed with.
    ///
    /// # Panics
    /// When they do not fit.
    pub fn download_pinned(
        &self,
        from: &[Span<'_>],
        to: &mut PinnedMemory,
    ) -> Result<(), GpuError> {
        let need: usize = from.iter().map(Span::bytes).sum();
        assert!(need <= to.bytes, "{need} bytes into {}", to.bytes);
        self.bound()?;
        let (mut rest, stream) = (&mut to[..], self.stream().cu_stream());
        let started = from.iter().try_for_each(|span| {
            let (part, others) = std::mem::take(&mut rest).split_at_mut(span.bytes());
            rest = others;
            // SAFETY: both have as many bytes; whatever was started is waited for below.
            unsafe { result::memcpy_dtoh_async(part, span.unaligned(part.len(), 1), stream) }
        });
        self.synchronize()?;
        started.map_err(|error| self.failed("copying from it", error))
    }
}

/// What a refusal to lock memory means where there is too little of it: nothing that ends the GPU.
fn lacks_memory(ordinal: usize, need_bytes: usize, error: DriverError) -> Option<GpuError> {
    let is_full = error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    is_full.then_some(GpuError::HostOutOfMemory { ordinal, need_bytes })
}

impl PinnedMemory {
    /// Its start, for what GPU and CPU use at once.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Deref for PinnedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: it owns as many initialised bytes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl DerefMut for PinnedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: it owns as many initialised bytes, alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if let Some(_turn) = self.fate.at_rest(&self.context) {
            // SAFETY: it came from `malloc_host`, and is freed once. A failure has no one to be
            // told to.
            let _ = unsafe { sys::cuMemFreeHost(self.start.as_ptr().cast()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_to_lock_is_told_from_other_refusals() {
        let of = |code| lacks_memory(1, 4096, DriverError(code));
        let full = of(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY).expect("a refusal of its own");
        assert_eq!(full, GpuError::HostOutOfMemory { ordinal: 1, need_bytes: 4096 });
        let said = "the system has no 4096 bytes of memory to lock for GPU 1";
        assert_eq!(full.to_string(), said);
        for code in
            [sys::CUresult::CUDA_ERROR_INVALID_VALUE, sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS]
        {
            assert_eq!(of(code), None, "{code:?}");
        }
    }
}
