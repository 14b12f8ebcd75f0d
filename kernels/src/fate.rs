//! Waiting for a GPU no longer than it may take, and what becomes of one that failed for good.
//!
//! A kernel that touches wild memory, or a fault of the hardware, ends CUDA for the whole process.
//! A GPU that does not finish may never do, and most calls into the driver would wait with it. So
//! the first such failure is kept: every call after it fails with it, and what lies on that GPU is
//! left to the end of the process.

use crate::gpu::{Gpu, GpuError};
use crate::turns::{Taker, Turn};
use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// Longest wait, unless [`Gpu::limit_waits`] says otherwise.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// A wait spins at first, then lets other threads run between two looks; a long one sleeps between
/// them, for a small part of what it has taken so far.
const SPIN: Duration = Duration::from_millis(1);
const YIELD: Duration = Duration::from_millis(50);
const SLEEP_DIVISOR: u32 = 1000;

/// What all that lies on a GPU knows of it.
pub(crate) struct Fate {
    end: OnceLock<GpuError>,
    wait_max_us: AtomicU64,
    /// All GPUs of a model have one fate.
    taker: Taker,
}

impl Default for Fate {
    fn default() -> Self {
        let wait_max_us = AtomicU64::new(WAIT_MAX.as_micros() as u64);
        Self { end: OnceLock::new(), wait_max_us, taker: Taker::new() }
    }
}

impl Fate {
    /// Whose turn a call is that may wait for the GPU.
    pub(crate) fn taker(&self) -> Taker {
        self.taker
    }

    /// Waits until a context has nothing to do, and for the turn of a call that needs that; none
    /// where the GPU has failed for good.
    pub(crate) fn at_rest(&self, context: &CudaContext) -> Option<Turn<'static>> {
        self.check().ok()?;
        let turn = self.taker.turn();
        context.synchronize().ok()?;
        Some(turn)
    }

    /// The failure after which nothing works any more.
    ///
    /// # Errors
    /// That failure.
    pub(crate) fn check(&self) -> Result<(), GpuError> {
        self.end.get().map_or(Ok(()), |end| Err(end.clone()))
    }
}

/// Something whose drop calls the driver, which may wait for the GPU: it is forgotten where the GPU
/// has failed for good.
pub(crate) struct OnGpu<T> {
    value: ManuallyDrop<T>,
    fate: Arc<Fate>,
}

impl<T> OnGpu<T> {
    pub(crate) fn new(value: T, gpu: &Gpu) -> Self {
        Self { value: ManuallyDrop::new(value), fate: Arc::clone(gpu.fate()) }
    }
}

impl<T> Deref for OnGpu<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Drop for OnGpu<T> {
    fn drop(&mut self) {
        if self.fate.check().is_ok() {
            let _turn = self.fate.taker().turn();
            // SAFETY: it is dropped here alone, once, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}

impl Gpu {
    /// Waits for the turn of a call that may wait for the GPU, until it is dropped.
    pub(crate) fn turn(&self) -> Turn<'static> {
        self.fate().taker().turn()
    }

    /// How long a wait for the GPU may take before it counts as hung; 30 s without this.
    pub fn limit_waits(&self, most: Duration) {
        let us = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
        self.fate().wait_max_us.store(us, Ordering::Relaxed);
    }

    /// How long a wait may take.
    pub fn wait_max(&self) -> Duration {
        Duration::from_micros(self.fate().wait_max_us.load(Ordering::Relaxed))
    }

    /// Whether all that was started is done.
    ///
    /// # Errors
    /// What any kernel before has failed with.
    pub fn is_done(&self) -> Result<bool, GpuError> {
        self.bound()?;
        self.is_idle(self.stream())
    }

    /// Waits for all that was started.
    ///
    /// # Errors
    /// What any kernel before has failed with, or [`GpuError::Hung`].
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.wait_for(self.stream())
    }

    /// Waits for all that was started on one of its streams.
    ///
    /// # Errors
    /// As of [`Gpu::synchronize`].
    pub(crate) fn wait_for(&self, stream: &CudaStream) -> Result<(), GpuError> {
        self.bound()?;
        self.wait_until(
            || self.is_idle(stream),
            |waited| {
                if waited < SPIN {
                    std::hint::spin_loop();
                } else if waited < YIELD {
                    thread::yield_now();
                } else {
                    thread::sleep(waited / SLEEP_DIVISOR);
                }
            },
        )
    }

    /// Looks at its work until it is done, with `pause` between two looks, which is told how long
    /// that has taken so far.
    ///
    /// # Errors
    /// What `is_done` fails with, or [`GpuError::Hung`].
    pub(crate) fn wait_until(
        &self,
        is_done: impl Fn() -> Result<bool, GpuError>,
        pause: impl Fn(Duration),
    ) -> Result<(), GpuError> {
        let wait_max = self.wait_max();
        let started = Instant::now();
        while !is_done()? {
            let waited = started.elapsed();
            // A process that was stopped meanwhile looks once more.
            if waited >= wait_max && !is_done()? {
                let wait_max_ms = wait_max.as_millis() as u64;
                return Err(self.ended(GpuError::Hung { ordinal: self.ordinal(), wait_max_ms }));
            }
            pause(waited);
        }
        Ok(())
    }

    /// Whether all that was started on a stream is done.
    ///
    /// # Errors
    /// What it failed with.
    pub(crate) fn is_idle(&self, stream: &CudaStream) -> Result<bool, GpuError> {
        // SAFETY: the stream is this GPU's, whose context the caller has entered.
        match unsafe { sys::cuStreamQuery(stream.cu_stream()) }.result() {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(self.failed("waiting for it", error)),
        }
    }

    /// What a refused call means. After the failures that end a context the GPU is gone.
    pub(crate) fn failed(&self, what: &'static str, error: DriverError) -> GpuError {
        let free = || Some(self.stream().context().mem_get_info().ok()?.0);
        let failure = failure(self.ordinal(), what, error, free);
        if matches!(failure, GpuError::Lost { .. }) { self.ended(failure) } else { failure }
    }

    /// Remembers the failure that ended it.
    fn ended(&self, end: GpuError) -> GpuError {
        // The first failure counts: it is that of the GPU which others may have waited for.
        self.fate().end.get_or_init(|| end).clone()
    }
}

/// A refusal of the driver as an error; `free` asks for the bytes that are free where it lacks
/// memory.
pub(crate) fn failure(
    ordinal: usize,
    what: &'static str,
    error: DriverError,
    free: impl FnOnce() -> Option<usize>,
) -> GpuError {
    if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        GpuError::OutOfMemory { ordinal, what, need_bytes: None, free_bytes: free() }
    } else if ends_context(error.0) {
        GpuError::Lost { ordinal, what, class: format!("{:?}", error.0) }
    } else {
        GpuError::Failed { ordinal, what, reason: error.to_string() }
    }
}

/// Whether nothing of this process works on the GPU any more after this code (`cuda.h` says so of
/// each).
fn ends_context(code: sys::CUresult) -> bool {
    use sys::CUresult as Code;
    matches!(
        code,
        Code::CUDA_ERROR_DEINITIALIZED
            | Code::CUDA_ERROR_ECC_UNCORRECTABLE
            | Code::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | Code::CUDA_ERROR_CONTAINED
            | Code::CUDA_ERROR_ILLEGAL_ADDRESS
            | Code::CUDA_ERROR_LAUNCH_TIMEOUT
            | Code::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | Code::CUDA_ERROR_ASSERT
            | Code::CUDA_ERROR_HARDWARE_STACK_ERROR
            | Code::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | Code::CUDA_ERROR_MISALIGNED_ADDRESS
            | Code::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | Code::CUDA_ERROR_INVALID_PC
            | Code::CUDA_ERROR_LAUNCH_FAILED
            | Code::CUDA_ERROR_TENSOR_MEMORY_LEAK
            | Code::CUDA_ERROR_MPS_CLIENT_TERMINATED
            | Code::CUDA_ERROR_EXTERNAL_DEVICE
            | Code::CUDA_ERROR_UNKNOWN
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_that_ends_the_context_is_told_from_one_that_does_not() {
        use sys::CUresult as Code;
        let of = |code| failure(1, "waiting for it", DriverError(code), || Some(5));
        let lost = of(Code::CUDA_ERROR_ILLEGAL_ADDRESS);
        let said = "GPU 1 is lost, waiting for it: CUDA_ERROR_ILLEGAL_ADDRESS";
        assert!(lost.to_string().starts_with(said), "{lost}");
        assert!(ends_context(Code::CUDA_ERROR_ECC_UNCORRECTABLE));
        let full = of(Code::CUDA_ERROR_OUT_OF_MEMORY);
        let said = "GPU 1 has too little memory, waiting for it; 5 bytes are free";
        assert_eq!(full.to_string(), said);
        for code in [
            Code::CUDA_ERROR_OUT_OF_MEMORY,
            Code::CUDA_ERROR_INVALID_VALUE,
            Code::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
            Code::CUDA_ERROR_NOT_READY,
        ] {
            assert!(!ends_context(code), "{code:?}");
        }
    }
}
