//! Scores and weighted sums: the two products of attention, over either type of store.

use crate::attention::chunk::{Chunk, prefetch};
use crate::attention::scratch::CHUNK;
use crate::attention::store::KV_GROUP;
use crate::attention::{TOKEN_GROUP, Tile, TileState};
use crate::lanes::Lanes;
use std::ops::Range;

/// How a store keeps an element.
pub(super) trait Element {
    const BYTES: usize;
    /// Whether groups of [`KV_GROUP`] elements of a head have a scale.
    const SCALED: bool;

    /// # Safety
    /// `at` is valid for a vector of elements.
    unsafe fn load<L: Lanes>(at: *const u8) -> L::V;
    /// The first `n` elements; the others are 0.
    ///
    /// # Safety
    /// `at` is valid for `n` elements.
    unsafe fn load_head<L: Lanes>(at: *const u8, n: usize) -> L::V;
}

/// f16.
pub(super) struct Half;

/// 8 bits, scaled.
pub(super) struct EightBit;

impl Element for Half {
    const BYTES: usize = 2;
    const SCALED: bool = false;

    #[inline(always)]
    unsafe fn load<L: Lanes>(at: *const u8) -> L::V {
        // SAFETY: passed on.
        unsafe { L::load_f16(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load_head<L: Lanes>(at: *const u8, n: usize) -> L::V {
        // SAFETY: passed on.
        unsafe { L::load_f16_head(at.cast(), n) }
    }
}

impl Element for EightBit {
    const BYTES: usize = 1;
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn load<L: Lanes>(at: *const u8) -> L::V {
        // SAFETY: passed on.
        unsafe { L::load_i8(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load_head<L: Lanes>(at: *const u8, n: usize) -> L::V {
        let mut buffer = [0u8; 16];
        // SAFETY: a vector has at most 16 elements.
        unsafe {
            std::ptr::copy_nonoverlapping(at, buffer.as_mut_ptr(), n);
            L::load_i8(buffer.as_ptr().cast())
        }
    }
}

/// `scores[r][j] = Σ_d q[r][d]·k[j][d]` for `R` rows and the 64 positions of a chunk. Of scaled
/// elements, the sum over each group is multiplied by the scale.
///
/// # Safety
/// The first `R` queries are valid for `head_dim` elements, `scores` for `R` rows of `CHUNK`, and
/// `E` is what the store holds.
#[inline(always)]
pub(super) unsafe fn score_rows<E: Element, L: Lanes, const R: usize, const T: usize>(
    tile: &Tile<'_>,
    queries: &[*const f32],
    (chunk, ahead): (&Chunk, Option<&Chunk>),
    scores: *mut f32,
) {
    let layout = tile.call.store.layout();
    let (head_dim, stride) = (layout.head_dim(), layout.block_tokens());
    let step = if E::SCALED { KV_GROUP } else { head_dim };
    for first in (0..CHUNK).step_by(T * L::WIDTH) {
        let mut keys = [std::ptr::null::<u8>(); T];
        // SAFETY: a vector of positions lies inside one group; offsets inside the block's head.
        unsafe {
            for (t, key) in keys.iter_mut().enumerate() {
                let position = first + t * L::WIDTH;
                *key = chunk.keys[position / TOKEN_GROUP].add(position % TOKEN_GROUP * E::BYTES);
            }
            let mut from = 0;
            while from < head_dim {
                let to = head_dim.min(from + step);
                let ahead = ahead.map(|ahead| &ahead.keys[first / TOKEN_GROUP..]);
                let heads = (queries, keys);
                let sums = match ahead {
                    Some(ahead) => dot::<E, L, R, T, true>(heads, ahead, (from..to, stride)),
                    None => dot::<E, L, R, T, false>(heads, &[], (from..to, stride)),
                };
                for t in 0..T {
                    let position = first + t * L::WIDTH;
                    let scale = if E::SCALED {
                        let scales = chunk.key_scales[position / TOKEN_GROUP];
                        L::load_f16(scales.add(from / KV_GROUP * stride + position % TOKEN_GROUP))
                    } else {
                        L::splat(1.0)
                    };
                    for r in 0..R {
                        let at = scores.add(r * CHUNK + position);
                        let sum = match (E::SCALED, from) {
                            (false, _) => sums[r][t],
                            (true, 0) => L::mul(sums[r][t], scale),
                            (true, _) => L::fma(sums[r][t], scale, L::load(at)),
                        };
                        L::store(at, sum);
                    }
                }
                from = to;
            }
        }
    }
}

/// Products of `R` queries with `T` vectors of keys over the elements `of`, `stride` apart; `ASK`
/// has it ask for the keys `ahead` on the way.
///
/// # Safety
/// As [`score_rows`].
#[inline(always)]
unsafe fn dot<E: Element, L: Lanes, const R: usize, const T: usize, const ASK: bool>(
    (queries, keys): (&[*const f32], [*const u8; T]),
    ahead: &[*const u8],
    (of, stride): (Range<usize>, usize),
) -> [[L::V; T]; R] {
    // SAFETY: the elements lie inside the heads of queries and keys.
    unsafe {
        let mut sums = [[L::splat(0.0); T]; R];
        for d in of {
            if ASK {
                for keys in &ahead[..(T * L::WIDTH).div_ceil(TOKEN_GROUP)] {
                    prefetch(keys.wrapping_add(d * stride * E::BYTES));
                }
            }
            let mut k = [L::splat(0.0); T];
            for t in 0..T {
                k[t] = E::load::<L>(keys[t].add(d * stride * E::BYTES));
            }
            for r in 0..R {
                let q = L::splat(*queries[r].add(d));
                for t in 0..T {
                    sums[r][t] = L::fma(q, k[t], sums[r][t]);
                }
            }
        }
        sums
    }
}

/// `sums[r] = sums[r]·correction[r] + Σ_j weight[r][j]·v[j]` for `R` rows from `row`. Of scaled
/// elements, the weights of each group are multiplied by its scales first.
///
/// # Safety
/// As `segment`; the chunk has been weighed, and `E` is what the store holds.
#[inline(always)]
pub(super) unsafe fn add_values<E: Element, L: Lanes, const R: usize, const T: usize>(
    tile: &Tile<'_>,
    state: &TileState,
    lines: (&Chunk, Option<&Chunk>),
    row: usize,
) {
    let head_dim = tile.call.store.layout().head_dim();
    let step = if E::SCALED { KV_GROUP } else { head_dim };
    let mut scaled = [[0.0f32; CHUNK]; R];
    let mut d = 0;
    // SAFETY: full vectors lie inside the head; the last ones read only what is left of it.
    unsafe {
        while d < head_dim {
            let end = head_dim.min(d + step);
            let weights = if E::SCALED {
                scale_weights::<L, R>(tile, state, lines.0, (row, d / KV_GROUP), &mut scaled);
                scaled.as_ptr().cast()
            } else {
                state.scores.add(row * CHUNK).cast_const()
            };
            while d + T * L::WIDTH <= end {
                add_columns::<E, L, R, T, true>(tile, (state, weights), lines, (row, d, end));
                d += T * L::WIDTH;
            }
            while d + 2 * L::WIDTH <= end {
                add_columns::<E, L, R, 2, true>(tile, (state, weights), lines, (row, d, end));
                d += 2 * L::WIDTH;
            }
            while d + L::WIDTH <= end {
                add_columns::<E, L, R, 1, true>(tile, (state, weights), lines, (row, d, end));
                d += L::WIDTH;
            }
            if d < end {
                add_columns::<E, L, R, 1, false>(tile, (state, weights), lines, (row, d, end));
                d = end;
            }
        }
    }
}

/// `scaled[r][j] = weight[r][j] · scale[j]` for a group of elements. What no row sees becomes
/// anything, and is not read.
///
/// # Safety
/// As [`add_values`].
#[inline(always)]
unsafe fn scale_weights<L: Lanes, const R: usize>(
    tile: &Tile<'_>,
    state: &TileState,
    chunk: &Chunk,
    (row, group): (usize, usize),
    scaled: &mut [[f32; CHUNK]; R],
) {
    let stride = tile.call.store.layout().block_tokens();
    // SAFETY: a vector of positions lies inside one group of tokens, whose scales are in a block.
    unsafe {
        for position in (0..CHUNK).step_by(L::WIDTH) {
            let scales = chunk.value_scales[position / TOKEN_GROUP];
            let scale = L::load_f16(scales.add(group * stride + position % TOKEN_GROUP));
            for (r, scaled) in scaled.iter_mut().enumerate() {
                let weight = L::load(state.scores.add((row + r) * CHUNK + position));
                L::store(scaled.as_mut_ptr().add(position), L::mul(weight, scale));
            }
        }
    }
}

/// [`add_values`] for `T` vectors of elements from `d`, with the given `[R, CHUNK]` weights;
/// `WHOLE` says that the elements before `end` fill them.
///
/// # Safety
/// As [`add_values`]. Rows of the sums are padded to whole vectors.
#[inline(always)]
unsafe fn add_columns<E: Element, L: Lanes, const R: usize, const T: usize, const WHOLE: bool>(
    tile: &Tile<'_>,
    (state, weights): (&TileState, *const f32),
    (chunk, ahead): (&Chunk, Option<&Chunk>),
    (row, d, end): (usize, usize, usize),
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
        for j in from..to {
            let offset = (j % TOKEN_GROUP * head_dim + d) * E::BYTES;
            let value = chunk.values[j / TOKEN_GROUP].add(offset);
            if let Some(ahead) = ahead {
                for line in 0..(T * L::WIDTH * E::BYTES).div_ceil(64) {
                    prefetch(ahead.values[j / TOKEN_GROUP].wrapping_add(offset + line * 64));
                }
            }
            let mut v = [L::splat(0.0); T];
            for t in 0..T {
                v[t] = if WHOLE {
                    E::load::<L>(value.add(t * L::WIDTH * E::BYTES))
                } else {
                    E::load_head::<L>(value, end - d)
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
