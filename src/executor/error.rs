//! Why a stage could not be made, or a step not be run.

use super::cpu_pool::WorkerPanic;
use super::handoff::HandoffClosed;
use crate::formats::FormatError;
use crate::memory::{ArenaError, LedgerError};
use crate::tensor::DType;
use crate::units::ByteSize;
use std::path::PathBuf;
use tandem_cpu_kernels::UnsupportedIsa;
use tandem_cpu_kernels::attention::KvLayoutError;

/// A failure of the executor.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The model file is bad.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Rows that are no whole number of their type's blocks.
    #[error("tensor {tensor}: rows of {cols} elements are no whole number of {dtype} blocks")]
    Misshapen {
        /// Which tensor.
        tensor: String,
        /// Its element type.
        dtype: DType,
        /// Elements of a row.
        cols: usize,
    },
    /// A rotary embedding from which no angle can be computed.
    #[error("rotary embedding: {0}")]
    Rope(#[from] tandem_cpu_kernels::rope::RopeError),
    /// Layers of one stage must have buffers of one width.
    #[error("layer {layer}: {field} is {got}, that of the layers before {wanted}")]
    MixedLayers {
        /// Layer of the model.
        layer: usize,
        /// Which width.
        field: &'static str,
        /// Width of the layers before.
        wanted: usize,
        /// Width of this layer.
        got: usize,
    },
    /// The instruction set that was asked for is not there.
    #[error(transparent)]
    Isa(#[from] UnsupportedIsa),
    /// A KV block size that kernels can't work on.
    #[error(transparent)]
    KvLayout(#[from] KvLayoutError),
    /// Memory was refused.
    #[error("{what}: {source}")]
    Memory {
        /// What for.
        what: &'static str,
        /// Who refused it, and how much it was.
        source: ArenaError,
    },
    /// There can be no file for KV blocks.
    #[error(
        "kv.disk_folder is {}: {source}; allowed is a folder in which a file of {} can be made",
        folder.display(), ByteSize(*bytes)
    )]
    DiskTier {
        /// The folder.
        folder: PathBuf,
        /// Bytes of the file.
        bytes: u64,
        /// What the system says.
        source: std::io::Error,
    },
    /// A worker thread was refused.
    #[error("worker threads: {0}")]
    Threads(std::io::Error),
    /// A plan that does not add up: a bug of the scheduler, refused before it does harm.
    #[error("invalid step plan: {field}: {message}")]
    InvalidPlan {
        /// Which field of the plan.
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A worker panicked in the middle of a step: the KV store's content is unknown, so the stage
    /// has to be made anew ([`super::Stage::restart`]).
    #[error(transparent)]
    Worker(#[from] WorkerPanic),
    /// The neighbouring stage has gone.
    #[error(transparent)]
    Handoff(#[from] HandoffClosed),
    /// It would take more of a GPU's memory than may be used.
    #[error(transparent)]
    Vram(#[from] LedgerError),
    /// The GPU refused or failed.
    #[error(transparent)]
    Gpu(#[from] tandem_kernels::GpuError),
    /// A stage on a GPU failed in a step before: it has to be made anew.
    #[error("the GPU failed in a step before: {reason}")]
    GpuStageFailed {
        /// What it failed with.
        reason: String,
    },
    /// There are no kernels for it.
    #[error("{what} is not supported by this version")]
    Unsupported {
        /// What.
        what: String,
    },
}
