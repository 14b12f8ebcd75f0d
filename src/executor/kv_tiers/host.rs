//! KV blocks in host memory. A block's bytes of all layers lie side by side, `[block] { block_bytes
//! }`, in chunks that are registered with a GPU's driver as they come into use: where it refuses
//! one, those before stay registered, and the blocks of others cross registered memory.

use super::blocks::{HostMemory, KvBlocks};
use crate::executor::ExecutorError;

/// Bytes of a chunk, about. While the driver registers one, other threads' calls may have to wait.
const CHUNK_BYTES: usize = 16 << 20;

/// Bytes that are registered from the start, about: that takes several times as long as copying
/// there, and nobody waits for copies yet.
const REGISTERED_AT_START_BYTES: usize = 512 << 20;

/// Blocks in host memory.
pub(super) struct HostTier {
    chunks: Vec<HostMemory>,
    chunk_blocks: usize,
    blocks: usize,
    block_bytes: usize,
    /// The driver has refused a chunk, and is not asked again.
    is_refused: bool,
}

impl HostTier {
    /// `blocks` blocks. Of those that are not registered yet no page exists.
    ///
    /// # Errors
    /// The system refuses the memory.
    pub fn new(kv: &dyn KvBlocks, blocks: usize) -> Result<Self, ExecutorError> {
        let block_bytes = kv.block_bytes();
        let chunk_blocks = (CHUNK_BYTES / block_bytes.max(1)).max(1);
        let chunk = |first| {
            let count = chunk_blocks.min(blocks - first);
            HostMemory::new(count * block_bytes, kv.huge_pages())
        };
        let chunks = (0..blocks).step_by(chunk_blocks).map(chunk).collect::<Result<_, _>>()?;
        Ok(Self { chunks, chunk_blocks, blocks, block_bytes, is_refused: false })
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Whether nobody has tried to register the memory of a block.
    pub fn is_new(&self, block: usize) -> bool {
        self.chunks[block / self.chunk_blocks].is_new()
    }

    /// Registers the memory of a block that comes into use. Whether the device can copy from and to
    /// it by itself.
    pub fn prepare(&mut self, kv: &dyn KvBlocks, block: usize) -> bool {
        let chunk = &mut self.chunks[block / self.chunk_blocks];
        if self.is_refused {
            chunk.refuse();
        } else if let Err(error) = chunk.register(kv) {
            self.is_refused = true;
            let pinned_bytes = self.pinned_bytes();
            tracing::warn!(
                %error,
                pinned_bytes,
                "no more of the host's KV blocks can be pinned: copies of the others are slower"
            );
        }
        self.chunks[block / self.chunk_blocks].is_direct()
    }

    /// Registers what is to be ready from the start.
    pub fn prepare_first(&mut self, kv: &dyn KvBlocks) {
        let chunk_bytes = self.chunk_blocks * self.block_bytes;
        let chunks = (REGISTERED_AT_START_BYTES / chunk_bytes.max(1)).min(self.chunks.len());
        for chunk in 0..chunks {
            if !self.prepare(kv, chunk * self.chunk_blocks) {
                return;
            }
        }
    }

    /// Registers all memory.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn prepare_all(&mut self, kv: &dyn KvBlocks) -> Result<(), ExecutorError> {
        self.chunks.iter_mut().try_for_each(|chunk| chunk.register(kv))
    }

    /// `[block_bytes]`
    pub fn block(&self, block: usize) -> &[u8] {
        let start = block % self.chunk_blocks * self.block_bytes;
        &self.chunks[block / self.chunk_blocks][start..][..self.block_bytes]
    }

    /// As [`HostTier::block`], for writing.
    pub fn block_mut(&mut self, block: usize) -> &mut [u8] {
        let start = block % self.chunk_blocks * self.block_bytes;
        &mut self.chunks[block / self.chunk_blocks][start..][..self.block_bytes]
    }

    /// Several blocks for writing, in the order given.
    ///
    /// # Panics
    /// When a block is wanted twice.
    pub fn blocks_mut(&mut self, wanted: impl Iterator<Item = usize> + Clone) -> Vec<&mut [u8]> {
        let (first, last) = wanted.clone().fold((usize::MAX, 0), |(first, last), block| {
            (first.min(block / self.chunk_blocks), last.max(block / self.chunk_blocks))
        });
        let chunks = self.chunks.iter_mut().take(last + 1).skip(first);
        let blocks = chunks.flat_map(|chunk| chunk.chunks_exact_mut(self.block_bytes));
        let mut blocks: Vec<_> = blocks.map(Some).collect();
        let taken = wanted.map(|block| blocks[block - first * self.chunk_blocks].take());
        taken.map(|block| block.expect("different blocks")).collect()
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> usize {
        self.blocks * self.block_bytes
    }

    /// Bytes that are registered.
    pub fn pinned_bytes(&self) -> usize {
        self.chunks.iter().filter(|chunk| chunk.is_pinned()).map(|chunk| chunk.len()).sum()
    }

    /// Bytes that came into use and could not be registered.
    pub fn pageable_bytes(&self) -> usize {
        self.chunks.iter().filter(|chunk| chunk.is_refused()).map(|chunk| chunk.len()).sum()
    }
}
