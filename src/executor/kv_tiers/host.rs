//! KV blocks in host memory. A block's bytes of all layers lie side by side, `[block] { block_bytes
//! }`, in chunks that are registered with a GPU's driver ahead of use, or with it: where it refuses
//! one, those before stay registered, and the blocks of others cross registered memory.

use super::blocks::{HostMemory, KvBlocks};
use crate::executor::ExecutorError;

/// Bytes of a chunk, about. While the driver registers one, other threads' calls may have to wait.
const CHUNK_BYTES: usize = 16 << 20;

/// Bytes that are registered ahead of use, about, from the start: that takes several times as long
/// as copying there, and then nobody waits for it.
const REGISTERED_AHEAD_BYTES: usize = 512 << 20;

/// Blocks in host memory.
pub(super) struct HostTier {
    chunks: Vec<HostMemory>,
    chunk_blocks: usize,
    blocks: usize,
    block_bytes: usize,
    /// Chunks up to the last one that has come into use.
    used_chunks: usize,
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
        Ok(Self { chunks, chunk_blocks, blocks, block_bytes, used_chunks: 0, is_refused: false })
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
        let index = block / self.chunk_blocks;
        self.used_chunks = self.used_chunks.max(index + 1);
        self.register(kv, index)
    }

    /// Whether the device can copy from and to a chunk by itself.
    fn register(&mut self, kv: &dyn KvBlocks, index: usize) -> bool {
        let chunk = &mut self.chunks[index];
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
        self.chunks[index].is_direct()
    }

    /// Registers a chunk where less than wanted is ready behind those in use. Whether it did: then
    /// there may be more to do.
    pub fn prepare_ahead(&mut self, kv: &dyn KvBlocks) -> bool {
        let chunk_bytes = (self.chunk_blocks * self.block_bytes).max(1);
        let end = self.used_chunks + REGISTERED_AHEAD_BYTES / chunk_bytes;
        let mut ahead = 0..end.min(self.chunks.len());
        let next = ahead.find(|index| self.chunks[*index].is_new());
        next.is_some_and(|index| !self.is_refused && self.register(kv, index))
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
