//! The bytes of KV blocks, f16 or 8 bits, per tier: the store that attention reads, and host memory
//! behind it for sequences that wait. Performs [`BlockCopy`] orders.

use super::ExecutorError;
use super::program::{KvLayerId, KvShape};
use crate::memory::{AlignedBytes, HugePages};
use crate::step::{BlockCopy, Tier};
use crate::units::BlockId;
use tandem_cpu_kernels::attention::{KvDType, KvLayout, KvStore};

/// How many blocks each tier has, and how large they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvOptions {
    /// Tokens of a block: a multiple of 16.
    pub block_tokens: usize,
    /// How keys and values are kept.
    pub dtype: KvDType,
    /// Blocks that attention reads.
    pub device_blocks: usize,
    /// Blocks behind them.
    pub host_blocks: usize,
}

/// One layer's keys or values in one tier.
struct Plane {
    /// `[blocks, block_bytes]` in `memory`; the layout of a block is [`KvLayout`]'s.
    bytes: *mut u8,
    len: usize,
    block_bytes: usize,
    /// Keeps `bytes` alive; nobody else uses it.
    _memory: AlignedBytes,
}

// SAFETY: a plane owns its memory. Shared, it gives out nothing but a pointer, to
// `KvLayers::layer`; whoever uses that keeps `KvStore`'s rule.
unsafe impl Send for Plane {}
// SAFETY: as above.
unsafe impl Sync for Plane {}

impl Plane {
    fn new(
        blocks: usize,
        block_bytes: usize,
        huge_pages: HugePages,
    ) -> Result<Self, ExecutorError> {
        let len = blocks * block_bytes;
        // Zeroed memory comes from the system untouched: pages exist once they are written.
        let mut memory = AlignedBytes::zeroed(len, huge_pages)
            .map_err(|source| ExecutorError::Memory { what: "KV blocks", source })?;
        let bytes = memory.as_mut_ptr();
        Ok(Self { bytes, len, block_bytes, _memory: memory })
    }

    fn all_mut(&mut self) -> &mut [u8] {
        // SAFETY: the memory holds `len` zeroed bytes as long as this plane lives, and the borrow
        // is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.bytes, self.len) }
    }

    fn block_mut(&mut self, block: usize) -> &mut [u8] {
        let bytes = self.block_bytes;
        &mut self.all_mut()[block * bytes..][..bytes]
    }

    fn copy_within(&mut self, from: usize, to: usize) {
        let bytes = self.block_bytes;
        let start = from * bytes;
        self.all_mut().copy_within(start..start + bytes, to * bytes);
    }
}

/// One layer of both tiers.
struct Layer {
    layout: KvLayout,
    /// Keys and values that attention reads.
    device: [Plane; 2],
    /// Keys and values behind them.
    host: [Plane; 2],
}

/// The KV blocks of a stage's layers.
pub(super) struct KvMemory {
    layers: Vec<Layer>,
    options: KvOptions,
}

impl KvMemory {
    /// Zeroed blocks for every layer.
    ///
    /// # Errors
    /// A block size that kernels can't work on, or memory refused.
    pub fn new(
        shapes: &[KvShape],
        options: KvOptions,
        huge_pages: HugePages,
    ) -> Result<Self, ExecutorError> {
        let layer = |shape: &KvShape| {
            let layout = KvLayout::new(
                shape.n_kv_heads,
                shape.head_dim,
                options.block_tokens,
                options.dtype,
            )?;
            let plane = |blocks| Plane::new(blocks, layout.block_bytes(), huge_pages);
            let planes = |blocks| Ok::<_, ExecutorError>([plane(blocks)?, plane(blocks)?]);
            let (device, host) = (planes(options.device_blocks)?, planes(options.host_blocks)?);
            Ok(Layer { layout, device, host })
        };
        Ok(Self {
            layers: shapes.iter().map(layer).collect::<Result<_, ExecutorError>>()?,
            options,
        })
    }

    /// Bytes of both tiers.
    pub fn bytes(&self) -> usize {
        let bytes = |layer: &Layer| {
            let planes = layer.device.iter().chain(&layer.host);
            planes.map(|plane| plane.len).sum::<usize>()
        };
        self.layers.iter().map(bytes).sum()
    }

    /// Performs copies in order.
    ///
    /// # Errors
    /// [`ExecutorError::InvalidPlan`] when a block or tier of any order does not exist; then
    /// nothing was copied.
    pub fn copy(&mut self, orders: &[BlockCopy]) -> Result<(), ExecutorError> {
        for order in orders {
            self.check(order, order.from)?;
            self.check(order, order.to)?;
        }
        for order in orders {
            let (from, to) = (order.from.1.index(), order.to.1.index());
            for layer in &mut self.layers {
                for index in 0..2 {
                    let (device, host) = (&mut layer.device[index], &mut layer.host[index]);
                    match (order.from.0, order.to.0) {
                        (Tier::Device, Tier::Host) => {
                            host.block_mut(to).copy_from_slice(device.block_mut(from));
                        }
                        (Tier::Host, Tier::Device) => {
                            device.block_mut(to).copy_from_slice(host.block_mut(from));
                        }
                        (Tier::Host, _) => host.copy_within(from, to),
                        _ => device.copy_within(from, to),
                    }
                }
            }
        }
        Ok(())
    }

    fn check(
        &self,
        order: &BlockCopy,
        (tier, block): (Tier, BlockId),
    ) -> Result<(), ExecutorError> {
        let blocks = match tier {
            Tier::Device => self.options.device_blocks,
            Tier::Host => self.options.host_blocks,
            Tier::Disk => 0,
        };
        if block.index() < blocks {
            return Ok(());
        }
        let message = format!("{order:?}: block {} of {blocks} in {tier:?}", block.0);
        Err(ExecutorError::InvalidPlan { field: "copies", message })
    }

    /// What a step's workers share.
    pub fn layers(&mut self) -> KvLayers<'_> {
        KvLayers { layers: &self.layers, blocks: self.options.device_blocks }
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
        let [keys, values] = [&layer.device[0], &layer.device[1]].map(|plane| plane.bytes);
        // SAFETY: both planes hold `blocks · block_bytes` bytes, aligned to cache lines, and are
        // borrowed for 'a, by `KvMemory::layers` exclusively. The interpreter writes a block
        // through one worker (`BlockRun`) and reads after a barrier; or it writes a head's
        // position through the one worker that reads it before the next barrier.
        unsafe { KvStore::new(keys, values, self.blocks, layer.layout) }
    }
}
