//! Scores and weighted sums over f16 keys and values.

use crate::attention::chunk::{Chunk, prefetch};
use crate::attention::scratch::CHUNK;
use crate::attention::{TOKEN_GROUP, Tile, TileState};
use crate::lanes::Lanes;

/// `scores[r][j] = Σ_d q[r][d]·k[j][d]` for `R` rows and the 64 positions of a chunk.
///
/// # Safety
/// The first `R` queries are valid for `head_dim` elements, `scores` for `R` rows of `CHUNK`.
#[inline(always)]
pub(super) unsafe fn score_rows<L: Lanes, const R: usize, const T: usize>(
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

/// `sums[r] = sums[r]·correction[r] + Σ_j weight[r][j]·v[j]` for `R` rows from `row`.
///
/// # Safety
/// As [`segment`]; the chunk has been weighed.
#[inline(always)]
pub(super) unsafe fn add_values<L: Lanes, const R: usize, const T: usize>(
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
