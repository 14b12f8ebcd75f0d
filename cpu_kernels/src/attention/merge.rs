//! What happens to segments after they are computed: merging in ascending order (this is the
//! specification), and the output, the same for every instruction set.

use super::{AttentionCall, TileState};
use crate::matmul::OutputColumns;
use std::ops::Range;
use std::slice;

/// Panics unless the output has a column per query and a row per element of the heads.
pub(super) fn check_output(call: &AttentionCall<'_>, output: &OutputColumns<'_>) {
    let (columns, rows) = (call.queries.n_tokens(), call.queries.width());
    let fits = output.columns() >= columns && output.rows() >= rows;
    let got = (output.columns(), output.rows());
    assert!(fits, "attention writes {columns} columns of {rows} rows, the output has {got:?}");
}

/// Adds the state's segment to what was merged before it:
/// ```text
/// M' = max(M, m)    W' = W·e^(M−M') + w·e^(m−M')    A' = A·e^(M−M') + a·e^(m−M')
/// ```
/// A row that saw nothing of the segment (`m = −∞`) is left alone.
///
/// # Safety
/// `state` is that of a borrowed scratch for `head_dim`, `rows ≤ TILE_ROWS`.
pub(super) unsafe fn merge_tile(state: &TileState, rows: usize, head_dim: usize) {
    for row in 0..rows {
        // SAFETY: the row is inside every array of the scratch.
        unsafe {
            let (max, merged_max) = (*state.max.add(row), *state.merged_max.add(row));
            if max == f32::NEG_INFINITY && *state.weight.add(row) == 0.0 {
                continue;
            }
            let both = max.max(merged_max);
            let (old, new) = ((merged_max - both).exp(), (max - both).exp());
            *state.merged_max.add(row) = both;
            let weight = state.merged_weight.add(row);
            *weight = *weight * old + *state.weight.add(row) * new;
            let merged = slice::from_raw_parts_mut(state.merged.add(row * state.stride), head_dim);
            let sums = slice::from_raw_parts(state.sums.add(row * state.stride), head_dim);
            for (merged, sum) in merged.iter_mut().zip(sums) {
                *merged = *merged * old + sum * new;
            }
        }
    }
}

/// Divides by the weights and writes the rows. Adding +0 makes −0 into +0, the only difference that
/// skipping an unseen chunk could make.
///
/// # Safety
/// As [`merge_tile`]; the output was checked and its rows of `kv_head` belong to the caller.
pub(super) unsafe fn write_tile(
    call: &AttentionCall<'_>,
    kv_head: usize,
    rows: Range<usize>,
    state: &TileState,
    output: OutputColumns<'_>,
) {
    let (group, head_dim) = (call.group(), call.store.layout().head_dim());
    for (index, row) in rows.enumerate() {
        let head = kv_head * group + row % group;
        // SAFETY: the row is inside the scratch, and the output was checked.
        unsafe {
            let weight = *state.merged_weight.add(index);
            let merged = slice::from_raw_parts(state.merged.add(index * state.stride), head_dim);
            let out = output.at(row / group, head * head_dim);
            for (d, sum) in merged.iter().enumerate() {
                *out.add(d) = sum / weight + 0.0;
            }
        }
    }
}

/// Copies a computed segment out: per row its maximum, its weight and `[head_dim]` sums.
///
/// # Safety
/// As [`merge_tile`], for the rows that `partial` has room for.
pub(super) unsafe fn save_partial(state: &TileState, head_dim: usize, partial: &mut [f32]) {
    for (row, saved) in partial.chunks_exact_mut(head_dim + 2).enumerate() {
        // SAFETY: the row is inside every array of the scratch.
        unsafe {
            saved[0] = *state.max.add(row);
            saved[1] = *state.weight.add(row);
            let sums = slice::from_raw_parts(state.sums.add(row * state.stride), head_dim);
            saved[2..].copy_from_slice(sums);
        }
    }
}

/// The inverse of [`save_partial`].
///
/// # Safety
/// As [`save_partial`].
pub(super) unsafe fn load_partial(state: &TileState, head_dim: usize, partial: &[f32]) {
    for (row, saved) in partial.chunks_exact(head_dim + 2).enumerate() {
        // SAFETY: the row is inside every array of the scratch.
        unsafe {
            *state.max.add(row) = saved[0];
            *state.weight.add(row) = saved[1];
            let sums = slice::from_raw_parts_mut(state.sums.add(row * state.stride), head_dim);
            sums.copy_from_slice(&saved[2..]);
        }
    }
}
