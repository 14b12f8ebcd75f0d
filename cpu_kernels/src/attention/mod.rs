//! Owns attention over a paged store of keys and values, f16 or 8 bits: writing tokens into it and
//! reading it with queries. It must not know sequences or schedulers: a block table says where
//! positions lie. Called by the executor's workers, each with its own head, queries and scratch.
//!
//! For a query at position `p` and the positions `j` it sees (`p − window < j ≤ p`):
//! ```text
//! s_j = softcap(scale · q·k_j)        w_j = e^(s_j − max s)        out = Σ w_j·v_j / Σ w_j
//! ```
//! computed online (Milakov and Gimelshein, arXiv 1805.02867): chunks of 64 positions move a
//! running maximum, segments of [`SEGMENT_TOKENS`] positions are computed on their own and then
//! merged in ascending order. Chunks and segments start at absolute multiples of their size, and
//! what a query does not see contributes exactly nothing. So a query's result has the same bits
//! whatever the other queries of the call, the split of work among threads, and the ids in the
//! block table.

#[cfg(target_arch = "x86_64")]
mod chunk;
mod merge;
mod rotate;
pub(crate) mod scalar;
mod scratch;
#[cfg(target_arch = "x86_64")]
pub(crate) mod simd;
mod store;
mod write;

use crate::dispatch::Kernels;
use crate::matmul::OutputColumns;
pub use scratch::AttentionScratch;
use scratch::TILE_ROWS;
pub(crate) use scratch::TileState;
use std::ops::Range;
pub use store::{
    KV_GROUP, KvDType, KvLayout, KvLayoutError, KvStore, TOKEN_GROUP, TokenRows, UnknownKvDType,
};

/// Positions of one segment: the unit in which a long context may be shared among threads. Small
/// enough to deal out contexts of a thousand tokens evenly, large enough that merging costs 1–2 %.
pub const SEGMENT_TOKENS: usize = 256;

/// What a layer's attention computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Query heads: a multiple of the store's heads. Query head `h` reads kv head `h / group`.
    pub n_heads: usize,
    /// Factor of `q·k`.
    pub scale: f32,
    /// Positions that a query sees, its own included; `None` for all before it.
    pub window: Option<usize>,
    /// Bound of the scores, `cap · tanh(s / cap)`.
    pub softcap: Option<f32>,
}

/// Queries of one sequence at consecutive positions, and the layer's store that they read.
#[derive(Clone, Copy, Debug)]
pub struct AttentionCall<'a> {
    /// What to compute.
    pub params: AttentionParams,
    /// Keys and values, those of the queries' own positions included.
    pub store: KvStore<'a>,
    /// Block of positions `i · block_tokens ..`; entries that no query sees may be anything.
    pub blocks: &'a [u32],
    /// Position of query 0.
    pub first_position: usize,
    /// `[n_tokens, n_heads · head_dim]`.
    pub queries: TokenRows<'a>,
}

/// The share of a call that one worker computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionPart {
    /// The store's head; all query heads of its group belong to the part.
    pub kv_head: usize,
    /// Query tokens of the call.
    pub queries: Range<usize>,
}

/// Keys and values of consecutive tokens of one sequence, to be stored.
#[derive(Clone, Copy, Debug)]
pub struct KvWrite<'a> {
    /// Where to.
    pub store: KvStore<'a>,
    /// Block of positions `i · block_tokens ..`.
    pub blocks: &'a [u32],
    /// Position of token 0.
    pub first_position: usize,
    /// `[n_tokens, n_kv_heads · head_dim]`, rotated.
    pub keys: TokenRows<'a>,
    /// `[n_tokens, n_kv_heads · head_dim]`.
    pub values: TokenRows<'a>,
}

/// Rows of a part that are computed together. Row `r` is token `r / group`, head `r mod group`.
pub(crate) struct Tile<'a> {
    pub call: &'a AttentionCall<'a>,
    pub kv_head: usize,
    /// At most [`TILE_ROWS`] rows of the call.
    pub rows: Range<usize>,
    /// Positions inside one segment that some row sees.
    pub positions: Range<usize>,
    /// Where the positions end that the same worker reads next.
    pub read_end: usize,
}

/// The attention kernels of one instruction set.
pub(crate) struct AttentionTable {
    /// Leaves maximum, weight and sums of a tile over its positions in the state, from cleared.
    pub segment: unsafe fn(&Tile<'_>, &TileState),
    /// Adds the state's segment of so many rows of `head_dim` elements to those merged before.
    pub merge: unsafe fn(&TileState, usize, usize),
    /// Stores all tokens of a write for one head.
    pub write_kv: unsafe fn(&KvWrite<'_>, usize),
}

impl Tile<'_> {
    /// `[head_dim]` of the tile's row `index`, as the store's keys are multiplied with.
    ///
    /// # Safety
    /// The row is one of the tile, whose queries have been prepared in `state`.
    #[inline(always)]
    pub(crate) unsafe fn query(&self, index: usize, state: &TileState) -> *const f32 {
        if self.call.store.layout().is_eight_bits() {
            // SAFETY: the row is inside the scratch.
            unsafe { state.rotated.add(index * state.stride) }
        } else {
            self.call.query(self.kv_head, self.rows.start + index)
        }
    }
}

impl AttentionCall<'_> {
    /// Query heads per key-value head.
    pub fn group(&self) -> usize {
        self.params.n_heads / self.store.layout().n_kv_heads()
    }

    /// The positions that query token `query` sees.
    pub fn visible(&self, query: usize) -> Range<usize> {
        let end = self.first_position + query + 1;
        self.params.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// The segments that some of the queries see. Each can be computed on its own by
    /// [`Kernels::attend_segments`].
    pub fn segments(&self, queries: &Range<usize>) -> Range<usize> {
        if queries.is_empty() {
            return 0..0;
        }
        let (first, last) = (self.visible(queries.start), self.visible(queries.end - 1));
        first.start / SEGMENT_TOKENS..last.end.div_ceil(SEGMENT_TOKENS)
    }

    /// f32 elements that [`Kernels::attend_segments`] leaves per segment for a part with this many
    /// queries.
    pub fn partial_len(&self, n_queries: usize) -> usize {
        n_queries * self.group() * (self.store.layout().head_dim() + 2)
    }

    /// Block of `position`.
    #[inline(always)]
    pub(crate) fn block_of(&self, position: usize) -> u32 {
        self.blocks[position / self.store.layout().block_tokens()]
    }

    /// `[head_dim]` of the query row `r` of a head.
    #[inline(always)]
    pub(crate) fn query(&self, kv_head: usize, row: usize) -> *const f32 {
        let (group, head_dim) = (self.group(), self.store.layout().head_dim());
        let head = kv_head * group + row % group;
        self.queries.row(row / group)[head * head_dim..][..head_dim].as_ptr()
    }

    /// Makes the queries of a tile ready for the store's keys.
    ///
    /// # Safety
    /// The call was checked, the state is that of a borrowed scratch.
    unsafe fn prepare_queries(&self, kv_head: usize, rows: &Range<usize>, state: &TileState) {
        if self.store.layout().is_eight_bits() {
            // SAFETY: passed on; tiles have at most `TILE_ROWS` rows.
            unsafe { rotate::rotate_queries(self, kv_head, rows.clone(), state) }
        }
    }

    fn check(&self, part: &AttentionPart, scratch: &AttentionScratch) {
        let layout = self.store.layout();
        let (kv_heads, head_dim) = (layout.n_kv_heads(), layout.head_dim());
        assert!(self.params.n_heads.is_multiple_of(kv_heads), "heads in groups of {kv_heads}");
        assert!(part.kv_head < kv_heads, "kv head {} of {kv_heads}", part.kv_head);
        assert_eq!(self.queries.width(), self.params.n_heads * head_dim, "width of the queries");
        let n_tokens = self.queries.n_tokens();
        assert!(part.queries.end <= n_tokens, "queries {:?} of {n_tokens}", part.queries);
        let (room, end) = (self.blocks.len() * layout.block_tokens(), self.first_position);
        assert!(end + part.queries.end <= room, "position {end} beyond the block table's {room}");
        let max = scratch.head_dim_max();
        assert!(head_dim <= max, "heads of {head_dim} in a scratch for {max}");
        assert!(self.params.window != Some(0), "a window of 0 positions");
        assert!(self.params.softcap.is_none_or(|cap| cap > 0.0), "a soft cap that is not positive");
    }

    /// Tiles of the part's rows, in order.
    fn tiles(&self, part: &AttentionPart) -> impl Iterator<Item = Range<usize>> + use<> {
        let group = self.group();
        let rows = part.queries.start * group..part.queries.end * group;
        let end = rows.end;
        rows.step_by(TILE_ROWS).map(move |start| start..end.min(start + TILE_ROWS))
    }

    /// The queries of a tile's rows.
    fn tile_queries(&self, rows: &Range<usize>) -> Range<usize> {
        rows.start / self.group()..(rows.end - 1) / self.group() + 1
    }
}

impl Kernels {
    /// Stores tokens for the given heads. f16: rounded to the nearest (ties to even); what exceeds
    /// the range of f16 becomes its largest number, NaN stays NaN. 8 bits: a group's scale is the
    /// f16 nearest to its largest magnitude / 127, its elements the nearest multiples of that; a
    /// NaN makes its group NaN; whole groups of keys are rotated first (`rotate.rs`).
    ///
    /// # Panics
    /// When shapes disagree or a position has no block.
    pub fn write_kv(&self, write: &KvWrite<'_>, kv_heads: Range<usize>) {
        let layout = write.store.layout();
        let (width, n_tokens) = (layout.n_kv_heads() * layout.head_dim(), write.keys.n_tokens());
        assert_eq!((write.keys.width(), write.values.width()), (width, width), "width of kv rows");
        assert_eq!(n_tokens, write.values.n_tokens(), "tokens of keys and values");
        let (room, end) = (write.blocks.len() * layout.block_tokens(), write.first_position);
        assert!(end + n_tokens <= room, "position {end} beyond the block table's {room}");
        assert!(kv_heads.end <= layout.n_kv_heads(), "kv heads {kv_heads:?}");
        for kv_head in kv_heads {
            // SAFETY: the table came from `for_isa`, and shapes were checked above.
            unsafe { (self.attention.write_kv)(write, kv_head) }
        }
    }

    /// Attends with the queries of `part` over all that they see; writes token `t`, element
    /// `head · head_dim + d` to column `t`, row `head · head_dim + d` of `output`.
    ///
    /// # Panics
    /// When shapes disagree, a position has no block or the scratch is too small.
    pub fn attend(
        &self,
        call: &AttentionCall<'_>,
        part: &AttentionPart,
        output: OutputColumns<'_>,
        scratch: &mut AttentionScratch,
    ) {
        call.check(part, scratch);
        merge::check_output(call, &output);
        let state = scratch.tile_state();
        for rows in call.tiles(part) {
            // SAFETY: the scratch is borrowed for the whole loop; shapes were checked.
            unsafe {
                state.clear_merged(rows.len());
                call.prepare_queries(part.kv_head, &rows, &state);
                let segments = call.segments(&call.tile_queries(&rows));
                for segment in segments.clone() {
                    let rest = (rows.clone(), segment..segments.end);
                    self.compute_segment(call, part.kv_head, rest, &state);
                    (self.attention.merge)(&state, rows.len(), call.store.layout().head_dim());
                }
                merge::write_tile(call, part.kv_head, rows, &state, output);
            }
        }
    }

    /// Attends over some of the part's segments only and leaves the unmerged results in
    /// `partials`: per segment [`AttentionCall::partial_len`] elements. For contexts whose one
    /// head is work for several threads.
    ///
    /// # Panics
    /// As [`Kernels::attend`], and when `partials` has another length.
    pub fn attend_segments(
        &self,
        call: &AttentionCall<'_>,
        part: &AttentionPart,
        segments: Range<usize>,
        partials: &mut [f32],
        scratch: &mut AttentionScratch,
    ) {
        call.check(part, scratch);
        let len = call.partial_len(part.queries.len());
        assert_eq!(partials.len(), segments.len() * len, "length of {segments:?} partials");
        let (state, head_dim) = (scratch.tile_state(), call.store.layout().head_dim());
        let first_row = part.queries.start * call.group();
        for rows in call.tiles(part) {
            let offset = (rows.start - first_row) * (head_dim + 2);
            // SAFETY: as below.
            unsafe { call.prepare_queries(part.kv_head, &rows, &state) }
            for (segment, partial) in segments.clone().zip(partials.chunks_exact_mut(len.max(1))) {
                let own = &mut partial[offset..][..rows.len() * (head_dim + 2)];
                // SAFETY: the scratch is borrowed for the whole loop; shapes were checked.
                unsafe {
                    let rest = (rows.clone(), segment..segments.end);
                    self.compute_segment(call, part.kv_head, rest, &state);
                    merge::save_partial(&state, head_dim, own);
                }
            }
        }
    }

    /// Merges the partials of all segments of [`AttentionCall::segments`], one after the other in
    /// `partials`, and writes the output: the same bits as [`Kernels::attend`].
    ///
    /// # Panics
    /// As [`Kernels::attend`], and when `partials` has another length.
    pub fn merge_segments(
        &self,
        call: &AttentionCall<'_>,
        part: &AttentionPart,
        partials: &[f32],
        output: OutputColumns<'_>,
        scratch: &mut AttentionScratch,
    ) {
        call.check(part, scratch);
        merge::check_output(call, &output);
        let (segments, len) = (call.segments(&part.queries), call.partial_len(part.queries.len()));
        assert_eq!(partials.len(), segments.len() * len, "length of {segments:?} partials");
        let (state, head_dim) = (scratch.tile_state(), call.store.layout().head_dim());
        let first_row = part.queries.start * call.group();
        for rows in call.tiles(part) {
            let offset = (rows.start - first_row) * (head_dim + 2);
            // SAFETY: the scratch is borrowed for the whole loop; shapes were checked.
            unsafe {
                state.clear_merged(rows.len());
                for partial in partials.chunks_exact(len.max(1)) {
                    let own = &partial[offset..][..rows.len() * (head_dim + 2)];
                    merge::load_partial(&state, head_dim, own);
                    (self.attention.merge)(&state, rows.len(), head_dim);
                }
                merge::write_tile(call, part.kv_head, rows, &state, output);
            }
        }
    }

    /// Computes the first of `segments` for a tile of rows from cleared state. The others are those
    /// that this worker computes next.
    ///
    /// # Safety
    /// `state` is that of a borrowed scratch and the call was checked.
    unsafe fn compute_segment(
        &self,
        call: &AttentionCall<'_>,
        kv_head: usize,
        (rows, segments): (Range<usize>, Range<usize>),
        state: &TileState,
    ) {
        let queries = call.tile_queries(&rows);
        let (first, last) = (call.visible(queries.start), call.visible(queries.end - 1));
        let start = first.start.max(segments.start * SEGMENT_TOKENS);
        let end = last.end.min((segments.start + 1) * SEGMENT_TOKENS);
        let read_end = last.end.min(segments.end * SEGMENT_TOKENS);
        // SAFETY: at most `TILE_ROWS` rows; the table came from `for_isa`.
        unsafe {
            state.clear_segment(rows.len());
            if start < end {
                let tile = Tile { call, kv_head, rows, positions: start..end, read_end };
                (self.attention.segment)(&tile, state);
            }
        }
    }
}
