//! The paged store of keys and values of one layer, and where each element lies in it.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

/// Tokens that lie side by side in a key block, and so the granule of `block_tokens`: two vectors
/// of AVX2 or one of AVX-512.
pub const TOKEN_GROUP: usize = 16;

/// Elements of a head that share a scale in a store of 8 bits.
pub const KV_GROUP: usize = 32;

/// How a store keeps keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvDType {
    /// 16-bit floats.
    #[default]
    F16,
    /// 8-bit numbers in groups of 32 along the head, each with an f16 scale: 8.5 bits an element.
    Q8_0,
    /// 16-bit floats with the range of f32; on a GPU only.
    Bf16,
    /// 8-bit floats, 4 bits of exponent and 3 of fraction, up to ±448, without a scale; on a GPU
    /// only.
    Fp8E4m3,
}

/// A name that no type has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown type of KV cache {name:?}: want f16, q8_0, bf16 or fp8_e4m3")]
pub struct UnknownKvDType {
    /// The name as given.
    pub name: String,
}

impl KvDType {
    /// Every type.
    pub const ALL: [KvDType; 4] = [KvDType::F16, KvDType::Q8_0, KvDType::Bf16, KvDType::Fp8E4m3];

    /// The types that the kernels of this crate have; those of a GPU have all.
    pub const ON_CPU: [KvDType; 2] = [KvDType::F16, KvDType::Q8_0];

    /// The name in configuration and logs.
    pub fn name(self) -> &'static str {
        match self {
            KvDType::F16 => "f16",
            KvDType::Q8_0 => "q8_0",
            KvDType::Bf16 => "bf16",
            KvDType::Fp8E4m3 => "fp8_e4m3",
        }
    }

    /// Whether the kernels of this crate have it.
    pub fn is_on_cpu(self) -> bool {
        Self::ON_CPU.contains(&self)
    }

    /// Bytes of one token's key, or value, of one head.
    pub fn head_bytes(self, head_dim: usize) -> usize {
        let scales = if self == KvDType::Q8_0 { head_dim.div_ceil(KV_GROUP) } else { 0 };
        self.element_bytes() * head_dim + 2 * scales
    }

    /// Bytes of an element, scales aside.
    fn element_bytes(self) -> usize {
        match self {
            KvDType::F16 | KvDType::Bf16 => 2,
            KvDType::Q8_0 | KvDType::Fp8E4m3 => 1,
        }
    }
}

impl fmt::Display for KvDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for KvDType {
    type Err = UnknownKvDType;

    fn from_str(name: &str) -> Result<KvDType, UnknownKvDType> {
        let known = KvDType::ALL.into_iter().find(|dtype| dtype.name().eq_ignore_ascii_case(name));
        known.ok_or_else(|| UnknownKvDType { name: name.to_owned() })
    }
}

/// A store that no kernel can work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvLayoutError {
    /// Kernels compute the scores of 16 tokens of one block together.
    #[error("KV blocks must hold a positive multiple of {TOKEN_GROUP} tokens, got {got}")]
    BlockTokens {
        /// Tokens per block as given.
        got: usize,
    },
    /// Only a GPU has kernels for this type.
    #[error("kv.dtype is {got}; allowed on a CPU: f16, q8_0")]
    DType {
        /// The type as given.
        got: KvDType,
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

/// The shape of one layer's store. Keys and values have stores of the same size:
/// ```text
/// f16   keys    [block][kv_head] { [head_dim][block_tokens] f16 }
///       values  [block][kv_head] { [block_tokens][head_dim] f16 }
/// q8_0  keys    [block][kv_head] { [head_dim][block_tokens] i8, [groups][block_tokens] f16 }
///       values  [block][kv_head] { [block_tokens][head_dim] i8, [groups][block_tokens] f16 }
/// ```
/// Keys are transposed within a block, so that the lanes of a vector are tokens: scores then need
/// no horizontal sums, and `head_dim` may be any number. So are the scales of both, of which a
/// group of 32 elements has one (the last group may be shorter). A block of one head is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    n_kv_heads: usize,
    head_dim: usize,
    block_tokens: usize,
    dtype: KvDType,
}

impl KvLayout {
    /// The layout of blocks of `block_tokens` tokens.
    ///
    /// # Errors
    /// [`KvLayoutError`] when `block_tokens` is no positive multiple of [`TOKEN_GROUP`], or a
    /// dimension is 0, or the type is none of [`KvDType::ON_CPU`].
    pub fn new(
        n_kv_heads: usize,
        head_dim: usize,
        block_tokens: usize,
        dtype: KvDType,
    ) -> Result<KvLayout, KvLayoutError> {
        if block_tokens == 0 || !block_tokens.is_multiple_of(TOKEN_GROUP) {
            return Err(KvLayoutError::BlockTokens { got: block_tokens });
        }
        if n_kv_heads == 0 || head_dim == 0 {
            return Err(KvLayoutError::Empty { n_kv_heads, head_dim });
        }
        if !dtype.is_on_cpu() {
            return Err(KvLayoutError::DType { got: dtype });
        }
        Ok(KvLayout { n_kv_heads, head_dim, block_tokens, dtype })
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

    /// How elements are kept.
    pub fn dtype(&self) -> KvDType {
        self.dtype
    }

    /// Whether elements have 8 bits, and groups of them a scale; else they are f16.
    pub(crate) fn is_eight_bits(&self) -> bool {
        self.dtype == KvDType::Q8_0
    }

    /// Bytes of one block of keys; a block of values has as many.
    pub fn block_bytes(&self) -> usize {
        self.n_kv_heads * self.head_bytes()
    }

    /// Where key element `dim` of a token lies: bytes from its block's first.
    pub fn key_offset(&self, kv_head: usize, token: usize, dim: usize) -> usize {
        let element = dim * self.block_tokens + token;
        kv_head * self.head_bytes() + element * self.dtype.element_bytes()
    }

    /// Where value element `dim` of a token lies: bytes from its block's first.
    pub fn value_offset(&self, kv_head: usize, token: usize, dim: usize) -> usize {
        let element = token * self.head_dim + dim;
        kv_head * self.head_bytes() + element * self.dtype.element_bytes()
    }

    /// Where the scale of group `group` of a token lies in a store of 8 bits, of keys as of values:
    /// bytes from its block's first.
    pub fn scale_offset(&self, kv_head: usize, token: usize, group: usize) -> usize {
        let elements = self.head_dim * self.block_tokens;
        kv_head * self.head_bytes() + elements + 2 * (group * self.block_tokens + token)
    }

    /// Bytes of one head's part of a block.
    fn head_bytes(&self) -> usize {
        self.dtype.head_bytes(self.head_dim) * self.block_tokens
    }
}

/// One layer's keys and values. A raw view, so that each worker can have a copy of it.
#[derive(Clone, Copy, Debug)]
pub struct KvStore<'a> {
    keys: *mut u8,
    values: *mut u8,
    n_blocks: usize,
    layout: KvLayout,
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: the promise made at `new` is exactly that uses on several threads do not conflict.
unsafe impl Send for KvStore<'_> {}
// SAFETY: as above.
unsafe impl Sync for KvStore<'_> {}

impl<'a> KvStore<'a> {
    /// A view of `n_blocks` blocks of keys and of values, each `n_blocks · block_bytes` bytes.
    ///
    /// # Safety
    /// Both pointers must be even, and valid for reads and writes of that many initialised bytes
    /// during `'a`. While copies of the view live, nobody may write an element that another thread
    /// uses at the same time: writes to one sequence's head (`Kernels::write_kv`) end before
    /// attention on it starts, and two threads write different heads, or different blocks, or
    /// through one.
    pub unsafe fn new(
        keys: *mut u8,
        values: *mut u8,
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

    /// Key element 0 of a token; element `d` follows `d · block_tokens` elements later.
    ///
    /// # Panics
    /// When the block is not in the store.
    #[inline(always)]
    pub(crate) fn key_at(&self, block: u32, kv_head: usize, token: usize) -> *mut u8 {
        let offset = self.layout.key_offset(kv_head, token, 0);
        // SAFETY: the block is checked, and head and token lie inside it.
        unsafe { self.keys.add(self.block_start(block, kv_head, token) + offset) }
    }

    /// Value element 0 of a token; the others follow.
    ///
    /// # Panics
    /// When the block is not in the store.
    #[inline(always)]
    pub(crate) fn value_at(&self, block: u32, kv_head: usize, token: usize) -> *mut u8 {
        let offset = self.layout.value_offset(kv_head, token, 0);
        // SAFETY: as in `key_at`.
        unsafe { self.values.add(self.block_start(block, kv_head, token) + offset) }
    }

    /// Scales of group 0 of a token's key and value in a store of 8 bits; those of group `g` follow
    /// at `g · block_tokens`.
    ///
    /// # Panics
    /// When the block is not in the store, or the store has no scales.
    #[inline(always)]
    pub(crate) fn scales_at(&self, block: u32, kv_head: usize, token: usize) -> [*mut u16; 2] {
        assert!(self.layout.is_eight_bits(), "only 8 bits have scales");
        let offset = self.layout.scale_offset(kv_head, token, 0);
        let start = self.block_start(block, kv_head, token) + offset;
        // SAFETY: as in `key_at`; offsets of scales are even.
        unsafe { [self.keys.add(start).cast(), self.values.add(start).cast()] }
    }

    #[inline(always)]
    fn block_start(&self, block: u32, kv_head: usize, token: usize) -> usize {
        assert!((block as usize) < self.n_blocks, "block {block} of {}", self.n_blocks);
        debug_assert!(kv_head < self.layout.n_kv_heads && token < self.layout.block_tokens);
        block as usize * self.layout.block_bytes()
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
