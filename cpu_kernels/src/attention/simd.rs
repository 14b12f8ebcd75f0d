//! Attention for any vector width. A tile of query rows goes through the chunks of a segment:
//! ```text
//! scores[row][j] = q[row]·k[j]             lanes are positions; rows share each load of keys
//! mask, scale, cap; new maximum, correction, weights e^(score − max)      lanes are positions
//! sums[row][d] = sums[row][d]·correction + Σ_j weight[row][j]·v[j][d]      lanes are elements
//! ```
//! Every sum runs over `d` or `j` in ascending order with one fused multiply-add per term, so the
//! number of rows that are computed together changes no bit.

#![allow(clippy::needless_range_loop, reason = "register tiles are read by their indices")]

mod products;
mod write;

use super::chunk::Chunk;
use super::scratch::{CHUNK, TILE_ROWS};
use super::{AttentionTable, KvWrite, Tile, TileState};
use crate::lanes::{Lanes, exp_lanes, softcap_lanes};
use products::{EightBit, Element, Half, add_values, score_rows};

/// See [`AttentionTable::segment`]. A micro-kernel has `M` rows of `T` vectors: `M·T` accumulators,
/// `T` operands and a broadcast must fit the registers, and the accumulators should be more than
/// the latency of a multiply-add times its throughput (4 · 2).
///
/// # Safety
/// The call was checked, the state is that of a borrowed scratch, cleared, and the CPU has the
/// instructions of `L`.
#[inline(always)]
unsafe fn segment<E: Element, L: Lanes, const M: usize, const T: usize>(
    tile: &Tile<'_>,
    state: &TileState,
) {
    let rows = tile.rows.len();
    let mut queries = [std::ptr::null(); TILE_ROWS];
    for (index, query) in queries[..rows].iter_mut().enumerate() {
        // SAFETY: the row is one of the tile's.
        *query = unsafe { tile.query(index, state) };
    }
    let start = tile.positions.start / CHUNK * CHUNK;
    let mut chunk = Chunk::new(tile, start, tile.positions.clone());
    loop {
        let next = chunk.start + CHUNK;
        let ahead = (next < tile.read_end).then(|| Chunk::new(tile, next, next..tile.read_end));
        // SAFETY: queries and scratch have the tile's rows.
        unsafe {
            attend_chunk::<E, L, M, T>(tile, state, &queries[..rows], (&chunk, ahead.as_ref()))
        }
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
unsafe fn attend_chunk<E: Element, L: Lanes, const M: usize, const T: usize>(
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
                1 => score_rows::<E, L, 1, T>(tile, at, lines(row), scores),
                2 => score_rows::<E, L, 2, T>(tile, at, lines(row), scores),
                3 => score_rows::<E, L, 3, T>(tile, at, lines(row), scores),
                4 => score_rows::<E, L, 4, T>(tile, at, lines(row), scores),
                5 => score_rows::<E, L, 5, T>(tile, at, lines(row), scores),
                _ => score_rows::<E, L, 6, T>(tile, at, lines(row), scores),
            }
            row += M;
        }
        weigh::<L>(tile, state, chunk.start);
        row = 0;
        while row < rows {
            match M.min(rows - row) {
                1 => add_values::<E, L, 1, T>(tile, state, lines(row), row),
                2 => add_values::<E, L, 2, T>(tile, state, lines(row), row),
                3 => add_values::<E, L, 3, T>(tile, state, lines(row), row),
                4 => add_values::<E, L, 4, T>(tile, state, lines(row), row),
                5 => add_values::<E, L, 5, T>(tile, state, lines(row), row),
                _ => add_values::<E, L, 6, T>(tile, state, lines(row), row),
            }
            row += M;
        }
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

/// See `merge_tile` of `merge.rs`, whose formula this is. A row that saw nothing of the segment
/// has only −∞ and zeros: its factor is `e^−∞ = 0`, that of what it had merged is `e^0 = 1`.
///
/// # Safety
/// The state is that of a borrowed scratch for `head_dim`, `rows ≤ TILE_ROWS`, and the CPU has the
/// instructions of `L`.
#[inline(always)]
unsafe fn merge<L: Lanes>(state: &TileState, rows: usize, head_dim: usize) {
    // SAFETY: arrays of rows are whole vectors, rows of sums are padded to whole vectors; the
    // scores are no longer needed and have room for a factor per row.
    unsafe {
        let (lowest, factors) = (L::splat(f32::NEG_INFINITY), state.scores);
        for row in (0..rows).step_by(L::WIDTH) {
            let (max, merged_max) = (L::load(state.max.add(row)), state.merged_max.add(row));
            let old_max = L::load(merged_max);
            let both = L::max(max, old_max);
            let shift = L::if_less(lowest, both, both, L::splat(0.0));
            let old = exp_lanes::<L>(L::sub(old_max, shift));
            let new = exp_lanes::<L>(L::sub(max, shift));
            let (weight, merged) = (L::load(state.weight.add(row)), state.merged_weight.add(row));
            L::store(merged, L::fma(weight, new, L::mul(L::load(merged), old)));
            L::store(merged_max, both);
            L::store(state.correction.add(row), old);
            L::store(factors.add(row), new);
        }
        for row in 0..rows {
            let (old, new) = (*state.correction.add(row), *factors.add(row));
            let (old, new) = (L::splat(old), L::splat(new));
            for d in (0..head_dim).step_by(L::WIDTH) {
                let merged = state.merged.add(row * state.stride + d);
                let sums = L::load(state.sums.add(row * state.stride + d));
                L::store(merged, L::fma(sums, new, L::mul(L::load(merged), old)));
            }
        }
    }
}

/// The outermost functions of one instruction set, and their table.
macro_rules! attention_table {
    ($module:ident, $lanes:ty, $rows:literal, $vectors:literal, $features:tt) => {
        pub(crate) mod $module {
            use super::*;

            pub(crate) const TABLE: AttentionTable = AttentionTable { segment, merge, write_kv };

            /// # Safety
            /// As the generic function; the CPU has these features.
            unsafe fn segment(tile: &Tile<'_>, state: &TileState) {
                // SAFETY: the caller keeps the promises of both.
                unsafe {
                    if tile.call.store.layout().is_eight_bits() {
                        segment_q8_0(tile, state);
                    } else {
                        segment_f16(tile, state);
                    }
                }
            }

            /// # Safety
            /// The CPU has these features; otherwise as the generic function.
            #[target_feature(enable = $features)]
            unsafe fn segment_f16(tile: &Tile<'_>, state: &TileState) {
                // SAFETY: the caller keeps the promises of the generic function.
                unsafe { super::segment::<Half, $lanes, $rows, $vectors>(tile, state) }
            }

            /// # Safety
            /// The CPU has these features; otherwise as the generic function.
            #[target_feature(enable = $features)]
            unsafe fn segment_q8_0(tile: &Tile<'_>, state: &TileState) {
                // SAFETY: the caller keeps the promises of the generic function.
                unsafe { super::segment::<EightBit, $lanes, $rows, $vectors>(tile, state) }
            }

            /// # Safety
            /// The CPU has these features; otherwise as the generic function.
            #[target_feature(enable = $features)]
            unsafe fn merge(state: &TileState, rows: usize, head_dim: usize) {
                // SAFETY: the caller keeps the promises of the generic function.
                unsafe { super::merge::<$lanes>(state, rows, head_dim) }
            }

            /// # Safety
            /// The CPU has these features; otherwise as the generic function.
            #[target_feature(enable = $features)]
            unsafe fn write_kv(write: &KvWrite<'_>, kv_head: usize) {
                // SAFETY: the caller keeps the promises of the generic function.
                unsafe { super::write::write_kv::<$lanes>(write, kv_head) }
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
