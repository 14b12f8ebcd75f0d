//! The paged f16 store of keys and values of one layer, and where each element lies in it.

use half::f16;
use std::marker::PhantomData;

/// Tokens that lie side by side in a key block, and so the granule of `block_tokens`: two vectors
/// of AVX2 or one of AVX-512.
pub const TOKEN_GROUP: usize = 16;

/// A store that no kernel can work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvLayoutError {
    /// Kernels compute the scores of 16 tokens of one block together.
    #[error("KV blocks must hold a positive multiple of {TOKEN_GROUP} tokens, got {got}")]
    BlockTokens {
        /// Tokens per block as given.
        got: usize,
    },
    /// A layer has heads, and heads have elements.
    #[error("a KV store of {n_kv_heads} heads of {head_dim} elements holds nothing")]
    Empty {
        /// Heads as given.
        n_kv_heads: usize,
        /// Elements per head as given.
        head_dim: usize,
    },
}

/// The shape of one layer's store. Both stores of a layer have the same size:
/// ```text
/// keys    [block][kv_head][head_dim][block_tokens]  f16
/// values  [block][kv_head][block_tokens][head_dim]  f16
/// ```
/// Keys are transposed within a block, so that the lanes of a vector are tokens: scores then need
/// no horizontal sums, and `head_dim` may be any number. A block of one head is contiguous in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    n_kv_heads: usize,
    head_dim: usize,
    block_tokens: usize,
}

impl KvLayout {
    /// The layout of blocks of `block_tokens` tokens.
    ///
    /// # Errors
    /// [`KvLayoutError`] when `block_tokens` is no positive multiple of [`TOKEN_GROUP`], or a
    /// dimension is 0.
    pub fn new(
        n_kv_heads: usize,
        head_dim: usize,
        block_tokens: usize,
    ) -> Result<KvLayout, KvLayoutError> {
        if block_tokens == 0 || !block_tokens.is_multiple_of(TOKEN_GROUP) {
            return Err(KvLayoutError::BlockTokens { got: block_tokens });
        }
        if n_kv_heads == 0 || head_dim == 0 {
            return Err(KvLayoutError::Empty { n_kv_heads, head_dim });
        }
        Ok(KvLayout { n_kv_heads, head_dim, block_tokens })
    }

    /// Key-value heads of the layer.
    pub fn n_kv_heads(&self) -> usize {
        self.n_kv_heads
    }

    /// Elements of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// f16 elements of one block of keys; a block of values has as many.
    pub fn block_elements(&self) -> usize {
        self.n_kv_heads * self.head_elements()
    }

    /// Where key element `dim` of a token lies, relative to its block's first element.
    pub fn key_offset(&self, kv_head: usize, token: usize, dim: usize) -> usize {
        kv_head * self.head_elements() + dim * self.block_tokens + token
    }

    /// Where value element `dim` of a token lies, relative to its block's first element.
    pub fn value_offset(&self, kv_head: usize, token: usize, dim: usize) -> usize {
        kv_head * self.head_elements() + token * self.head_dim + dim
    }

    /// Elements of one head's part of a block.
    fn head_elements(&self) -> usize {
        self.head_dim * self.block_tokens
    }
}

/// One layer's keys and values. A raw view, so that each worker can have a copy of it.
#[derive(Clone, Copy, Debug)]
pub struct KvStore<'a> {
    keys: *mut f16,
    values: *mut f16,
    n_blocks: usize,
    layout: KvLayout,
    lifetime: PhantomData<&'a mut [f16]>,
}

// SAFETY: the promise made at `new` is exactly that uses on several threads do not conflict.
unsafe impl Send for KvStore<'_> {}
// SAFETY: as above.
unsafe impl Sync for KvStore<'_> {}

impl<'a> KvStore<'a> {
    /// A view of `n_blocks` blocks of keys and of values, each `n_blocks · block_elements` f16.
    ///
    /// # Safety
    /// Both pointers must be valid for reads and writes of that many initialised elements during
    /// `'a`. While copies of the view live, nobody may write an element that another thread uses at
    /// the same time: writes to one sequence's head (`Kernels::write_kv`) end before attention on
    /// it starts, and two threads write different heads, or different blocks, or through one.
    pub unsafe fn new(
        keys: *mut f16,
        values: *mut f16,
        n_blocks: usize,
        layout: KvLayout,
    ) -> KvStore<'a> {
        KvStore { keys, values, n_blocks, layout, lifetime: PhantomData }
    }

    /// Shape of the blocks.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Blocks of the store.
    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    /// Key element 0 of a token; element `d` follows at `d · block_tokens`.
    ///
    /// # Panics
    /// When the block is not in the store.
    #[inline(always)]
    pub(crate) fn key_at(&self, block: u32, kv_head: usize, token: usize) -> *mut u16 {
        let offset = self.layout.key_offset(kv_head, token, 0);
        // SAFETY: the block is checked, and head and token lie inside it.
        unsafe { self.keys.add(self.block_start(block, kv_head, token) + offset).cast() }
    }

    /// Value element 0 of a token; the others follow.
    ///
    /// # Panics
    /// When the block is not in the store.
    #[inline(always)]
    pub(crate) fn value_at(&self, block: u32, kv_head: usize, token: usize) -> *mut u16 {
        let offset = self.layout.value_offset(kv_head, token, 0);
        // SAFETY: as in `key_at`.
        unsafe { self.values.add(self.block_start(block, kv_head, token) + offset).cast() }
    }

    #[inline(always)]
    fn block_start(&self, block: u32, kv_head: usize, token: usize) -> usize {
        assert!((block as usize) < self.n_blocks, "block {block} of {}", self.n_blocks);
        debug_assert!(kv_head < self.layout.n_kv_heads && token < self.layout.block_tokens);
        block as usize * self.layout.block_elements()
    }
}

/// Rows of one token each inside a larger buffer: queries inside a fused projection, say.
#[derive(Clone, Copy, Debug)]
pub struct TokenRows<'a> {
    data: &'a [f32],
    stride: usize,
    width: usize,
    n_tokens: usize,
}

impl<'a> TokenRows<'a> {
    /// `n_tokens` rows of `width` elements; row `t` starts at `data[t · stride]`.
    ///
    /// # Panics
    /// When a row would not lie inside `data`.
    pub fn new(data: &'a [f32], n_tokens: usize, width: usize, stride: usize) -> TokenRows<'a> {
        let fits =
            n_tokens == 0 || (stride >= width && (n_tokens - 1) * stride + width <= data.len());
        assert!(fits, "{n_tokens} rows of {width}, {stride} apart, in {} elements", data.len());
        TokenRows { data, stride, width, n_tokens }
    }

    /// Rows that follow each other without gaps: `data` is `[n_tokens, width]`.
    ///
    /// # Panics
    /// When `data` is no whole number of rows.
    pub fn packed(data: &'a [f32], width: usize) -> TokenRows<'a> {
        crate::norm::assert_whole_rows(data.len(), width);
        let n_tokens = data.len().checked_div(width).unwrap_or(0);
        TokenRows { data, stride: width, width, n_tokens }
    }

    /// Number of rows.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The row of token `token`.
    pub fn row(&self, token: usize) -> &'a [f32] {
        &self.data[token * self.stride..][..self.width]
    }
}
