//! Why a stage can't be made or go on, and what that means for the engine.

use super::EngineError;
use crate::config::Config;
use crate::executor::ExecutorError;
use crate::hardware::Gpus;
use crate::memory::{ArenaError, LedgerError};
use crate::placement::{Phase, Placement, Shortage};
use crate::request::RequestError;
use tandem_kernels::GpuError;

/// Why a stage can't be made or go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StageFault {
    /// This stage and its KV are not to be used again; another one over the same weights may do.
    #[error("{0}")]
    Stage(String),
    /// There is no memory to make a stage with, and another try would find no more.
    #[error("no stage can be made: {0}")]
    OutOfMemory(Shortage),
    /// The GPU is gone for this process, and so is every stage on it.
    #[error("{device} was lost ({class})")]
    GpuLost {
        /// Which GPU.
        device: String,
        /// The driver's name of the failure.
        class: String,
    },
    /// The GPU has not finished a step within its time, and is not used any more.
    #[error("{device} does not answer ({class})")]
    GpuHung {
        /// Which GPU.
        device: String,
        /// How long it was waited for.
        class: String,
    },
}

impl StageFault {
    /// What a stage fails with in a step. One that lacks memory there is replaced: the next one
    /// finds out at its start whether it has what it needs.
    pub(super) fn of_step(error: &ExecutorError) -> Self {
        match Self::from(error) {
            Self::OutOfMemory(_) => Self::Stage(error.to_string()),
            other => other,
        }
    }

    /// How it ends the engine, where no other stage can be made in this process after so many
    /// restarts.
    pub(super) fn end(
        &self,
        restarts: u64,
        phase: Phase,
        (placement, config): (&Placement, &Config),
    ) -> Option<EngineError> {
        let restarts = u32::try_from(restarts).unwrap_or(u32::MAX);
        match self.clone() {
            Self::Stage(_) => None,
            Self::OutOfMemory(shortage) => {
                let gpus = Gpus::detect_for(&shortage.choice());
                let refusal = placement.refusal(&shortage, phase, (&gpus, config));
                Some(EngineError::Model(refusal))
            }
            Self::GpuLost { device, class } => {
                Some(EngineError::Gpu(RequestError::GpuLost { device, class, restarts }))
            }
            Self::GpuHung { device, class } => {
                Some(EngineError::Gpu(RequestError::GpuHung { device, class, restarts }))
            }
        }
    }
}

impl From<&ExecutorError> for StageFault {
    fn from(error: &ExecutorError) -> Self {
        let lacks = |gpu, need_bytes: Option<usize>, free_bytes: Option<usize>| {
            Self::OutOfMemory(Shortage {
                gpu,
                need_bytes: need_bytes.map(|bytes| bytes as u64),
                free_bytes: free_bytes.map(|bytes| bytes as u64),
            })
        };
        match error {
            ExecutorError::Gpu(GpuError::OutOfMemory {
                ordinal, need_bytes, free_bytes, ..
            }) => lacks(Some(*ordinal), *need_bytes, *free_bytes),
            ExecutorError::Vram(LedgerError::DoesNotFit {
                ordinal,
                need_bytes,
                free_bytes,
                ..
            }) => Self::OutOfMemory(Shortage {
                gpu: Some(*ordinal),
                need_bytes: Some(*need_bytes),
                free_bytes: Some(*free_bytes),
            }),
            ExecutorError::Gpu(GpuError::HostOutOfMemory { need_bytes, .. }) => {
                lacks(None, Some(*need_bytes), None)
            }
            ExecutorError::Memory { source: ArenaError::Allocation { bytes, .. }, .. } => {
                lacks(None, Some(*bytes), None)
            }
            ExecutorError::Gpu(GpuError::Lost { ordinal, class, .. }) => {
                Self::GpuLost { device: format!("GPU {ordinal}"), class: class.clone() }
            }
            ExecutorError::Gpu(GpuError::Hung { ordinal, wait_max_ms }) => Self::GpuHung {
                device: format!("GPU {ordinal}"),
                class: format!("a step took more than gpu.step_timeout_ms = {wait_max_ms}"),
            },
            other => Self::Stage(other.to_string()),
        }
    }
}

impl From<String> for StageFault {
    fn from(reason: String) -> Self {
        Self::Stage(reason)
    }
}

impl From<&str> for StageFault {
    fn from(reason: &str) -> Self {
        Self::Stage(reason.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_lacks_at_the_start_ends_what_another_stage_cures_in_a_step() {
        let of_gpu = GpuError::OutOfMemory {
            ordinal: 2,
            what: "loading its kernels",
            need_bytes: None,
            free_bytes: Some(7),
        };
        let of_host = GpuError::HostOutOfMemory { ordinal: 2, need_bytes: 5 };
        let promised = LedgerError::DoesNotFit {
            ordinal: 2,
            purpose: "KV",
            need_bytes: 9,
            free_bytes: 7,
            capacity_bytes: 20,
        };
        let allocation = ArenaError::Allocation { bytes: 5, reason: "no more".into() };
        let host = Shortage { gpu: None, need_bytes: Some(5), free_bytes: None };
        for (error, shortage) in [
            (of_gpu.into(), Shortage { gpu: Some(2), need_bytes: None, free_bytes: Some(7) }),
            (promised.into(), Shortage { gpu: Some(2), need_bytes: Some(9), free_bytes: Some(7) }),
            (of_host.into(), host),
            (ExecutorError::Memory { what: "the KV store", source: allocation }, host),
        ] {
            assert_eq!(StageFault::from(&error), StageFault::OutOfMemory(shortage));
            assert_eq!(StageFault::of_step(&error), StageFault::Stage(error.to_string()));
        }
        let hung = ExecutorError::Gpu(GpuError::Hung { ordinal: 2, wait_max_ms: 5 });
        assert_eq!(StageFault::of_step(&hung), StageFault::from(&hung));
    }
}
