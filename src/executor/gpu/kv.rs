//! KV blocks in a GPU's memory, in the layout of its kernels. Keys and values of layers of one
//! shape lie in one allocation, equally far apart, so that a block of all of them is one copy.

use super::GpuWeights;
use super::vram::KV;
use crate::executor::ExecutorError;
use crate::executor::kv_store::KvOptions;
use crate::executor::kv_tiers::{KvBlocks, Registration};
use crate::executor::program::{KvLayerId, KvShape};
use crate::memory::{Commitment, HugePages, populate};
use crate::step::BlockCopy;
use crate::units::BlockId;
use std::sync::Arc;
use tandem_kernels::{BlockCopies, BlockPlanes, Gpu, GpuError, HeadCounts, KvSpans};

/// Bytes that are on their way to other tiers at once: so many that pauses between windows cost
/// little, and so few that a step's own copies come through. Without pauses some wait long: steps
/// beside copies took twice their time on average (H200), though most took no longer.
const WINDOW_BYTES: usize = 16 << 20;

/// The KV blocks of all layers.
pub(super) struct GpuKv {
    copies: BlockCopies,
    /// By shape of layers: `[keys and values of each][blocks] { block_bytes }`.
    groups: Vec<BlockPlanes>,
    /// By layer: its group, and its keys' plane there. That of its values follows.
    layers: Vec<(usize, usize)>,
    options: KvOptions,
    huge_pages: HugePages,
    _reserved: Commitment,
    // Last: the GPU is its.
    weights: Arc<GpuWeights>,
}

impl GpuKv {
    /// Zeroed blocks for every layer, reserved before they are allocated.
    ///
    /// # Errors
    /// The memory does not hold them, or they may not be taken.
    pub fn new(
        weights: &Arc<GpuWeights>,
        options: KvOptions,
        huge_pages: HugePages,
    ) -> Result<Self, ExecutorError> {
        let gpu = weights.gpu();
        // Bytes of a block in one plane, and planes, by group.
        let mut shapes: Vec<(usize, usize)> = Vec::new();
        let mut layers = Vec::new();
        for &KvShape { n_kv_heads, head_dim } in &weights.program().kv_layers {
            let heads = HeadCounts { n_heads: n_kv_heads, n_kv_heads, head_dim };
            let bytes = KvSpans::block_bytes(heads, options.block_tokens, options.dtype);
            let known = shapes.iter().position(|(known, _)| *known == bytes);
            let group = known.unwrap_or_else(|| {
                shapes.push((bytes, 0));
                shapes.len() - 1
            });
            layers.push((group, shapes[group].1));
            shapes[group].1 += 2;
        }
        let of = |(bytes, planes): &(usize, usize)| (*planes, (options.device_blocks, *bytes));
        let bytes = shapes.iter().map(of).map(|(planes, of)| BlockPlanes::bytes_of(planes, of));
        let reserved = weights.vram().row(KV, bytes.sum())?;
        let planes = |shape| {
            let (planes, blocks) = of(&shape);
            gpu.block_planes(planes, blocks)
        };
        let groups = shapes.into_iter().map(planes).collect::<Result<_, _>>()?;
        let copies = gpu.block_copies()?;
        let weights = Arc::clone(weights);
        let _reserved = reserved.commit();
        Ok(Self { copies, groups, layers, options, huge_pages, _reserved, weights })
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> usize {
        self.groups.iter().map(BlockPlanes::bytes).sum()
    }

    /// The store of one layer.
    pub fn layer(&self, id: KvLayerId) -> KvSpans<'_> {
        let (group, plane) = self.layers[id.0 as usize];
        let group = &self.groups[group];
        KvSpans {
            keys: group.plane(plane),
            values: group.plane(plane + 1),
            blocks: self.options.device_blocks,
            block_tokens: self.options.block_tokens,
            dtype: self.options.dtype,
        }
    }

    /// Whether all of a plan's copies can be performed.
    ///
    /// # Errors
    /// [`ExecutorError::InvalidPlan`] when a block does not exist here.
    pub fn check(&self, orders: &[BlockCopy]) -> Result<(), ExecutorError> {
        self.options.check(orders)
    }

    /// Performs checked copies in order, in that of the steps.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn copy(&self, orders: &[BlockCopy]) -> Result<(), ExecutorError> {
        for order in orders {
            for group in &self.groups {
                let (from, to) = (order.from.1.index(), order.to.1.index());
                group.copy_block(self.weights.gpu(), from, to)?;
            }
        }
        if orders.is_empty() { Ok(()) } else { self.keep_order() }
    }

    /// Has copies to other tiers wait for the steps that were started so far: after one whose end
    /// nobody waited for.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn keep_order(&self) -> Result<(), ExecutorError> {
        Ok(self.copies.follow(self.weights.gpu())?)
    }

    /// Performs copies window after window.
    fn in_windows<C>(
        &self,
        windows: impl Iterator<Item = C>,
        start: impl Fn(&Gpu, C) -> Result<(), GpuError>,
    ) -> Result<(), ExecutorError> {
        let gpu = self.weights.gpu();
        self.copies.begin(gpu)?;
        for window in windows {
            let started = start(gpu, window);
            // What was started before an error is waited for, too.
            self.copies.wait(gpu)?;
            started?;
        }
        Ok(())
    }

    /// Blocks of a window.
    fn window_blocks(&self) -> usize {
        (WINDOW_BYTES / self.block_bytes().max(1)).max(1)
    }

    /// Each group, with the bytes that its part of a block takes.
    fn parts(&self) -> impl Iterator<Item = (&BlockPlanes, usize)> {
        self.groups.iter().map(|group| (group, group.block_bytes()))
    }
}

impl KvBlocks for GpuKv {
    fn block_bytes(&self) -> usize {
        self.parts().map(|(_, bytes)| bytes).sum()
    }

    fn device_blocks(&self) -> usize {
        self.options.device_blocks
    }

    fn huge_pages(&self) -> HugePages {
        self.huge_pages
    }

    unsafe fn register(&self, memory: &[u8]) -> Result<Registration, ExecutorError> {
        // The driver would make the pages itself, and other threads' calls wait for that.
        populate(memory);
        // SAFETY: the caller keeps the memory mapped.
        let registered = unsafe { self.weights.gpu().register_whole(memory)? };
        Ok(Some(Box::new(registered)))
    }

    unsafe fn read(&self, copies: &mut [(BlockId, &mut [u8])]) -> Result<(), ExecutorError> {
        self.in_windows(copies.chunks_mut(self.window_blocks()), |gpu, window| {
            for (block, to) in window {
                let mut to = &mut **to;
                for (group, bytes) in self.parts() {
                    let (part, others) = to.split_at_mut(bytes);
                    to = others;
                    // SAFETY: it is registered, and `in_windows` waits before it is used again.
                    unsafe { self.copies.fetch(gpu, (group, block.index()), part)? };
                }
            }
            Ok(())
        })
    }

    unsafe fn write(&self, copies: &[(BlockId, &[u8])]) -> Result<(), ExecutorError> {
        self.in_windows(copies.chunks(self.window_blocks()), |gpu, window| {
            for (block, from) in window {
                let mut from = *from;
                for (group, bytes) in self.parts() {
                    let (part, others) = from.split_at(bytes);
                    from = others;
                    // SAFETY: it is registered, and `in_windows` waits before it is written again.
                    unsafe { self.copies.send(gpu, part, (group, block.index()))? };
                }
            }
            Ok(())
        })
    }
}
