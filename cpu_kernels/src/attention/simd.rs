//! Attention for any vector width. A tile of query rows goes through the chunks of a segment:
//! ```text
//! scores[row][j] = q[row]·k[j]             lanes are positions; rows share each load of keys
//! mask, scale, cap; new maximum, correction, weights e^(score − max)      lanes are positions
//! sums[row][d] = sums[row][d]·correction + Σ_j weight[row][j]·v[j][d]      lanes are elements
//! ```
//! Every sum runs over `d` or `j` in ascending order with one fused multiply-add per term, so the
//! number of rows that are computed together changes no bit.

#![allow(clippy::needless_range_loop, reason = "register tiles are read by their indices")]

use super::chunk::{Chunk, prefetch};
use super::scratch::{CHUNK, TILE_ROWS};
use super::{AttentionTable, KvWrite, TOKEN_GROUP, Tile, TileState};
use crate::lanes::{Lanes, exp_lanes, softcap_lanes};

/// See [`AttentionTable::segment`]. A micro-kernel has `M` rows of `T` vectors: `M·T` accumulators,
/// `T` operands and a broadcast must fit the registers, and the accumulators should be more than
/// the latency of a multiply-add times its throughput (4 · 2).
///
/// # Safety
/// The call was checked, the state is that of a borrowed scratch, cleared, and the CPU has the
/// instructions of `L`.
#[inline(always)]
unsafe fn segment<L: Lanes, const M: usize, const T: usize>(tile: &Tile<'_>, state: &TileState) {
    let rows = tile.rows.len();
    let mut queries = [std::ptr::null(); TILE_ROWS];
    for (index, row) in tile.rows.clone().enumerate() {
        queries[index] = tile.call.query(tile.kv_head, row);
    }
    let start = tile.positions.start / CHUNK * CHUNK;
    let mut chunk = Chunk::new(tile, start, tile.positions.clone());
    loop {
        let next = chunk.start + CHUNK;
        let ahead = (next < tile.read_end).then(|| Chunk::new(tile, next, next..tile.read_end));
        // SAFETY: queries and scratch have the tile's rows.
        unsafe { attend_chunk::<L, M, T>(tile, state, &queries[..rows], (&chunk, ahead.as_ref())) }
        match ahead {
            Some(ahead) if next < tile.positions.end => chunk = ahead,
            _ => break,
        }
    }
}

/// One chunk for all rows. The first rows ask for the lines of the chunk `ahead` as they go.
///
/// # Safety
/// As [`segment`]; there is a query per row of the tile.
#[inline(always)]
unsafe fn attend_chunk<L: Lanes, const M: usize, const T: usize>(
    tile: &Tile<'_>,
    state: &TileState,
    queries: &[*const f32],
    (chunk, ahead): (&Chunk, Option<&Chunk>),
) {
    let rows = queries.len();
    let lines = |row: usize| (chunk, if row == 0 { ahead } else { None });
    let mut row = 0;
    // SAFETY: rows below `rows` have queries and scratch.
    unsafe {
        while row < rows {
            let scores = state.scores.add(row * CHUNK);
            let at = &queries[row..];
            match M.min(rows - row) {
                1 => score_rows::<L, 1, T>(tile, at, lines(row), scores),
                2 => score_rows::<L, 2, T>(tile, at, lines(row), scores),
                3 => score_rows::<L, 3, T>(tile, at, lines(row), scores),
                4 => score_rows::<L, 4, T>(tile, at, lines(row), scores),
                5 => score_rows::<L, 5, T>(tile, at, lines(row), scores),
                _ => score_rows::<L, 6, T>(tile, at, lines(row), scores),
            }
            row += M;
        }
        weigh::<L>(tile, state, chunk.start);
        row = 0;
        while row < rows {
            match M.min(rows - row) {
                1 => add_values::<L, 1, T>(tile, state, lines(row), row),
                2 => add_values::<L, 2, T>(tile, state, lines(row), row),
                3 => add_values::<L, 3, T>(tile, state, lines(row), row),
                4 => add_values::<L, 4, T>(tile, state, lines(row), row),
                5 => add_values::<L, 5, T>(tile, state, lines(row), row),
                _ => add_values::<L, 6, T>(tile, state, lines(row), row),
            }
            row += M;
        }
    }
}

/// `scores[r][j] = Σ_d q[r][d]·k[j][d]` for `R` rows and the 64 positions of a chunk.
///
/// # Safety
/// The first `R` queries are valid for `head_dim` elements, `scores` for `R` rows of `CHUNK`.
#[inline(always)]
unsafe fn score_rows<L: Lanes, const R: usize, const T: usize>(
    tile: &Tile<'_>,
    queries: &[*const f32],
    (chunk, ahead): (&Chunk, Option<&Chunk>),
    scores: *mut f32,
) {
    let layout = tile.call.store.layout();
    let (head_dim, stride) = (layout.head_dim(), layout.block_tokens());
    let mut first = 0;
    while first < CHUNK {
        let mut keys = [std::ptr::null::<u16>(); T];
        // SAFETY: a vector of positions lies inside one group; offsets inside the block's head.
        unsafe {
            for (t, key) in keys.iter_mut().enumerate() {
                let position = first + t * L::WIDTH;
                *key = chunk.keys[position / TOKEN_GROUP].add(position % TOKEN_GROUP);
            }
            let mut sums = [[L::splat(0.0); T]; R];
            for d in 0..head_dim {
                if let Some(ahead) = ahead {
                    for t in 0..T * L::WIDTH / TOKEN_GROUP {
                        prefetch(ahead.keys[first / TOKEN_GROUP + t].wrapping_add(d * stride));
                    }
                }
                let mut k = [L::splat(0.0); T];
                for t in 0..T {
                    k[t] = L::load_f16(keys[t].add(d * stride));
                }
                for r in 0..R {
                    let q = L::splat(*queries[r].add(d));
                    for t in 0..T {
                        sums[r][t] = L::fma(q, k[t], sums[r][t]);
                    }
                }
            }
            for r in 0..R {
                for t in 0..T {
                    L::store(scores.add(r * CHUNK + first + t * L::WIDTH), sums[r][t]);
                }
            }
        }
        first += T * L::WIDTH;
    }
}

/// Turns the chunk's scores into weights, and moves maxima and weights of all rows.
///
/// # Safety
/// The state is that of a borrowed scratch with the scores of the tile's rows.
#[inline(always)]
unsafe fn weigh<L: Lanes>(tile: &Tile<'_>, state: &TileState, start: usize) {
    let rows = tile.rows.len();
    // SAFETY: rows are below `TILE_ROWS`, whose arrays are whole vectors.
    unsafe {
        for (index, row) in tile.rows.clone().enumerate() {
            let scores = state.scores.add(index * CHUNK);
            *state.correction.add(index) = finish_scores::<L>(tile, row, start, scores);
        }
        let lowest = L::splat(f32::NEG_INFINITY);
        let mut row = 0;
        while row < rows {
            let (old, chunk) = (L::load(state.max.add(row)), L::load(state.correction.add(row)));
            let grown = exp_lanes::<L>(L::sub(old, chunk));
            let correction = L::if_less(old, chunk, grown, L::splat(1.0));
            L::store(state.correction.add(row), correction);
            L::store(state.max.add(row), L::if_less(old, chunk, chunk, old));
            row += L::WIDTH;
        }
        for row in 0..rows {
            // A row that has seen nothing yet has only −∞: any finite shift gives weights of 0.
            let max = L::splat(*state.max.add(row));
            let shift = L::if_less(lowest, max, max, L::splat(0.0));
            let mut sum = L::splat(0.0);
            let mut at = state.scores.add(row * CHUNK);
            for _ in 0..CHUNK / L::WIDTH {
                let weight = exp_lanes::<L>(L::sub(L::load(at), shift));
                L::store(at, weight);
                sum = L::add(sum, weight);
                at = at.add(L::WIDTH);
            }
            let weight = state.weight.add(row);
            *weight = *weight * *state.correction.add(row) + L::sum(sum);
        }
    }
}

/// Scales, caps and masks one row's scores of a chunk; returns the largest.
///
/// # Safety
/// `scores` is valid for `CHUNK` elements.
#[inline(always)]
unsafe fn finish_scores<L: Lanes>(
    tile: &Tile<'_>,
    row: usize,
    start: usize,
    scores: *mut f32,
) -> f32 {
    let (call, params) = (tile.call, &tile.call.params);
    let visible = call.visible(row / call.group());
    let low = visible.start.saturating_sub(start).min(CHUNK);
    let high = visible.end.saturating_sub(start).min(CHUNK);
    // SAFETY: offsets stay below `CHUNK`.
    unsafe {
        let (lowest, scale) = (L::splat(f32::NEG_INFINITY), L::splat(params.scale));
        let (low_lane, high_lane) = (L::splat(low as f32), L::splat(high as f32));
        let mut max = lowest;
        for t in 0..CHUNK / L::WIDTH {
            let at = scores.add(t * L::WIDTH);
            let mut s = L::mul(L::load(at), scale);
            if let Some(cap) = params.softcap {
                s = softcap_lanes::<L>(s, L::splat(cap), L::splat(1.0 / cap));
            }
            if low > 0 || high < CHUNK {
                let lane = L::add(L::iota(), L::splat((t * L::WIDTH) as f32));
                s = L::if_less(lane, high_lane, s, lowest);
                s = L::if_less(lane, low_lane, lowest, s);
            }
            L::store(at, s);
            max = L::max(max, s);
        }
        L::max_of(max)
    }
}

/// `sums[r] = sums[r]·correction[r] + Σ_j weight[r][j]·v[j]` for `R` rows from `row`.
///
/// # Safety
/// As [`segment`]; the chunk has been weighed.
#[inline(always)]
unsafe fn add_values<L: Lanes, const R: usize, const T: usize>(
    tile: &Tile<'_>,
    state: &TileState,
    lines: (&Chunk, Option<&Chunk>),
    row: usize,
) {
    let head_dim = tile.call.store.layout().head_dim();
    let mut d = 0;
    // SAFETY: full vectors lie inside the head; the last ones read only what is left of it.
    unsafe {
        while d + T * L::WIDTH <= head_dim {
            add_columns::<L, R, T, true>(tile, state, lines, (row, d));
            d += T * L::WIDTH;
        }
        while d + L::WIDTH <= head_dim {
            add_columns::<L, R, 1, true>(tile, state, lines, (row, d));
            d += L::WIDTH;
        }
        if d < head_dim {
            add_columns::<L, R, 1, false>(tile, state, lines, (row, d));
        }
    }
}

/// [`add_values`] for `T` vectors of elements from `d`; `WHOLE` says that the head has them all.
///
/// # Safety
/// As [`add_values`]. Rows of the sums are padded to whole vectors.
#[inline(always)]
unsafe fn add_columns<L: Lanes, const R: usize, const T: usize, const WHOLE: bool>(
    tile: &Tile<'_>,
    state: &TileState,
    (chunk, ahead): (&Chunk, Option<&Chunk>),
    (row, d): (usize, usize),
) {
    let head_dim = tile.call.store.layout().head_dim();
    let from = tile.positions.start.max(chunk.start) - chunk.start;
    let to = tile.positions.end.min(chunk.start + CHUNK) - chunk.start;
    // SAFETY: positions of the tile have values; see the promises above.
    unsafe {
        let mut sums = [[L::splat(0.0); T]; R];
        for r in 0..R {
            let correction = L::splat(*state.correction.add(row + r));
            for t in 0..T {
                let at = state.sums.add((row + r) * state.stride + d + t * L::WIDTH);
                sums[r][t] = L::mul(L::load(at), correction);
            }
        }
        let weights = state.scores.add(row * CHUNK);
        for j in from..to {
            let offset = j % TOKEN_GROUP * head_dim + d;
            let value = chunk.values[j / TOKEN_GROUP].add(offset);
            if let Some(ahead) = ahead {
                for line in 0..(T * L::WIDTH).div_ceil(32) {
                    prefetch(ahead.values[j / TOKEN_GROUP].wrapping_add(offset + line * 32));
                }
            }
            let mut v = [L::splat(0.0); T];
            for t in 0..T {
                v[t] = if WHOLE {
                    L::load_f16(value.add(t * L::WIDTH))
                } else {
                    L::load_f16_head(value, head_dim - d)
                };
            }
            for r in 0..R {
                let weight = L::splat(*weights.add(r * CHUNK + j));
                for t in 0..T {
                    sums[r][t] = L::fma(weight, v[t], sums[r][t]);
                }
            }
        }
        for r in 0..R {
            for t in 0..T {
                let at = state.sums.add((row + r) * state.stride + d + t * L::WIDTH);
                L::store(at, sums[r][t]);
            }
        }
    }
}

/// See [`AttentionTable::write_kv`].
///
/// # Safety
/// The write was checked and the CPU has the instructions of `L`.
#[inline(always)]
unsafe fn write_kv<L: Lanes>(write: &KvWrite<'_>, kv_head: usize) {
    let layout = write.store.layout();
    let (head_dim, block_tokens) = (layout.head_dim(), layout.block_tokens());
    for token in 0..write.keys.n_tokens() {
        let position = write.first_position + token;
        let (block, slot) = (write.blocks[position / block_tokens], position % block_tokens);
        let key = write.store.key_at(block, kv_head, slot);
        let value = write.store.value_at(block, kv_head, slot);
        let keys = &write.keys.row(token)[kv_head * head_dim..][..head_dim];
        let values = &write.values.row(token)[kv_head * head_dim..][..head_dim];
        let mut d = 0;
        while d < head_dim {
            let len = (head_dim - d).min(L::WIDTH);
            let mut bits = [0u16; 16];
            // SAFETY: `len` elements from `d` lie inside the head; a vector has at most 16.
            unsafe {
                store_f16::<L>(value.add(d), values.as_ptr().add(d), len);
                store_f16::<L>(bits.as_mut_ptr(), keys.as_ptr().add(d), len);
                for (i, bits) in bits[..len].iter().enumerate() {
                    *key.add((d + i) * block_tokens) = *bits;
                }
            }
            d += L::WIDTH;
        }
    }
}

/// Stores `len` elements as f16, within its finite range; NaN stays NaN.
///
/// # Safety
/// Both pointers are valid for `len ≤ WIDTH` elements.
#[inline(always)]
unsafe fn store_f16<L: Lanes>(to: *mut u16, from: *const f32, len: usize) {
    let max = half::f16::MAX.to_f32();
    // SAFETY: `min` and `max` keep a NaN in their second argument.
    unsafe {
        let x = L::load_head(from, len);
        let x = L::max(L::splat(-max), L::min(L::splat(max), x));
        L::store_f16_head(to, x, len);
    }
}

/// The outermost functions of one instruction set, and their table.
macro_rules! attention_table {
    ($module:ident, $lanes:ty, $rows:literal, $vectors:literal, $features:tt) => {
        pub(crate) mod $module {
            use super::*;

            pub(crate) const TABLE: AttentionTable = AttentionTable { segment, write_kv };

            /// # Safety
            /// The CPU has these features; otherwise as the generic function.
            #[target_feature(enable = $features)]
            unsafe fn segment(tile: &Tile<'_>, state: &TileState) {
                // SAFETY: the caller keeps the promises of the generic function.
                unsafe { super::segment::<$lanes, $rows, $vectors>(tile, state) }
            }

            /// # Safety
            /// The CPU has these features; otherwise as the generic function.
            #[target_feature(enable = $features)]
            unsafe fn write_kv(write: &KvWrite<'_>, kv_head: usize) {
                // SAFETY: the caller keeps the promises of the generic function.
                unsafe { super::write_kv::<$lanes>(write, kv_head) }
            }
        }
    };
}

attention_table!(avx2, crate::lanes::avx2::Avx2, 4, 2, "avx2,fma,f16c");
attention_table!(
    avx512,
    crate::lanes::avx512::Avx512,
    6,
    4,
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
);
