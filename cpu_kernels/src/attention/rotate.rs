//! The rotation of keys and queries in a store of 8 bits: plain Rust, the same bits for every
//! instruction set.
//!
//! Some models' keys have a few elements a hundred times as large as the rest (Qwen2's biases). One
//! such element would take all steps of its group's scale. A Hadamard matrix `H / √32` is
//! orthogonal, so rotating both sides changes no product, `(Hq)·(Hk) / 32 = q·k`, and it spreads
//! one large element evenly over its group (QuaRot, Ashkboos et al., arXiv 2404.00456).

use super::store::KV_GROUP;
use super::{AttentionCall, TileState};
use std::ops::Range;
use std::slice;

/// 1 / √32.
const NORM: f32 = 0.176_776_69;

/// Rotates a group in place, its own inverse, by the fast Walsh–Hadamard transform.
#[inline(always)]
pub(super) fn rotate(group: &mut [f32; KV_GROUP]) {
    let mut half = 1;
    while half < KV_GROUP {
        for pair in group.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    for x in group {
        *x *= NORM;
    }
}

/// Fills the state's queries with those of the rows, rotated as keys are: whole groups only.
///
/// # Safety
/// The call was checked, the state is that of a borrowed scratch, `rows` are at most `TILE_ROWS`.
pub(super) unsafe fn rotate_queries(
    call: &AttentionCall<'_>,
    kv_head: usize,
    rows: Range<usize>,
    state: &TileState,
) {
    let head_dim = call.store.layout().head_dim();
    for (index, row) in rows.enumerate() {
        // SAFETY: the row is inside the scratch; queries have `head_dim` elements.
        let (rotated, query) = unsafe {
            let rotated = state.rotated.add(index * state.stride);
            let query = slice::from_raw_parts(call.query(kv_head, row), head_dim);
            (slice::from_raw_parts_mut(rotated, head_dim), query)
        };
        rotated.copy_from_slice(query);
        for group in rotated.as_chunks_mut().0 {
            rotate(group);
        }
    }
}
