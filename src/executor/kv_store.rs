//! The bytes of KV blocks, f16, per tier: the store that attention reads, and host memory behind
//! it for sequences that wait. Performs [`BlockCopy`] orders.

use super::ExecutorError;
use super::program::{KvLayerId, KvShape};
use crate::step::{BlockCopy, Tier};
use half::f16;
use std::cell::UnsafeCell;
use tandem_cpu_kernels::attention::{KvLayout, KvStore};

/// How many blocks each tier has, and how large they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvOptions {
    /// Tokens of a block: a multiple of 16.
    pub block_tokens: usize,
    /// Blocks that attention reads.
    pub device_blocks: usize,
    /// Blocks behind them.
    pub host_blocks: usize,
}

/// One layer's keys or values in one tier.
struct Plane {
    /// `[blocks, block_elements]` f16 bits; the layout inside a block is [`KvLayout`]'s.
    elements: Box<[UnsafeCell<u16>]>,
    block_elements: usize,
}

// SAFETY: a shared plane gives out nothing but a pointer, to `KvLayers::layer`; whoever uses it
// keeps `KvStore`'s rule.
unsafe impl Sync for Plane {}

impl Plane {
    fn new(blocks: usize, block_elements: usize) -> Self {
        // Zeroed memory comes from the system untouched: pages exist once they are written.
        let bits = vec![0_u16; blocks * block_elements].into_boxed_slice();
        // SAFETY: `UnsafeCell<u16>` has the layout of `u16`, and the box is passed on whole.
        let elements = unsafe { Box::from_raw(Box::into_raw(bits) as *mut [UnsafeCell<u16>]) };
        Self { elements, block_elements }
    }

    fn pointer(&self) -> *mut f16 {
        // A range's pointer, so that it may reach all elements.
        self.elements.as_ptr().cast_mut().cast()
    }

    fn all_mut(&mut self) -> &mut [u16] {
        // SAFETY: `UnsafeCell<u16>` has the layout of `u16`, and the borrow is exclusive.
        unsafe { &mut *(&raw mut *self.elements as *mut [u16]) }
    }

    fn block_mut(&mut self, block: usize) -> &mut [u16] {
        let elements = self.block_elements;
        &mut self.all_mut()[block * elements..][..elements]
    }

    fn copy_within(&mut self, from: usize, to: usize) {
        let elements = self.block_elements;
        let start = from * elements;
        self.all_mut().copy_within(start..start + elements, to * elements);
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
    /// A block size that kernels can't work on.
    pub fn new(shapes: &[KvShape], options: KvOptions) -> Result<Self, ExecutorError> {
        let layer = |shape: &KvShape| {
            let layout = KvLayout::new(shape.n_kv_heads, shape.head_dim, options.block_tokens)?;
            let planes =
                |blocks: usize| [(); 2].map(|()| Plane::new(blocks, layout.block_elements()));
            let (device, host) = (planes(options.device_blocks), planes(options.host_blocks));
            Ok(Layer { layout, device, host })
        };
        Ok(Self {
            layers: shapes.iter().map(layer).collect::<Result<_, ExecutorError>>()?,
            options,
        })
    }

    /// Bytes of both tiers.
    pub fn bytes(&self) -> usize {
        let elements = |layer: &Layer| {
            let planes = layer.device.iter().chain(&layer.host);
            planes.map(|plane| plane.elements.len()).sum::<usize>()
        };
        self.layers.iter().map(elements).sum::<usize>() * size_of::<f16>()
    }

    /// Performs copies in order.
    ///
    /// # Errors
    /// [`ExecutorError::InvalidPlan`] when a block or tier does not exist.
    pub fn copy(&mut self, orders: &[BlockCopy]) -> Result<(), ExecutorError> {
        for order in orders {
            let from = self.check(order, order.from)?;
            let to = self.check(order, order.to)?;
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
        (tier, block): (Tier, crate::units::BlockId),
    ) -> Result<usize, ExecutorError> {
        let blocks = match tier {
            Tier::Device => self.options.device_blocks,
            Tier::Host => self.options.host_blocks,
            Tier::Disk => 0,
        };
        if block.index() < blocks {
            return Ok(block.index());
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
        let [keys, values] = [layer.device[0].pointer(), layer.device[1].pointer()];
        // SAFETY: both planes hold `blocks · block_elements` elements and are borrowed for 'a, by
        // `KvMemory::layers` exclusively. The interpreter writes a block through one worker
        // (`BlockRun`) and reads after a barrier.
        unsafe { KvStore::new(keys, values, self.blocks, layer.layout) }
    }
}
