//! The bytes of KV blocks, f16 or 8 bits: the store that attention on the CPU reads. Behind it lie
//! other tiers (`kv_tiers/`), to and from which another thread copies blocks that no step uses.

use super::kv_tiers::{KvBlocks, Registration};
use super::program::{KvLayerId, KvShape};
use super::{ExecutorError, StageOptions};
use crate::memory::{AlignedBytes, HugePages, take_nodes_in_turn};
use crate::step::{BlockCopy, Tier};
use crate::units::BlockId;
use tandem_cpu_kernels::attention::{KvDType, KvLayout, KvStore};

/// How many blocks a stage has, and how large they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvOptions {
    /// Tokens of a block: a multiple of 16.
    pub block_tokens: usize,
    /// How keys and values are kept.
    pub dtype: KvDType,
    /// Blocks that attention reads.
    pub device_blocks: usize,
}

impl KvOptions {
    /// Whether a plan's copies are between blocks of the device's tier: others are no stage's.
    ///
    /// # Errors
    /// [`ExecutorError::InvalidPlan`] when one is not.
    pub(super) fn check(&self, orders: &[BlockCopy]) -> Result<(), ExecutorError> {
        let ends = orders.iter().flat_map(|order| [order.from, order.to].map(|end| (order, end)));
        for (order, (tier, block)) in ends {
            let blocks = if tier == Tier::Device { self.device_blocks } else { 0 };
            if block.index() >= blocks {
                let message = format!("{order:?}: block {} of {blocks} in {tier:?}", block.0);
                return Err(ExecutorError::InvalidPlan { field: "copies", message });
            }
        }
        Ok(())
    }
}

/// One layer's keys or values.
struct Plane {
    /// `[blocks, block_bytes]` in `memory`; the layout of a block is [`KvLayout`]'s.
    bytes: *mut u8,
    len: usize,
    block_bytes: usize,
    /// Keeps `bytes` alive; nobody else uses it.
    _memory: AlignedBytes,
}

// SAFETY: a plane owns its memory. Shared, it gives out nothing but pointers: to
// `KvLayers::layer`, whose users keep `KvStore`'s rule, and to copies of blocks, which keep that of
// `KvBlocks`.
unsafe impl Send for Plane {}
// SAFETY: as above.
unsafe impl Sync for Plane {}

impl Plane {
    fn new(
        blocks: usize,
        block_bytes: usize,
        options: &StageOptions,
    ) -> Result<Self, ExecutorError> {
        let len = blocks * block_bytes;
        // Zeroed memory comes from the system untouched: pages exist once they are written.
        let mut memory = AlignedBytes::zeroed(len, options.huge_pages())
            .map_err(|source| ExecutorError::Memory { what: "KV blocks", source })?;
        // Which worker reads a head's block depends on the step, and a page has blocks of many
        // heads: from all nodes in turn, no node's memory is what all workers wait for.
        let nodes = options.pool.nodes.nodes();
        if !nodes.is_empty()
            && let Err(error) = take_nodes_in_turn(&memory, nodes)
        {
            tracing::debug!(%error, "KV blocks lie on the NUMA nodes of those who write them");
        }
        let bytes = memory.as_mut_ptr();
        Ok(Self { bytes, len, block_bytes, _memory: memory })
    }

    /// Where a block begins.
    fn block(&self, block: usize) -> *mut u8 {
        let start = block * self.block_bytes;
        assert!(start < self.len, "block {block} of {} bytes in {}", self.block_bytes, self.len);
        self.bytes.wrapping_add(start)
    }
}

/// One layer.
struct Layer {
    layout: KvLayout,
    keys: Plane,
    values: Plane,
}

/// The KV blocks of a stage's layers.
pub(super) struct KvMemory {
    layers: Vec<Layer>,
    options: KvOptions,
    huge_pages: HugePages,
}

impl KvMemory {
    /// Zeroed blocks for every layer.
    ///
    /// # Errors
    /// A block size that kernels can't work on, or memory refused.
    pub fn new(shapes: &[KvShape], options: &StageOptions) -> Result<Self, ExecutorError> {
        let (kv, huge_pages) = (options.kv, options.huge_pages());
        let layer = |shape: &KvShape| {
            let layout =
                KvLayout::new(shape.n_kv_heads, shape.head_dim, kv.block_tokens, kv.dtype)?;
            let plane = || Plane::new(kv.device_blocks, layout.block_bytes(), options);
            Ok(Layer { layout, keys: plane()?, values: plane()? })
        };
        let layers = shapes.iter().map(layer).collect::<Result<_, ExecutorError>>()?;
        Ok(Self { layers, options: kv, huge_pages })
    }

    /// Keys and values of all layers, one after the other.
    fn planes(&self) -> impl Iterator<Item = &Plane> {
        self.layers.iter().flat_map(|layer| [&layer.keys, &layer.values])
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> usize {
        self.planes().map(|plane| plane.len).sum()
    }

    /// Performs a plan's copies in order.
    ///
    /// # Errors
    /// [`ExecutorError::InvalidPlan`] when a block of any order does not exist here; then nothing
    /// was copied.
    pub fn copy(&self, orders: &[BlockCopy]) -> Result<(), ExecutorError> {
        self.options.check(orders)?;
        for order in orders {
            for plane in self.planes() {
                let [from, to] =
                    [order.from, order.to].map(|(_, block)| plane.block(block.index()));
                // SAFETY: both are blocks of the plane, whole, maybe the same. Its stage's thread
                // alone uses blocks that no other copy was ordered for, and it runs no step now.
                unsafe { std::ptr::copy(from, to, plane.block_bytes) };
            }
        }
        Ok(())
    }

    /// What a step's workers share.
    pub fn layers(&self) -> KvLayers<'_> {
        KvLayers { layers: &self.layers, blocks: self.options.device_blocks }
    }
}

impl KvBlocks for KvMemory {
    fn block_bytes(&self) -> usize {
        self.planes().map(|plane| plane.block_bytes).sum()
    }

    fn device_blocks(&self) -> usize {
        self.options.device_blocks
    }

    fn huge_pages(&self) -> HugePages {
        self.huge_pages
    }

    unsafe fn register(&self, _memory: &[u8]) -> Result<Registration, ExecutorError> {
        Ok(None)
    }

    unsafe fn read(&self, copies: &mut [(BlockId, &mut [u8])]) -> Result<(), ExecutorError> {
        for (block, to) in copies {
            let mut to = &mut **to;
            for plane in self.planes() {
                let (part, others) = to.split_at_mut(plane.block_bytes);
                to = others;
                let from = plane.block(block.index());
                // SAFETY: the block and `part` are as long, and nobody writes the block, as the
                // caller promises.
                unsafe { from.copy_to_nonoverlapping(part.as_mut_ptr(), part.len()) };
            }
        }
        Ok(())
    }

    unsafe fn write(&self, copies: &[(BlockId, &[u8])]) -> Result<(), ExecutorError> {
        for (block, from) in copies {
            let mut from = *from;
            for plane in self.planes() {
                let (part, others) = from.split_at(plane.block_bytes);
                from = others;
                let to = plane.block(block.index());
                // SAFETY: the block and `part` are as long, and nobody uses the block, as the
                // caller promises.
                unsafe { to.copy_from_nonoverlapping(part.as_ptr(), part.len()) };
            }
        }
        Ok(())
    }
}

/// Keys and values of all layers during one step.
#[derive(Clone, Copy)]
pub(super) struct KvLayers<'a> {
    layers: &'a [Layer],
    blocks: usize,
}

impl<'a> KvLayers<'a> {
    /// The store of one layer.
    pub fn layer(&self, id: KvLayerId) -> KvStore<'a> {
        let layer = &self.layers[id.0 as usize];
        let [keys, values] = [&layer.keys, &layer.values].map(|plane| plane.bytes);
        // SAFETY: both planes hold `blocks · block_bytes` bytes, aligned to cache lines, and are
        // borrowed for 'a. Only the stage's own step takes its layers, and what that writes
        // nobody copies meanwhile (`KvBlocks`). The interpreter writes a block through one worker
        // (`BlockRun`) and reads after a barrier; or it writes a head's position through the one
        // worker that reads it before the next barrier.
        unsafe { KvStore::new(keys, values, self.blocks, layer.layout) }
    }
}
