//! What can go wrong on a GPU, with the facts that a user is told.

use crate::driver::DriverError;

/// What went wrong on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// There is no usable GPU.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The GPU's memory does not hold it.
    #[error("GPU {ordinal} has too little memory, {what}{}{}", of(*need_bytes), free(*free_bytes))]
    OutOfMemory {
        /// Which GPU.
        ordinal: usize,
        /// What was tried.
        what: &'static str,
        /// Bytes asked for; `None` where the driver needs them itself, for a context, a stream, a
        /// kernel or a record, and does not say how many.
        need_bytes: Option<usize>,
        /// Bytes that the driver calls free, if it tells.
        free_bytes: Option<usize>,
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

/// The bytes that something was tried with, as the end of a clause.
fn of(need_bytes: Option<usize>) -> String {
    need_bytes.map_or(String::new(), |bytes| format!(" of {bytes} bytes"))
}

/// What is free, as the end of a sentence.
fn free(free_bytes: Option<usize>) -> String {
    free_bytes.map_or(String::new(), |bytes| format!("; {bytes} bytes are free"))
}
