//! Layers of keys and values in one mapping, as an executor has them.

use tandem_cpu_kernels::attention::{
    AttentionCall, AttentionParams, AttentionPart, AttentionScratch, KvLayout, KvStore, TokenRows,
};
use tandem_cpu_kernels::{Kernels, OutputColumns};

/// As many layers as fill the store, at least one, each with one sequence of `context` tokens.
pub struct Layers {
    layout: KvLayout,
    context: usize,
    count: usize,
    blocks: Vec<u32>,
    /// `[layer][keys, values][block]`, from `start` on.
    memory: Vec<u8>,
    start: usize,
}

const HUGE_PAGE: usize = 2 << 20;
const MADV_HUGEPAGE: i32 = 14;

unsafe extern "C" {
    fn madvise(address: *mut u8, length: usize, advice: i32) -> i32;
}

impl Layers {
    pub fn new(layout: KvLayout, context: usize, store_bytes: usize) -> Layers {
        let n_blocks = context / layout.block_tokens();
        let plane = n_blocks * layout.block_bytes();
        let count = store_bytes.div_ceil(2 * plane);
        let bytes = count * 2 * plane;
        let mut memory: Vec<u8> = Vec::with_capacity(bytes + HUGE_PAGE);
        let start = memory.as_ptr().align_offset(HUGE_PAGE);
        // SAFETY: the range lies inside the vector's own allocation; the advice changes no byte.
        let _ = unsafe { madvise(memory.as_mut_ptr().add(start), bytes, MADV_HUGEPAGE) };
        memory.resize(start, 0);
        // 0x2a2a is 0.048 as f16, 0x2a is 42 as an 8-bit number.
        memory.resize(start + bytes, 0x2a);
        // An odd multiplier scatters the blocks over the store.
        let blocks = (0..n_blocks).map(|b| (b * 769 % n_blocks) as u32).collect();
        Layers { layout, context, count, blocks, memory, start }
    }

    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Keys and values of all layers.
    pub fn bytes(&self) -> usize {
        self.count * 2 * self.plane()
    }

    fn plane(&self) -> usize {
        self.blocks.len() * self.layout.block_bytes()
    }

    /// `[n_tokens, n_heads · head_dim]`.
    pub fn queries(&self, n_tokens: usize, n_heads: usize) -> Vec<f32> {
        let len = n_tokens * n_heads * self.layout.head_dim();
        (0..len).map(|i| (i * 31 % 101) as f32 / 101.0 - 0.5).collect()
    }

    /// The last tokens' attention in layer `item / n_kv_heads`, KV head `item mod n_kv_heads`.
    pub fn attend(
        &self,
        kernels: &Kernels,
        (params, item): (AttentionParams, usize),
        queries: &[f32],
        (out, scratch): (&mut [f32], &mut AttentionScratch),
    ) {
        let (layer, kv_head) = (item / self.layout.n_kv_heads(), item % self.layout.n_kv_heads());
        let plane = self.plane();
        let keys = self.memory[self.start + layer * 2 * plane..][..plane].as_ptr().cast_mut();
        let width = params.n_heads * self.layout.head_dim();
        let n_tokens = queries.len() / width;
        // SAFETY: the store lives longer than the call, which only reads it; the output is
        // borrowed exclusively.
        let (store, output) = unsafe {
            let values = keys.add(plane);
            let store = KvStore::new(keys, values, self.blocks.len(), self.layout);
            (store, OutputColumns::new(out.as_mut_ptr(), n_tokens, width))
        };
        let call = AttentionCall {
            params,
            store,
            blocks: &self.blocks,
            first_position: self.context - n_tokens,
            queries: TokenRows::packed(queries, width),
        };
        let part = AttentionPart { kv_head, queries: 0..n_tokens };
        kernels.attend(&call, &part, output, scratch);
    }
}
