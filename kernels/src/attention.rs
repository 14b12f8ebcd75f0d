//! Rotary embedding, the paged store of keys and values in f16, and attention over it.
//!
//! ```text
//! keys    [block][kv_head][head_dim / 8][block_tokens][8] f16
//! values  [block][kv_head][block_tokens][head_dim] f16
//! ```
//! Attention runs with an online softmax (arXiv 2205.14135), split over segments of 256 positions
//! that are merged in ascending order: a token's bits depend on nothing else in its batch.

use crate::gpu::{Gpu, GpuError, Span};
use cudarc::driver::DeviceRepr;

const F32: usize = size_of::<f32>();
const WARPS: usize = 4;
/// Positions of a segment.
const SEGMENT: usize = 256;
/// Query heads that share each key and value that is read.
const HEADS: usize = 4;
/// Largest head.
const HEAD_DIM_MAX: usize = 256;

/// Heads of one attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadCounts {
    /// Query heads, a multiple of the others.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Elements of a head: a multiple of 8, at most 256.
    pub head_dim: usize,
}

/// One layer's keys and values.
#[derive(Clone, Copy, Debug)]
pub struct KvSpans<'a> {
    /// Keys of all blocks.
    pub keys: Span<'a>,
    /// Values of all blocks.
    pub values: Span<'a>,
    /// How many blocks there are.
    pub blocks: usize,
    /// Tokens of a block: a multiple of 16.
    pub block_tokens: usize,
}

/// Where the tokens of a step stand; u32 numbers.
#[derive(Clone, Copy, Debug)]
pub struct TokenTables<'a> {
    /// Tokens of the step.
    pub tokens: usize,
    /// `[tokens]`: position in its sequence.
    pub positions: Span<'a>,
    /// `[tokens]`: where the block table of its sequence starts in `blocks`.
    pub tables: Span<'a>,
    /// Block tables, one after the other.
    pub blocks: Span<'a>,
}

/// What is done to heads before attention.
#[derive(Clone, Copy, Debug)]
pub struct RotateHeads<'a> {
    /// `[tokens, (n_heads + 2 n_kv_heads) · head_dim]` f32: queries, keys, values. Queries are
    /// rotated in place.
    pub heads: Span<'a>,
    /// `[tokens, angle_stride]` f32: cosines of all pairs, then sines.
    pub angles: Span<'a>,
    /// Elements from one token's angles to the next's.
    pub angle_stride: usize,
    /// Pairs of elements that turn.
    pub pairs: usize,
    /// Whether elements 2i and 2i + 1 turn together, not i and i + pairs.
    pub interleaved: bool,
    /// Weight `[head_dim]` and eps of the norm of queries.
    pub query_norm: Option<(Span<'a>, f32)>,
    /// Weight `[head_dim]` and eps of the norm of keys.
    pub key_norm: Option<(Span<'a>, f32)>,
}

/// One attention.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// As [`RotateHeads::heads`], rotated.
    pub heads: Span<'a>,
    /// u32 numbers of the tokens that attend, and how many there are; `None` for all.
    pub chosen: Option<(Span<'a>, usize)>,
    /// `[tokens, n_heads · head_dim]` f32
    pub out: Span<'a>,
    /// Room for the segments of [`Attend::partial_bytes`].
    pub partials: Span<'a>,
    /// Factor of scores.
    pub scale: f32,
    /// Scores become `cap · tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// A token sees itself and the `window − 1` tokens before.
    pub window: Option<usize>,
    /// Positions of the token furthest on, and one.
    pub positions_max: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct StoreArg {
    keys: u64,
    values: u64,
    block_tokens: u32,
    n_kv_heads: u32,
    head_dim: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct TokensArg {
    positions: u64,
    tables: u64,
    blocks: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RotateArgs {
    heads: u64,
    angles: u64,
    query_norm: u64,
    key_norm: u64,
    tokens: TokensArg,
    store: StoreArg,
    query_eps: f32,
    key_eps: f32,
    n_heads: u32,
    angle_stride: u32,
    pairs: u32,
    interleaved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AttendArgs {
    heads: u64,
    out: u64,
    partials: u64,
    chosen: u64,
    tokens: TokensArg,
    store: StoreArg,
    scale: f32,
    softcap: f32,
    window: u32,
    n_heads: u32,
    head_stride: u32,
    segments: u32,
}

// SAFETY: plain numbers in the order of `RotateArgs` in attention.cu.
unsafe impl DeviceRepr for RotateArgs {}
// SAFETY: plain numbers in the order of `AttendArgs` in attention.cu.
unsafe impl DeviceRepr for AttendArgs {}

impl HeadCounts {
    /// Whether our kernels can attend with such heads.
    pub fn is_supported(&self) -> bool {
        self.head_dim.is_multiple_of(8) && (8..=HEAD_DIM_MAX).contains(&self.head_dim)
    }

    /// Elements of a token's queries, keys and values.
    fn width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }
}

impl KvSpans<'_> {
    /// Bytes of the keys, or values, of one block.
    pub fn block_bytes(heads: HeadCounts, block_tokens: usize) -> usize {
        heads.n_kv_heads * heads.head_dim * block_tokens * size_of::<u16>()
    }

    fn argument(&self, heads: HeadCounts) -> StoreArg {
        assert!(heads.is_supported(), "{heads:?}");
        assert!(self.block_tokens.is_multiple_of(16), "{} tokens in a block", self.block_tokens);
        let bytes = self.blocks * Self::block_bytes(heads, self.block_tokens);
        StoreArg {
            keys: self.keys.of(bytes, 1),
            values: self.values.of(bytes, 1),
            block_tokens: self.block_tokens as u32,
            n_kv_heads: heads.n_kv_heads as u32,
            head_dim: heads.head_dim as u32,
            unused: 0,
        }
    }
}

impl TokenTables<'_> {
    fn argument(&self) -> TokensArg {
        TokensArg {
            positions: self.positions.unaligned(self.tokens, size_of::<u32>()),
            tables: self.tables.unaligned(self.tokens, size_of::<u32>()),
            blocks: self.blocks.of(1, size_of::<u32>()),
        }
    }
}

impl Attend<'_> {
    /// Bytes of the segments of a step, where sequences have up to `positions_max` positions.
    pub fn partial_bytes(heads: HeadCounts, tokens: usize, positions_max: usize) -> usize {
        match positions_max.div_ceil(SEGMENT) {
            0 | 1 => 0,
            segments => tokens * heads.n_heads * segments * (heads.head_dim + 2) * F32,
        }
    }
}

impl Attend<'_> {
    /// As kernels take it, for `n_tokens` tokens with partial sums.
    pub(crate) fn arguments(
        &self,
        heads: HeadCounts,
        n_tokens: usize,
        (tokens, store): (&TokenTables<'_>, &KvSpans<'_>),
    ) -> AttendArgs {
        let partials = Attend::partial_bytes(heads, n_tokens, self.positions_max);
        AttendArgs {
            heads: self.heads.of(tokens.tokens * heads.width(), F32),
            out: self.out.of(tokens.tokens * heads.n_heads * heads.head_dim, F32),
            partials: self.partials.of(partials, 1),
            chosen: self.chosen.map_or(0, |(list, n)| list.unaligned(n, size_of::<u32>())),
            tokens: tokens.argument(),
            store: store.argument(heads),
            scale: self.scale,
            softcap: self.softcap.unwrap_or(0.0),
            window: self.window.unwrap_or(0) as u32,
            n_heads: heads.n_heads as u32,
            head_stride: heads.width() as u32,
            segments: self.positions_max.div_ceil(SEGMENT).max(1) as u32,
        }
    }
}

impl Gpu {
    /// Norms and rotates queries and keys, and stores keys and values of all tokens.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short. That block tables name blocks of the store is the caller's
    /// promise.
    pub fn rotate_heads(
        &self,
        pass: &RotateHeads<'_>,
        heads: HeadCounts,
        (tokens, store): (&TokenTables<'_>, &KvSpans<'_>),
    ) -> Result<(), GpuError> {
        assert!(2 * pass.pairs <= heads.head_dim.min(pass.angle_stride), "{} pairs", pass.pairs);
        let norm = |norm: Option<(Span<'_>, f32)>| {
            norm.map_or((0, 0.0), |(weight, eps)| (weight.of(heads.head_dim, F32), eps))
        };
        let ((query_norm, query_eps), (key_norm, key_eps)) =
            (norm(pass.query_norm), norm(pass.key_norm));
        let angles = tokens.tokens.saturating_sub(1) * pass.angle_stride + 2 * pass.pairs;
        let arguments = RotateArgs {
            heads: pass.heads.of(tokens.tokens * heads.width(), F32),
            angles: pass.angles.unaligned(angles, F32),
            query_norm,
            key_norm,
            tokens: tokens.argument(),
            store: store.argument(heads),
            query_eps,
            key_eps,
            n_heads: heads.n_heads as u32,
            angle_stride: pass.angle_stride as u32,
            pairs: pass.pairs as u32,
            interleaved: u32::from(pass.interleaved),
        };
        let grid = [heads.n_heads + 2 * heads.n_kv_heads, tokens.tokens, 1];
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch("rotate_heads", (grid, 32, 0), &arguments) }
    }

    /// `out = softmax(softcap(scale · q · Kᵀ) + causal mask) · V` per query head.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short. That block tables name blocks of the store, up to each token's
    /// position, and chosen numbers name tokens, is the caller's promise.
    pub fn attend(
        &self,
        pass: &Attend<'_>,
        heads: HeadCounts,
        (tokens, store): (&TokenTables<'_>, &KvSpans<'_>),
    ) -> Result<(), GpuError> {
        let n_tokens = pass.chosen.map_or(tokens.tokens, |(_, count)| count);
        let arguments = pass.arguments(heads, n_tokens, (tokens, store));
        let (segments, dim) = (arguments.segments as usize, heads.head_dim);
        let group = heads.n_heads / heads.n_kv_heads;
        let shared = if group == 1 { 1 } else { HEADS };
        let width = dim.next_power_of_two().max(64);
        let kernel = format!("attend_{width}_{shared}");
        let grid = [heads.n_kv_heads * group.div_ceil(shared), n_tokens, segments];
        let shared_bytes = WARPS * shared * (dim + 2) * F32;
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&kernel, (grid, 32 * WARPS, shared_bytes), &arguments)? };
        if segments > 1 {
            let grid = [heads.n_heads, n_tokens, 1];
            // SAFETY: as above.
            unsafe { self.launch("merge_segments", (grid, 32, 0), &arguments)? };
        }
        Ok(())
    }
}
