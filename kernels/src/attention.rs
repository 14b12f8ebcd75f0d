//! The paged store of keys and values, and attention of single tokens over it.
//!
//! ```text
//! keys    [block][kv_head] { [head_dim / 8][block_tokens][8], [groups][block_tokens] f16 }
//! values  [block][kv_head] { [block_tokens][head_dim], [groups][block_tokens] f16 }
//! ```
//! Elements are of one [`KvDType`], and only q8_0 has the scales, of groups of 32 elements, behind
//! them. Its bytes are the same as on the CPU, whose keys lie in another order; keys are rotated
//! there, and so [`RotateHeads`] rotates the queries that meet them.
//! Attention runs with an online softmax (arXiv 2205.14135), split over segments of 256 positions
//! that are merged in ascending order: a token's bits depend on nothing else in its batch.

use crate::gpu::{Gpu, GpuError, Span};
use crate::products::{CHUNK, EightBits, half_bytes};
use crate::rotate::{RotateArgs, RotateHeads};
use crate::rows::{EightBitsArg, eight_bits};
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::attention::{KV_GROUP, KvDType};
use tandem_cpu_kernels::blocks::GROUP;

const F32: usize = size_of::<f32>();
const WARPS: usize = 8;
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
    /// How elements are kept.
    pub dtype: KvDType,
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

/// One attention.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// As [`RotateHeads::heads`], rotated.
    pub heads: Span<'a>,
    /// u32 numbers of the tokens that attend, and how many there are; `None` for all.
    pub chosen: Option<(Span<'a>, usize)>,
    /// `[tokens, n_heads · head_dim]` f32
    pub out: Span<'a>,
    /// The result in 8 bits: where [`HeadCounts::are_whole_chunks`].
    pub eight_bits: Option<EightBits<'a>>,
    /// The result as [`Columns::halves`](crate::Columns::halves), under the same condition.
    pub halves: Option<Span<'a>>,
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
pub(crate) struct StoreArg {
    keys: u64,
    values: u64,
    block_tokens: u32,
    n_kv_heads: u32,
    head_dim: u32,
    head_bytes: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct TokensArg {
    positions: u64,
    tables: u64,
    blocks: u64,
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
    rounded: EightBitsArg,
    halves: u64,
    scale: f32,
    softcap: f32,
    window: u32,
    n_heads: u32,
    head_stride: u32,
    segments: u32,
    n_tokens: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RotatedAttendArgs {
    attend: AttendArgs,
    rotate: RotateArgs,
}

// SAFETY: plain numbers in the order of `AttendArgs` in attention.cuh.
unsafe impl DeviceRepr for AttendArgs {}
// SAFETY: plain numbers in the order of `RotatedAttendArgs` in attention.cu.
unsafe impl DeviceRepr for RotatedAttendArgs {}

impl HeadCounts {
    /// Whether our kernels can attend with such heads.
    pub fn is_supported(&self) -> bool {
        self.head_dim.is_multiple_of(8) && (8..=HEAD_DIM_MAX).contains(&self.head_dim)
    }

    /// Whether the kernels that attend can round what comes out for the product that follows.
    pub fn are_whole_chunks(&self) -> bool {
        self.head_dim.is_multiple_of(GROUP)
            && (self.n_heads * self.head_dim).is_multiple_of(CHUNK * GROUP)
    }

    /// Elements of a token's queries, keys and values.
    pub(crate) fn width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }
}

impl KvSpans<'_> {
    /// Bytes of the keys, or values, of one block.
    pub fn block_bytes(heads: HeadCounts, block_tokens: usize, dtype: KvDType) -> usize {
        heads.n_kv_heads * dtype.head_bytes(heads.head_dim) * block_tokens
    }

    pub(crate) fn argument(&self, heads: HeadCounts) -> StoreArg {
        assert!(heads.is_supported(), "{heads:?}");
        assert!(self.block_tokens.is_multiple_of(16), "{} tokens in a block", self.block_tokens);
        let bytes = self.blocks * Self::block_bytes(heads, self.block_tokens, self.dtype);
        StoreArg {
            keys: self.keys.of(bytes, 1),
            values: self.values.of(bytes, 1),
            block_tokens: self.block_tokens as u32,
            n_kv_heads: heads.n_kv_heads as u32,
            head_dim: heads.head_dim as u32,
            head_bytes: (self.dtype.head_bytes(heads.head_dim) * self.block_tokens) as u32,
        }
    }
}

impl TokenTables<'_> {
    pub(crate) fn argument(&self) -> TokensArg {
        TokensArg {
            positions: self.positions.unaligned(self.tokens, size_of::<u32>()),
            tables: self.tables.unaligned(self.tokens, size_of::<u32>()),
            blocks: self.blocks.of(1, size_of::<u32>()),
        }
    }
}

/// Positions of a segment.
const SEGMENT: usize = Attend::SEGMENT;

impl Attend<'_> {
    /// Positions of a segment.
    pub const SEGMENT: usize = 256;

    /// Bytes of the segments of a step, where sequences have up to `positions_max` positions.
    pub fn partial_bytes(heads: HeadCounts, tokens: usize, positions_max: usize) -> usize {
        match positions_max.div_ceil(SEGMENT) {
            0 | 1 => 0,
            segments => tokens * heads.n_heads * segments * (heads.head_dim + 2) * F32,
        }
    }

    /// As kernels take it, for `n_tokens` tokens with partial sums.
    pub(crate) fn arguments(
        &self,
        heads: HeadCounts,
        n_tokens: usize,
        (tokens, store): (&TokenTables<'_>, &KvSpans<'_>),
    ) -> AttendArgs {
        let partials = Attend::partial_bytes(heads, n_tokens, self.positions_max);
        let (all, cols) = (tokens.tokens, heads.n_heads * heads.head_dim);
        let is_rounded = self.eight_bits.is_some() || self.halves.is_some();
        assert!(!is_rounded || heads.are_whole_chunks(), "rounded heads: {heads:?}");
        AttendArgs {
            heads: self.heads.of(all * heads.width(), F32),
            out: self.out.of(all * cols, F32),
            partials: self.partials.of(partials, 1),
            chosen: self.chosen.map_or(0, |(list, n)| list.unaligned(n, size_of::<u32>())),
            tokens: tokens.argument(),
            store: store.argument(heads),
            rounded: eight_bits(self.eight_bits, all, cols),
            halves: self.halves.map_or(0, |halves| halves.of(half_bytes(all, cols), 1)),
            scale: self.scale,
            softcap: self.softcap.unwrap_or(0.0),
            window: self.window.unwrap_or(0) as u32,
            n_heads: heads.n_heads as u32,
            head_stride: heads.width() as u32,
            segments: self.positions_max.div_ceil(SEGMENT).max(1) as u32,
            n_tokens: all as u32,
        }
    }
}

impl Gpu {
    /// `out = softmax(softcap(scale · q · Kᵀ) + causal mask) · V` per query head. With a rotation,
    /// queries are rotated, and keys and values stored, on the way: then no two tokens of the step
    /// may belong to one sequence.
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
        rotation: Option<&RotateHeads<'_>>,
    ) -> Result<(), GpuError> {
        let n_tokens = pass.chosen.map_or(tokens.tokens, |(_, count)| count);
        let attend = pass.arguments(heads, n_tokens, (tokens, store));
        let (segments, dim) = (attend.segments as usize, heads.head_dim);
        let group = heads.n_heads / heads.n_kv_heads;
        // Heads of a group share keys and values that are read; where there are too few of them for
        // all multiprocessors, each has a block. A head's bits are the same.
        let blocks = heads.n_heads * n_tokens * segments;
        let shared = if group == 1 || blocks <= self.multiprocessors() { 1 } else { HEADS };
        let (width, dtype) = (dim.next_power_of_two().max(64), store.dtype);
        let kernel = format!("attend_{dtype}_{width}_{shared}");
        let grid = [heads.n_kv_heads * group.div_ceil(shared), n_tokens, segments];
        // Queries, and a key and a value as f32 and as they are kept; weights; what warps have
        // summed up; scales of values.
        let scales = if dtype == KvDType::Q8_0 { SEGMENT * (width / KV_GROUP) } else { 0 };
        let floats = (shared + 3) * dim + SEGMENT * shared + WARPS * shared * (dim + 2) + scales;
        let shape = (grid, 32 * WARPS, floats * F32);
        match rotation {
            Some(rotation) => {
                let rotate = rotation.arguments(heads, (tokens, store));
                let arguments = RotatedAttendArgs { attend, rotate };
                // SAFETY: all spans were checked against the shapes.
                unsafe { self.launch(&format!("rotate_{kernel}"), shape, &arguments)? };
            }
            // SAFETY: as above.
            None => unsafe { self.launch(&kernel, shape, &attend)? },
        }
        if segments > 1 {
            let grid = [heads.n_heads, n_tokens, 1];
            // SAFETY: as above.
            unsafe { self.launch("merge_segments", (grid, 32, 0), &attend)? };
        }
        Ok(())
    }
}
