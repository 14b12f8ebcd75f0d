//! One GPU of this process: its context, one stream, the loaded kernels, and memory.
//!
//! All work goes to one stream, in the order of the calls, and none of them waits but those that
//! say so. Memory is addressed by [`Span`]s, which launchers check against the shapes they are
//! given: a kernel never gets less memory than it touches.

use crate::driver::{Driver, DriverError};
use crate::fate::{Fate, OnGpu, failure};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, result, sys,
};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

/// The compiled kernels of all architectures (`build.rs`).
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// A kernel of every architecture.
pub(crate) const ANY_KERNEL: &str = "take_back";

/// The compute capability whose kernels use wgmma.
pub(crate) const WGMMA_CAPABILITY: (u32, u32) = (9, 0);

/// What went wrong on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// There is no usable GPU.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The GPU's memory does not hold it.
    #[error("GPU {ordinal} has no memory for {need_bytes} bytes; {free_bytes} are free")]
    OutOfMemory {
        /// Which GPU.
        ordinal: usize,
        /// Bytes asked for.
        need_bytes: usize,
        /// Bytes that the driver calls free.
        free_bytes: usize,
    },
    /// The system has no memory that it can lock for the GPU to copy from and to.
    #[error("the system has no {need_bytes} bytes of memory to lock for GPU {ordinal}")]
    HostOutOfMemory {
        /// Which GPU.
        ordinal: usize,
        /// Bytes asked for.
        need_bytes: usize,
    },
    /// The GPU is older than the compiled kernels.
    #[error(
        "GPU {ordinal} ({name}, compute capability {capability}) can't run our kernels: {reason}"
    )]
    Unsupported {
        /// Which GPU.
        ordinal: usize,
        /// Product name.
        name: String,
        /// Generation.
        capability: String,
        /// What the driver said.
        reason: String,
    },
    /// The GPU, or what ran on it, failed so that nothing of this process works there any more.
    #[error("GPU {ordinal} is lost, {what}: {class}; only a new process can use it again")]
    Lost {
        /// Which GPU.
        ordinal: usize,
        /// What was tried when the failure came to light.
        what: &'static str,
        /// The driver's name of the failure, such as `CUDA_ERROR_ILLEGAL_ADDRESS`.
        class: String,
    },
    /// The GPU did not finish its work in the time that it may take. Nothing is asked of it any
    /// more: most calls would wait with it.
    #[error("GPU {ordinal} has not finished its work within {wait_max_ms} ms")]
    Hung {
        /// Which GPU.
        ordinal: usize,
        /// Milliseconds that a wait may take.
        wait_max_ms: u64,
    },
    /// A call into the driver failed.
    #[error("{what} on GPU {ordinal}: {reason}")]
    Failed {
        /// Which GPU.
        ordinal: usize,
        /// What was tried.
        what: &'static str,
        /// What the driver said.
        reason: String,
    },
}

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
        let failed = |what| move |error| failure(ordinal, what, error);
        let context = CudaContext::new(ordinal).map_err(failed("opening a context"))?;
        // SAFETY: this crate uses one stream, whose order is all the synchronisation there is.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(failed("making a stream"))?;
        let module = context.load_module(Ptx::from_binary(FATBIN.to_vec())).map_err(|error| {
            let capability = context.compute_capability().unwrap_or_default();
            GpuError::Unsupported {
                ordinal,
                name: context.name().unwrap_or_default(),
                capability: format!("{}.{}", capability.0, capability.1),
                reason: error.to_string(),
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
        match self.stream.alloc_zeros::<u8>(bytes.max(1)) {
            Ok(slice) => Ok(DeviceMemory { slice: OnGpu::new(slice, self), bytes }),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free_bytes = self.memory().map_or(0, |(free, _)| free);
                let ordinal = self.ordinal();
                Err(GpuError::OutOfMemory { ordinal, need_bytes: bytes, free_bytes })
            }
            Err(error) => Err(self.failed("allocating memory", error)),
        }
    }

    /// Copies numbers to the start of a span. The numbers were read when this returns.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When they do not fit.
    pub fn upload<T: Plain>(&self, from: &[T], to: Span<'_>) -> Result<(), GpuError> {
        assert!(size_of_val(from) <= to.bytes, "{} bytes into {to:?}", size_of_val(from));
        if from.is_empty() {
            return Ok(());
        }
        self.bound()?;
        // SAFETY: the span holds as many bytes (asserted). Pageable memory is staged before the
        // call returns; the copy is ordered by the stream.
        unsafe { result::memcpy_htod_async(to.pointer, from, self.stream.cu_stream()) }
            .map_err(|error| self.failed("copying to it", error))
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
        }
    }
}

/// Numbers that have the same bytes here and on the GPU.
pub trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for i8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for f32 {}
impl Plain for [u32; 2] {}

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
