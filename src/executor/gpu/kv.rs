//! KV blocks in a GPU's memory, and host memory behind it for sequences that wait. Blocks have the
//! layout of the GPU's kernels in both.

use crate::executor::ExecutorError;
use crate::executor::kv_store::KvOptions;
use crate::executor::program::{KvLayerId, KvShape};
use crate::step::{BlockCopy, Tier};
use tandem_kernels::{DeviceMemory, Gpu, HeadCounts, KvSpans, Span};

/// One layer's keys or values in both tiers.
struct Plane {
    device: DeviceMemory,
    host: Vec<u8>,
    block_bytes: usize,
}

/// The KV blocks of all layers.
pub(super) struct GpuKv {
    /// Keys and values per layer.
    layers: Vec<[Plane; 2]>,
    options: KvOptions,
}

impl Plane {
    fn block(&self, block: usize) -> Span<'_> {
        self.device.span().part(block * self.block_bytes, self.block_bytes)
    }

    fn perform(&mut self, gpu: &Gpu, order: &BlockCopy) -> Result<(), ExecutorError> {
        let (from, to, bytes) = (order.from.1.index(), order.to.1.index(), self.block_bytes);
        match (order.from.0, order.to.0) {
            (Tier::Device, Tier::Host) => {
                let span = self.device.span().part(from * bytes, bytes);
                gpu.download(span, &mut self.host[to * bytes..][..bytes])?;
            }
            (Tier::Host, Tier::Device) => {
                gpu.upload(&self.host[from * bytes..][..bytes], self.block(to))?;
            }
            (Tier::Host, _) => {
                self.host.copy_within(from * bytes..(from + 1) * bytes, to * bytes);
            }
            _ => gpu.copy(self.block(from), self.block(to))?,
        }
        Ok(())
    }
}

impl GpuKv {
    /// Zeroed blocks for every layer.
    ///
    /// # Errors
    /// The memory does not hold them.
    pub fn new(gpu: &Gpu, shapes: &[KvShape], options: KvOptions) -> Result<Self, ExecutorError> {
        let plane = |shape: &KvShape| {
            let &KvShape { n_kv_heads, head_dim } = shape;
            let heads = HeadCounts { n_heads: n_kv_heads, n_kv_heads, head_dim };
            let block_bytes = KvSpans::block_bytes(heads, options.block_tokens, options.dtype);
            let device = gpu.alloc(options.device_blocks * block_bytes)?;
            let host = vec![0; options.host_blocks * block_bytes];
            Ok::<_, ExecutorError>(Plane { device, host, block_bytes })
        };
        let layers = shapes.iter().map(|shape| Ok([plane(shape)?, plane(shape)?]));
        Ok(Self { layers: layers.collect::<Result<_, ExecutorError>>()?, options })
    }

    /// Bytes of both tiers.
    pub fn bytes(&self) -> usize {
        let planes = self.layers.iter().flatten();
        planes.map(|plane| plane.device.bytes() + plane.host.len()).sum()
    }

    /// The store of one layer.
    pub fn layer(&self, id: KvLayerId) -> KvSpans<'_> {
        let [keys, values] = &self.layers[id.0 as usize];
        KvSpans {
            keys: keys.device.span(),
            values: values.device.span(),
            blocks: self.options.device_blocks,
            block_tokens: self.options.block_tokens,
            dtype: self.options.dtype,
        }
    }

    /// Whether all orders can be performed.
    ///
    /// # Errors
    /// [`ExecutorError::InvalidPlan`] when a block or tier does not exist.
    pub fn check(&self, orders: &[BlockCopy]) -> Result<(), ExecutorError> {
        let ends = orders.iter().flat_map(|order| [order.from, order.to].map(|end| (order, end)));
        for (order, (tier, block)) in ends {
            let blocks = self.blocks(tier);
            if block.index() >= blocks {
                let message = format!("{order:?}: block {} of {blocks} in {tier:?}", block.0);
                return Err(ExecutorError::InvalidPlan { field: "copies", message });
            }
        }
        Ok(())
    }

    fn blocks(&self, tier: Tier) -> usize {
        match tier {
            Tier::Device => self.options.device_blocks,
            Tier::Host => self.options.host_blocks,
            Tier::Disk => 0,
        }
    }

    /// Performs checked copies in order.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn copy(&mut self, gpu: &Gpu, orders: &[BlockCopy]) -> Result<(), ExecutorError> {
        if !orders.is_empty() {
            // The driver may wait for what runs before such copies, without an end.
            gpu.synchronize()?;
        }
        for order in orders {
            for plane in self.layers.iter_mut().flatten() {
                plane.perform(gpu, order)?;
            }
        }
        Ok(())
    }
}
