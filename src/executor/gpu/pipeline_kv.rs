//! The KV blocks of all stages of a pipeline as one store: a block in host memory or on disk is the
//! stages' parts of it, in the order of the layers.

use super::kv::GpuKv;
use crate::executor::ExecutorError;
use crate::executor::kv_tiers::{KvBlocks, Registration};
use crate::memory::HugePages;
use crate::units::BlockId;
use std::sync::Arc;

/// The stores of a pipeline's stages, at least one.
pub(super) struct PipelineKv {
    stages: Vec<Arc<GpuKv>>,
}

impl PipelineKv {
    pub fn new(stages: Vec<Arc<GpuKv>>) -> Self {
        assert!(!stages.is_empty(), "a pipeline has stages");
        Self { stages }
    }

    /// Each stage, with where its part of a block begins and ends.
    fn parts(&self) -> impl Iterator<Item = (&GpuKv, usize, usize)> {
        let mut end = 0;
        self.stages.iter().map(move |stage| {
            let start = end;
            end += stage.block_bytes();
            (&**stage, start, end)
        })
    }
}

impl KvBlocks for PipelineKv {
    fn block_bytes(&self) -> usize {
        self.stages.iter().map(|stage| stage.block_bytes()).sum()
    }

    fn device_blocks(&self) -> usize {
        self.stages[0].device_blocks()
    }

    fn huge_pages(&self) -> HugePages {
        self.stages[0].huge_pages()
    }

    unsafe fn register(&self, memory: &[u8]) -> Result<Registration, ExecutorError> {
        // Once, for all GPUs.
        // SAFETY: the caller keeps the memory mapped.
        unsafe { self.stages[0].register(memory) }
    }

    unsafe fn read(&self, copies: &mut [(BlockId, &mut [u8])]) -> Result<(), ExecutorError> {
        self.parts().try_for_each(|(stage, start, end)| {
            let parts = copies.iter_mut().map(|(block, to)| (*block, &mut to[start..end]));
            // SAFETY: as the caller promises.
            unsafe { stage.read(&mut parts.collect::<Vec<_>>()) }
        })
    }

    unsafe fn write(&self, copies: &[(BlockId, &[u8])]) -> Result<(), ExecutorError> {
        self.parts().try_for_each(|(stage, start, end)| {
            let parts = copies.iter().map(|(block, from)| (*block, &from[start..end]));
            // SAFETY: as the caller promises.
            unsafe { stage.write(&parts.collect::<Vec<_>>()) }
        })
    }
}
