//! How large the buffers of steps on a GPU are: the one place that says so. The executor allocates
//! what stands here, and a plan counts it.

use crate::model::{LayerSpec, ModelSpec};
use crate::tensor::DType;
use std::ops::Range;
use tandem_cpu_kernels::blocks::GROUP;
use tandem_kernels::{
    Attend, DeviceMatrix, EightBits, ExpertRoutes, Gated, HeadCounts, RowDraws, RowMeasures,
    RowQuestion, half_bytes,
};

/// Rows of logits that exist at once.
pub const LOGITS_TILE_ROWS: usize = 128;
/// Bytes of unmerged segments of attention that exist at once, if one token needs no more.
const PARTIAL_BYTES: usize = 64 << 20;
/// Parts of a step's inputs start at multiples of this.
pub const INPUT_ALIGNMENT: usize = 16;
const F32: usize = size_of::<f32>();
const U32: usize = size_of::<u32>();

/// What the sizes of a stage's buffers follow from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BufferDims {
    /// Elements of a row of the residual stream.
    pub embedding: usize,
    /// Elements of a token's queries, keys and values.
    pub heads: usize,
    /// Elements of what attention gathers for a token.
    pub attended: usize,
    /// Elements of a row of a feed-forward network, or of an expert.
    pub hidden: usize,
    /// Rows of it per token: experts that it goes through, 1 in dense layers.
    pub hidden_rows: usize,
    /// Experts of a layer; 0 in dense ones.
    pub experts: usize,
    /// Elements of a row of logits; 0 where there are none.
    pub vocab: usize,
    /// f32 elements of a token's angles.
    pub angles: usize,
    /// Type, and elements of a row, of an embedding in host memory.
    pub looked_up: Option<(DType, usize)>,
    /// Whether normalised rows have a second 8-bit row for what the first misses.
    pub is_twice: bool,
    /// Heads of the attention that takes most room.
    pub attention: Option<(usize, usize)>,
}

/// How large a stage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferSize {
    /// Tokens of the widest step.
    pub tokens: usize,
    /// Most of them whose products meet activations in 8 bits.
    pub narrow_max: usize,
    /// KV blocks.
    pub blocks: usize,
    /// Tokens of one.
    pub block_tokens: usize,
}

/// Which form of rows a buffer keeps beside f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowForm {
    /// None.
    Plain,
    /// In 8 bits for narrow steps and f16 for wide ones.
    EightBits,
    /// The same, with a second 8-bit row for what the first misses.
    Twice,
}

/// Rows of activations, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowBytes {
    /// Elements of a row.
    pub cols: usize,
    /// Most rows of a narrow step.
    pub narrow_max: usize,
    /// In f32.
    pub values: usize,
    /// In 8 bits, and their scales.
    pub eight_bits: Option<[usize; 2]>,
    /// In f16.
    pub halves: Option<usize>,
}

/// What layers with experts need beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertBytes {
    /// `[tokens, experts]` f32
    pub logits: usize,
    /// Who goes where.
    pub routes: usize,
    /// f32: up projections, then down projections.
    pub products: usize,
}

/// All buffers of a stage, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferBytes {
    /// Rows of each.
    pub residual: RowBytes,
    /// See [`BufferBytes::residual`].
    pub normed: RowBytes,
    /// See [`BufferBytes::residual`].
    pub heads: RowBytes,
    /// See [`BufferBytes::residual`].
    pub attended: RowBytes,
    /// See [`BufferBytes::residual`].
    pub projected: RowBytes,
    /// See [`BufferBytes::residual`].
    pub hidden: RowBytes,
    /// See [`BufferBytes::residual`].
    pub up: RowBytes,
    /// See [`BufferBytes::residual`].
    pub selected: RowBytes,
    /// See [`BufferBytes::residual`].
    pub logits: RowBytes,
    /// Rows of logits that exist at once.
    pub logits_rows: usize,
    /// What is known of them, and of what was drawn from them.
    pub found: usize,
    /// The second place of a single token's residual stream.
    pub residual_sum: usize,
    /// Counters of gated products.
    pub gate_counters: usize,
    /// Unmerged segments of attention.
    pub partials: usize,
    /// What the host prepares for a step.
    pub inputs: usize,
    /// Rows of an embedding in host memory, taken apart.
    pub looked_up: usize,
    /// Where layers have experts.
    pub experts: Option<ExpertBytes>,
}

impl RowBytes {
    /// `of_token` rows of `cols` elements for each of some tokens.
    fn new(size: BufferSize, of_token: usize, cols: usize, form: RowForm) -> Self {
        let (rows, narrow_max) = (size.tokens * of_token, size.narrow_max * of_token);
        let passes = if form == RowForm::Twice { 2 } else { 1 };
        let narrow = rows.min(narrow_max);
        let is_rounded = form != RowForm::Plain;
        let eight_bits = (is_rounded && cols.is_multiple_of(GROUP)).then(|| {
            [
                EightBits::quant_bytes(narrow, cols, passes),
                EightBits::scale_bytes(narrow, cols, passes),
            ]
        });
        let halves = (is_rounded && rows > narrow_max).then(|| half_bytes(rows, cols));
        Self { cols, narrow_max, values: rows * cols * F32, eight_bits, halves }
    }

    fn bytes(&self) -> usize {
        let eight_bits = self.eight_bits.map_or(0, |parts| parts.iter().sum());
        self.values + eight_bits + self.halves.unwrap_or(0)
    }
}

impl BufferDims {
    /// Of some layers of a model. Widths are the largest of all its layers.
    pub fn of(spec: &ModelSpec, layers: &Range<usize>) -> Self {
        let (embeds, has_logits) = (layers.start == 0, layers.end == spec.layers.len());
        let widest =
            |width: &dyn Fn(&LayerSpec) -> usize| spec.layers.iter().map(width).max().unwrap_or(0);
        let mut ropes = Vec::new();
        for layer in &spec.layers {
            if !ropes.contains(&&layer.attention.rope) {
                ropes.push(&layer.attention.rope);
            }
        }
        let is_looked_up = embeds && !(has_logits && spec.is_output_tied());
        let attention = spec.layers.iter().map(|layer| &layer.attention);
        Self {
            embedding: spec.embedding_dim,
            heads: widest(&|layer| super::cpu::heads_width(&layer.attention)),
            attended: widest(&|layer| layer.attention.n_heads * layer.attention.head_dim),
            hidden: widest(&|layer| layer.ffn.hidden_dim()),
            hidden_rows: widest(&|layer| layer.ffn.experts().map_or(1, |experts| experts.n_used)),
            experts: widest(&|layer| layer.ffn.experts().map_or(0, |experts| experts.n_experts)),
            vocab: if has_logits { spec.vocab_size } else { 0 },
            angles: ropes.iter().map(|rope| rope.dims / 2 * 2).sum(),
            looked_up: is_looked_up.then_some((spec.embedding.dtype, spec.embedding.cols)),
            is_twice: spec.layers.iter().any(|layer| layer.attention.wants_sixteen_bits()),
            attention: Self::largest(attention.map(|heads| (heads.n_heads, heads.head_dim))),
        }
    }

    /// Of attentions with so many heads of so many elements the one that takes most room.
    pub fn largest(attentions: impl Iterator<Item = (usize, usize)>) -> Option<(usize, usize)> {
        attentions.max_by_key(|heads| segment_bytes(*heads))
    }

    /// How large each buffer is.
    pub fn bytes(&self, size: BufferSize) -> BufferBytes {
        let BufferSize { tokens, blocks, block_tokens, .. } = size;
        let rows = |cols, form| RowBytes::new(size, 1, cols, form);
        let logits_rows = if self.vocab > 0 { LOGITS_TILE_ROWS.min(tokens) } else { 0 };
        let wanted =
            |cols, form| RowBytes::new(BufferSize { tokens: logits_rows, ..size }, 1, cols, form);
        let normed = if self.is_twice { RowForm::Twice } else { RowForm::EightBits };
        let width = self.hidden.max(self.embedding);
        let experts = (self.experts > 0).then(|| ExpertBytes {
            logits: tokens * self.experts * F32,
            routes: ExpertRoutes::bytes_of((self.experts, self.hidden_rows), tokens),
            products: tokens * self.hidden_rows * width * F32,
        });
        let looked_up =
            self.looked_up.map(|(dtype, cols)| DeviceMatrix::bytes_of(dtype, tokens, cols));
        BufferBytes {
            residual: rows(self.embedding, RowForm::Plain),
            normed: rows(self.embedding, normed),
            heads: rows(self.heads, RowForm::Plain),
            attended: rows(self.attended, RowForm::EightBits),
            projected: rows(self.embedding, RowForm::Plain),
            hidden: RowBytes::new(size, self.hidden_rows, self.hidden, RowForm::EightBits),
            up: rows(if self.experts > 0 { 0 } else { self.hidden }, RowForm::Plain),
            selected: wanted(self.embedding, RowForm::EightBits),
            logits: wanted(self.vocab, RowForm::Plain),
            logits_rows,
            found: RowMeasures::bytes_of(logits_rows)
                + RowDraws::bytes_of((logits_rows, self.vocab)),
            residual_sum: self.embedding * F32,
            gate_counters: Gated::counter_bytes(self.hidden),
            partials: self.partial_bytes(blocks * block_tokens),
            inputs: self.input_bytes(tokens, blocks),
            looked_up: looked_up.unwrap_or(0),
            experts,
        }
    }

    /// Bytes of all buffers before there are KV blocks, and what rounding adds with these.
    pub(super) fn fixed_bytes(&self, size: BufferSize) -> u64 {
        (self.bytes(BufferSize { blocks: 0, ..size }).total() + INPUT_ALIGNMENT) as u64
    }

    /// Room for unmerged segments of attention: at least those of one token that sees a full store
    /// of so many positions.
    fn partial_bytes(&self, positions: usize) -> usize {
        let of_one =
            self.attention.map_or(0, |heads| Attend::partial_bytes(counts(heads), 1, positions));
        of_one.max(PARTIAL_BYTES)
    }

    /// Bytes of a row of the embedding as it lies in host memory, if it travels.
    pub fn row_bytes(&self) -> usize {
        let bytes = self.looked_up.map(|(dtype, cols)| dtype.row_bytes(cols).unwrap_or(0));
        bytes.unwrap_or(0)
    }

    /// Bytes of what the host prepares for a step (`executor/gpu/inputs.rs` has the parts).
    pub fn input_bytes(&self, tokens: usize, blocks: usize) -> usize {
        let numbers = [tokens * U32; 7].into_iter().chain([2 * tokens * U32, blocks * U32]);
        let rows = [tokens * self.angles * F32, tokens * self.row_bytes()];
        let parts = numbers.chain(rows).chain([tokens * RowQuestion::BYTES]);
        parts.map(|bytes| bytes.next_multiple_of(INPUT_ALIGNMENT)).sum()
    }

    /// What grows with the KV store, so that it can be planned for before the store's size is
    /// known.
    pub(super) fn growth(&self, block_tokens: usize) -> Growth {
        let segment = self.attention.map_or(0, segment_bytes);
        let of_block = (segment * block_tokens).div_ceil(Attend::SEGMENT);
        Growth {
            block: U32 as u64,
            saved_by_long: (PARTIAL_BYTES as i64) - segment as i64,
            block_of_long: (U32 + of_block) as u64,
        }
    }
}

fn counts((n_heads, head_dim): (usize, usize)) -> HeadCounts {
    HeadCounts { n_heads, n_kv_heads: n_heads, head_dim }
}

/// Bytes of one token's partial sums of a segment.
fn segment_bytes(heads: (usize, usize)) -> usize {
    Attend::partial_bytes(counts(heads), 1, 2 * Attend::SEGMENT) / 2
}

impl BufferBytes {
    /// All of them.
    pub fn total(&self) -> usize {
        let rows = [
            &self.residual,
            &self.normed,
            &self.heads,
            &self.attended,
            &self.projected,
            &self.hidden,
            &self.up,
            &self.selected,
            &self.logits,
        ];
        let experts = self.experts.map_or(0, |of| of.logits + of.routes + of.products);
        rows.iter().map(|rows| rows.bytes()).sum::<usize>()
            + self.found
            + self.residual_sum
            + self.gate_counters
            + self.partials
            + self.inputs
            + self.looked_up
            + experts
    }
}

/// What of a stage's buffers grows with its KV blocks: a number for each of them, and partial sums
/// of attention where a token may see so many blocks that these exceed what there always is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Growth {
    /// Bytes of a block.
    block: u64,
    /// What a store whose partial sums are counted by block does not need of what there always is.
    saved_by_long: i64,
    /// Bytes of a block of such a store.
    block_of_long: u64,
}

impl Growth {
    /// KV blocks of `block` bytes that fit beside `fixed` bytes, what grows with them included;
    /// less than 0 where not even these fit.
    pub fn blocks(&self, usable: u64, fixed: u64, block: u64) -> i64 {
        let left = i128::from(usable) - i128::from(fixed);
        let [short, long] =
            [(0, self.block), (self.saved_by_long, self.block_of_long)].map(|(saved, more)| {
                (left + i128::from(saved)).div_euclid(i128::from((block + more).max(1)))
            });
        short.min(long) as i64
    }

    /// Bytes of so many blocks, at most.
    pub fn bytes(&self, blocks: u64, block: u64) -> u64 {
        let long = blocks.saturating_mul(block + self.block_of_long);
        let long = long.saturating_add_signed(-self.saved_by_long);
        blocks.saturating_mul(block + self.block).max(long)
    }
}
