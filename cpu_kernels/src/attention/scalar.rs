//! The specification of attention: per query row, one pass for the scores of a segment and one for
//! the weighted sum.

use super::merge::merge_tile;
use super::store::KV_GROUP;
use super::write::write_groups;
use super::{AttentionTable, KvWrite, SEGMENT_TOKENS, Tile, TileState};
use crate::elementwise::scalar::softcap_one;
use half::f16;

/// The portable kernels.
pub(crate) const TABLE: AttentionTable = AttentionTable { segment, merge: merge_tile, write_kv };

/// See [`AttentionTable::segment`].
///
/// # Safety
/// The call was checked and the state is that of a borrowed scratch, cleared.
unsafe fn segment(tile: &Tile<'_>, state: &TileState) {
    let call = tile.call;
    let mut scores = [0.0f32; SEGMENT_TOKENS];
    for (index, row) in tile.rows.clone().enumerate() {
        let visible = call.visible(row / call.group());
        let start = visible.start.max(tile.positions.start);
        let end = visible.end.min(tile.positions.end);
        if start >= end {
            continue;
        }
        let scores = &mut scores[..end - start];
        // SAFETY: positions of the tile have blocks; the row is inside the scratch.
        unsafe {
            score(tile, tile.query(index, state), start, scores);
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            *state.max.add(index) = max;
            let mut weight = 0.0;
            let sums = state.sums.add(index * state.stride);
            for (position, score) in (start..end).zip(scores.iter()) {
                let w = (score - max).exp();
                weight += w;
                add_value(tile, position, w, sums);
            }
            *state.weight.add(index) = weight;
        }
    }
}

/// Scores of one query at positions `start ..`.
///
/// # Safety
/// As [`segment`].
unsafe fn score(tile: &Tile<'_>, query: *const f32, start: usize, scores: &mut [f32]) {
    let (call, head_dim) = (tile.call, tile.call.store.layout().head_dim());
    for (position, score) in (start..).zip(scores) {
        let mut dot = 0.0f32;
        for d in 0..head_dim {
            // SAFETY: `d` is inside the head of query and key.
            dot += unsafe { *query.add(d) * element(tile, Which::Key, position, d) };
        }
        *score = dot * call.params.scale;
        if let Some(cap) = call.params.softcap {
            *score = softcap_one(*score, cap);
        }
    }
}

/// `sums[d] += weight · value[position][d]`.
///
/// # Safety
/// As [`segment`]; `sums` is a row of the scratch.
unsafe fn add_value(tile: &Tile<'_>, position: usize, weight: f32, sums: *mut f32) {
    for d in 0..tile.call.store.layout().head_dim() {
        // SAFETY: `d` is inside the head of the value and of the sums.
        unsafe { *sums.add(d) += weight * element(tile, Which::Value, position, d) };
    }
}

#[derive(Clone, Copy)]
enum Which {
    Key,
    Value,
}

/// An element of a stored key or value.
///
/// # Safety
/// As [`segment`]; `d` is inside the head.
unsafe fn element(tile: &Tile<'_>, which: Which, position: usize, d: usize) -> f32 {
    let (store, layout) = (&tile.call.store, tile.call.store.layout());
    let (block, token) = (tile.call.block_of(position), position % layout.block_tokens());
    let (at, index) = match which {
        Which::Key => (store.key_at(block, tile.kv_head, token), d * layout.block_tokens()),
        Which::Value => (store.value_at(block, tile.kv_head, token), d),
    };
    // SAFETY: the element and its scale lie inside the block's head.
    unsafe {
        if layout.is_eight_bits() {
            let scales = store.scales_at(block, tile.kv_head, token)[which as usize];
            let scale = *scales.add(d / KV_GROUP * layout.block_tokens());
            f32::from(*at.cast::<i8>().add(index)) * f16::from_bits(scale).to_f32()
        } else {
            f16::from_bits(*at.cast::<u16>().add(index)).to_f32()
        }
    }
}

/// See [`AttentionTable::write_kv`].
///
/// # Safety
/// The write was checked.
unsafe fn write_kv(write: &KvWrite<'_>, kv_head: usize) {
    let layout = write.store.layout();
    if layout.is_eight_bits() {
        // SAFETY: the write was checked.
        return unsafe { write_groups(write, kv_head) };
    }
    let (head_dim, block_tokens) = (layout.head_dim(), layout.block_tokens());
    for token in 0..write.keys.n_tokens() {
        let position = write.first_position + token;
        let (block, slot) = (write.blocks[position / block_tokens], position % block_tokens);
        let key = write.store.key_at(block, kv_head, slot).cast::<u16>();
        let value = write.store.value_at(block, kv_head, slot).cast::<u16>();
        let from = kv_head * head_dim;
        let keys = &write.keys.row(token)[from..][..head_dim];
        let values = &write.values.row(token)[from..][..head_dim];
        for (d, (k, v)) in keys.iter().zip(values).enumerate() {
            // SAFETY: `d` is inside the head.
            unsafe {
                *key.add(d * block_tokens) = to_f16_bits(*k);
                *value.add(d) = to_f16_bits(*v);
            }
        }
    }
}

/// Nearest f16, ties to even, within its finite range; NaN stays NaN.
pub(super) fn to_f16_bits(x: f32) -> u16 {
    let max = f16::MAX.to_f32();
    f16::from_f32(if x.is_nan() { x } else { x.clamp(-max, max) }).to_bits()
}
