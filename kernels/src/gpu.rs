//! One GPU of this process: its context, one stream, the loaded kernels, and memory.
//!
//! All work goes to one stream, in the order of the calls, and none of them waits but those that
//! say so. Memory is addressed by [`Span`]s, which launchers check against the shapes they are
//! given: a kernel never gets less memory than it touches.

use crate::driver::Driver;
use crate::fate::{Fate, OnGpu, failure};
use crate::turns::Turn;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, result, sys,
};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

pub use crate::gpu_error::GpuError;

/// The compiled kernels of all architectures (`build.rs`).
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// A kernel of every architecture.
pub(crate) const ANY_KERNEL: &str = "take_back";

/// The compute capability whose kernels use wgmma.
pub(crate) const WGMMA_CAPABILITY: (u32, u32) = (9, 0);

/// An open GPU.
pub struct Gpu {
    stream: Arc<CudaStream>,
    pub(crate) module: Arc<CudaModule>,
    pub(crate) functions: Mutex<HashMap<String, (CudaFunction, bool)>>,
    multiprocessors: usize,
    shared_bytes: usize,
    has_wgmma: bool,
    compiled_for: usize,
    fate: Arc<Fate>,
    /// While it is dropped, until all of the above is.
    last_turn: Option<Turn<'static>>,
}

/// Memory of a GPU; freed when dropped.
pub struct DeviceMemory {
    slice: OnGpu<CudaSlice<u8>>,
    bytes: usize,
}

/// A part of a GPU's memory. The GPU works in the order of its stream, so a span may be read and
/// written by one kernel after the other; it lives as long as its memory is borrowed.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    pub(crate) pointer: u64,
    bytes: usize,
    lifetime: PhantomData<&'a DeviceMemory>,
}

impl Gpu {
    /// Opens a GPU and loads the kernels.
    ///
    /// # Errors
    /// [`GpuError::Unsupported`] for a GPU that our kernels were not compiled for, or what the
    /// driver refuses.
    pub fn open(_driver: &Driver, ordinal: usize) -> Result<Gpu, GpuError> {
        Self::with_fate(ordinal, Arc::default())
    }

    /// Opens another GPU, or the same once more with a stream of its own, for work that waits for
    /// this one's: what ends one of them for good ends both, and the error names it.
    ///
    /// # Errors
    /// As of [`Gpu::open`].
    pub fn open_beside(&self, ordinal: usize) -> Result<Gpu, GpuError> {
        Self::with_fate(ordinal, Arc::clone(&self.fate))
    }

    fn with_fate(ordinal: usize, fate: Arc<Fate>) -> Result<Gpu, GpuError> {
        let _turn = fate.taker().turn();
        let context = CudaContext::new(ordinal)
            .map_err(|error| failure(ordinal, "opening a context", error, || None))?;
        let free = || Some(context.mem_get_info().ok()?.0);
        let failed = |what| move |error| failure(ordinal, what, error, free);
        // SAFETY: this crate uses one stream, whose order is all the synchronisation there is.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(failed("making a stream"))?;
        let module = context.load_module(Ptx::from_binary(FATBIN.to_vec())).map_err(|error| {
            match failure(ordinal, "loading the kernels", error, free) {
                GpuError::Failed { reason, .. } => {
                    let capability = context.compute_capability().unwrap_or_default();
                    let name = context.name().unwrap_or_default();
                    let capability = format!("{}.{}", capability.0, capability.1);
                    GpuError::Unsupported { ordinal, name, capability, reason }
                }
                // It lacks memory, or is lost: nothing that another GPU's kernels would cure.
                other => other,
            }
        })?;
        use sys::CUdevice_attribute as Attribute;
        let attribute = |which| {
            let value = context.attribute(which).map_err(failed("what it has"))?;
            Ok::<_, GpuError>(value as usize)
        };
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_bytes =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let capability = context.compute_capability().map_err(failed("what it has"))?;
        let has_wgmma = (capability.0 as u32, capability.1 as u32) == WGMMA_CAPABILITY;
        use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PTX_VERSION as PTX_VERSION;
        let any = module.load_function(ANY_KERNEL).map_err(failed("finding a kernel"))?;
        let compiled_for = any.get_attribute(PTX_VERSION).map_err(failed("what a kernel has"))?;
        let compiled_for = compiled_for as usize;
        let functions = Mutex::default();
        Ok(Gpu {
            stream,
            module,
            functions,
            multiprocessors,
            shared_bytes,
            has_wgmma,
            compiled_for,
            fate,
            last_turn: None,
        })
    }

    /// Whether its kernels use wgmma.
    pub(crate) fn has_wgmma(&self) -> bool {
        self.has_wgmma
    }

    /// `__CUDA_ARCH__`, over ten, of the kernels that the driver has taken.
    pub(crate) fn compiled_for(&self) -> usize {
        self.compiled_for
    }

    /// Shared memory that a block may have, with what its kernel always has.
    pub(crate) fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    /// Lets a block have no more shared memory than some bytes, as on a smaller GPU: products with
    /// up to [`Gpu::narrow_max`] columns then take the kernels that they take there.
    pub fn limit_shared_bytes(&mut self, most: usize) {
        self.shared_bytes = self.shared_bytes.min(most);
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    pub(crate) fn fate(&self) -> &Arc<Fate> {
        &self.fate
    }

    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Index in the driver's order.
    pub fn ordinal(&self) -> usize {
        self.stream.context().ordinal()
    }

    /// Free and total bytes of the GPU's memory.
    ///
    /// # Errors
    /// The driver does not say.
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        self.bound()?;
        self.stream.context().mem_get_info().map_err(|error| self.failed("its memory", error))
    }

    /// `bytes` zeroed bytes, aligned to 256.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`] when there is no room.
    pub fn alloc(&self, bytes: usize) -> Result<DeviceMemory, GpuError> {
        self.bound()?;
        let _turn = self.turn();
        let slice = self.stream.alloc_zeros::<u8>(bytes.max(1)).map_err(|error| {
            match self.failed("allocating memory", error) {
                GpuError::OutOfMemory { ordinal, what, free_bytes, .. } => {
                    GpuError::OutOfMemory { ordinal, what, need_bytes: Some(bytes), free_bytes }
                }
                other => other,
            }
        })?;
        Ok(DeviceMemory { slice: OnGpu::new(slice, self), bytes })
    }

    /// Waits for all that was started, and has the driver take back what was freed. Until then it
    /// keeps that for the next allocations of this process: kernels and others can't have it.
    ///
    /// # Errors
    /// As of [`Gpu::synchronize`].
    pub fn give_back_freed(&self) -> Result<(), GpuError> {
        // Looking, as this does, is no synchronisation to the driver, the one after it is. It finds
        // nothing to wait for.
        self.synchronize()?;
        let _turn = self.turn();
        self.stream.synchronize().map_err(|error| self.failed("waiting for it", error))
    }

    /// Copies numbers to the start of a span. The numbers were read when this returns: pinned ones
    /// are waited for.
    ///
    /// # Errors
    /// What the driver refuses, or, of pinned numbers, what any kernel before has failed with.
    ///
    /// # Panics
    /// When they do not fit.
    pub fn upload<T: Plain>(&self, from: &[T], to: Span<'_>) -> Result<(), GpuError> {
        assert!(size_of_val(from) <= to.bytes, "{} bytes into {to:?}", size_of_val(from));
        if from.is_empty() {
            return Ok(());
        }
        self.bound()?;
        // SAFETY: the span holds as many bytes (asserted); the copy is ordered by the stream, and
        // over with `from` when this returns.
        unsafe { result::memcpy_htod_async(to.pointer, from, self.stream.cu_stream()) }
            .map_err(|error| self.failed("copying to it", error))?;
        // The driver has staged pageable memory by now. Pinned memory the GPU reads by itself, when
        // it comes to that.
        if self.knows(from.as_ptr().addr()) { self.synchronize() } else { Ok(()) }
    }

    /// Copies numbers from the start of a span and waits for them.
    ///
    /// # Errors
    /// What the driver refuses, or what any kernel before has failed with.
    ///
    /// # Panics
    /// When the span is shorter.
    pub fn download<T: Plain>(&self, from: Span<'_>, to: &mut [T]) -> Result<(), GpuError> {
        assert!(size_of_val(to) <= from.bytes, "{} bytes from {from:?}", size_of_val(to));
        // The driver waits for such a copy by itself, without an end.
        self.synchronize()?;
        if !to.is_empty() {
            // SAFETY: the span holds as many bytes (asserted), and `to` outlives the copy, since
            // the stream is waited for below.
            unsafe { result::memcpy_dtoh_async(to, from.pointer, self.stream.cu_stream()) }
                .map_err(|error| self.failed("copying from it", error))?;
        }
        self.synchronize()
    }

    /// Copies bytes between two spans of the same length.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn copy(&self, from: Span<'_>, to: Span<'_>) -> Result<(), GpuError> {
        assert_eq!(from.bytes, to.bytes, "lengths of a copy");
        self.bound()?;
        let stream = self.stream.cu_stream();
        // SAFETY: both spans are memory of this GPU of that length.
        unsafe { result::memcpy_dtod_async(to.pointer, from.pointer, from.bytes, stream) }
            .map_err(|error| self.failed("copying inside it", error))
    }

    /// Makes all bytes of a span 0.
    ///
    /// # Errors
    /// What the driver refuses.
    pub(crate) fn clear(&self, span: Span<'_>) -> Result<(), GpuError> {
        if span.bytes == 0 {
            return Ok(());
        }
        self.bound()?;
        // SAFETY: the span is memory of this GPU of that length.
        unsafe { result::memset_d8_async(span.pointer, 0, span.bytes, self.stream.cu_stream()) }
            .map_err(|error| self.failed("clearing memory", error))
    }

    /// Makes the context this thread's.
    ///
    /// # Errors
    /// What the GPU was lost with, or what the driver refuses.
    pub(crate) fn bound(&self) -> Result<(), GpuError> {
        self.fate.check()?;
        let context = self.stream.context();
        context.bind_to_thread().map_err(|error| self.failed("entering its context", error))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.fate.check().is_err() {
            // The module and the context would wait for the GPU, or crash, when they are dropped.
            std::mem::forget((Arc::clone(&self.module), Arc::clone(&self.stream)));
        } else {
            self.last_turn = Some(self.turn());
        }
    }
}

/// Numbers that have the same bytes here and on the GPU.
///
/// # Safety
/// All bytes of a value are initialised, and any bytes are a value: what lies on a GPU becomes
/// values as it is.
pub unsafe trait Plain: Copy {}
// SAFETY: an integer has no bytes that mean nothing, and takes any.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above, some of them being no numbers.
unsafe impl Plain for f32 {}
// SAFETY: two integers with nothing between them.
unsafe impl Plain for [u32; 2] {}

impl DeviceMemory {
    /// All of it.
    pub fn span(&self) -> Span<'_> {
        let stream = self.slice.stream();
        let (pointer, _order) = self.slice.device_ptr(stream);
        Span { pointer, bytes: self.slice.len(), lifetime: PhantomData }
    }

    /// Bytes that were asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl<'a> Span<'a> {
    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// `bytes` bytes from `start` on.
    ///
    /// # Panics
    /// When they are not inside.
    pub fn part(&self, start: usize, bytes: usize) -> Span<'a> {
        assert!(start.checked_add(bytes).is_some_and(|end| end <= self.bytes), "{start} + {bytes}");
        Span { pointer: self.pointer + start as u64, bytes, lifetime: PhantomData }
    }

    /// The pointer, where there are `elements` of `size` bytes and the alignment is right.
    #[track_caller]
    pub(crate) fn of(&self, elements: usize, size: usize) -> u64 {
        let need = elements.checked_mul(size).expect("a size that fits");
        assert!(need <= self.bytes, "{need} bytes of a span of {}", self.bytes);
        assert!(self.pointer.is_multiple_of(16), "spans start at multiples of 16 bytes");
        self.pointer
    }

    /// As [`Span::of`], for what kernels address element by element.
    #[track_caller]
    pub(crate) fn unaligned(&self, elements: usize, size: usize) -> u64 {
        let need = elements.checked_mul(size).expect("a size that fits");
        assert!(need <= self.bytes, "{need} bytes of a span of {}", self.bytes);
        self.pointer
    }
}
