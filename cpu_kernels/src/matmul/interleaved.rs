//! The quantised kernel: 16 interleaved rows against tiles of columns.
//!
//! ```text
//! for each group of 16 rows:
//!   for each tile of T columns:                 weights come from DRAM once, then from L1/L2
//!     for each group of 32 elements:
//!       for each of 8 words (4 elements):
//!         w = decode(word of 16 rows)           one vector, used for all T columns
//!         for each column c:  isum[c] += w · broadcast(x[c].word)
//!       acc[c] = fma(isum[c], scale · x[c].scale, acc[c]), then offsets
//! ```
//! A lane does exactly what `scalar.rs` does for its row. Row-major weights are interleaved chunk
//! by chunk into a buffer on the stack first; their sums wait in the output between chunks.

use super::lanes::Lanes;
use super::packed::{Block, MinKind, Packed};
use super::{Layout, MatrixView, OutputColumns, wide};
use crate::activations::{Activations, GroupScale, Quantized};
use crate::blocks::GROUP;
use crate::repack::{ROWS, block_of_rows, pack_block};
use std::ops::Range;

/// Elements per row of a chunk of row-major weights.
const CHUNK_ELEMENTS: usize = 1024;
/// Bytes of 16 rows of a chunk in the largest type, `Q8_0` with 34 bytes per 32 elements.
const CHUNK_BYTES: usize = ROWS * CHUNK_ELEMENTS / 32 * 34;

/// How far ahead of its use weights are fetched: hardware prefetchers stop at each page. With eight
/// columns 4 KiB came too late from a busy memory (31 GB/s where 8 to 16 KiB gave 35).
const PREFETCH_BYTES: usize = 12 << 10;

/// A run of packed blocks of 16 rows, and the activations that meet it.
#[derive(Clone, Copy)]
struct Panel<'a> {
    /// First packed block.
    packed: *const u8,
    /// Packed blocks along the columns.
    blocks: usize,
    /// First group of 32 elements within the row.
    group: usize,
    /// Groups of a whole row.
    groups: usize,
    x: Quantized<'a>,
}

/// The kernel; see the module.
///
/// # Safety
/// The CPU has the instruction set of `L`; shapes were checked by `Kernels::matmul`; `weights` are
/// of type `P`.
#[inline(always)]
pub(super) unsafe fn matmul<L: Lanes, P: Packed>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    let Some(x) = x.quantized() else { return };
    let wide_from = if P::HALVES { L::WIDE_FROM / 2 } else { L::WIDE_FROM };
    if out.columns() > wide_from && weights.cols() > 0 && weights.layout() == Layout::Rows16 {
        // SAFETY: our own contract, and the layout that was asked for.
        return unsafe { wide::matmul::<L, P>(weights, x, rows, out) };
    }
    let (elements, bytes) = const { (P::DTYPE.block_elements(), P::DTYPE.block_bytes()) };
    let blocks = weights.cols() / elements;
    let row_bytes = blocks * bytes;
    let chunk = match weights.layout() {
        Layout::Rows16 => blocks,
        Layout::RowMajor => CHUNK_ELEMENTS / elements,
    };
    let mut scratch = [0; CHUNK_BYTES];
    let mut first_row = rows.start / ROWS * ROWS;
    while first_row < rows.end {
        let covered = rows.start.max(first_row)..rows.end.min(first_row + ROWS);
        let source = &weights.bytes()[first_row * row_bytes..];
        let source = &source[..source.len().min(ROWS * row_bytes)];
        let mut block = 0;
        while block < blocks.max(1) {
            let count = chunk.min(blocks - block);
            let packed = match weights.layout() {
                Layout::Rows16 => source,
                Layout::RowMajor => {
                    pack_chunk::<P>(source, row_bytes, block..block + count, &mut scratch);
                    &scratch
                }
            };
            let group = block * (elements / GROUP);
            let groups = blocks * (elements / GROUP);
            let panel = Panel { packed: packed.as_ptr(), blocks: count, group, groups, x };
            // SAFETY: `packed` holds `count` packed blocks; the rest is our own contract.
            unsafe { multiply_panel::<L, P>(&panel, covered.clone(), out) };
            block += chunk.max(1);
        }
        first_row += ROWS;
    }
}

fn pack_chunk<P: Packed>(
    source: &[u8],
    row_bytes: usize,
    blocks: Range<usize>,
    scratch: &mut [u8; CHUNK_BYTES],
) {
    let bytes = P::DTYPE.block_bytes();
    for (block, packed) in blocks.zip(scratch.chunks_exact_mut(ROWS * bytes)) {
        pack_block(P::DTYPE, &block_of_rows(P::DTYPE, source, row_bytes, block), packed);
    }
}

/// All columns against one panel, tile after tile.
#[inline(always)]
unsafe fn multiply_panel<L: Lanes, P: Packed>(
    panel: &Panel<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    let mut column = 0;
    while column < out.columns() {
        let left = out.columns() - column;
        // SAFETY: our own contract, passed on; tiles start at an existing column.
        unsafe {
            column += match left {
                1 => multiply_tile::<L, P, 1>(panel, column, rows.clone(), out),
                5.. if L::TILE == 8 => multiply_tile::<L, P, 8>(panel, column, rows.clone(), out),
                _ => multiply_tile::<L, P, 4>(panel, column, rows.clone(), out),
            };
        }
    }
}

/// Up to `T` columns from `first`: past the last one a tile repeats it and drops the results.
/// Returns how many columns it did.
#[inline(always)]
unsafe fn multiply_tile<L: Lanes, P: Packed, const T: usize>(
    panel: &Panel<'_>,
    first: usize,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) -> usize {
    let columns = T.min(out.columns() - first);
    let mut x = [(std::ptr::null(), std::ptr::null()); T];
    for (index, x) in x.iter_mut().enumerate() {
        let column = first + index.min(columns - 1);
        let start = column * panel.groups + panel.group;
        *x = (panel.x.quants[start * GROUP..].as_ptr(), panel.x.scales[start..].as_ptr());
    }
    let mut lane = 0;
    while lane < ROWS {
        // SAFETY: `x` points to the groups of existing columns; the rest is our own contract.
        unsafe {
            let mut acc = [L::splat_f32(0.0); T];
            let base = rows.start / ROWS * ROWS + lane;
            if panel.group > 0 {
                load_sums::<L, T>(&mut acc, (first, columns), row_lanes::<L>(&rows, base), out);
            }
            sum_blocks::<L, P, T>(panel, lane, &x, &mut acc);
            store_sums::<L, T>(&acc, (first, columns), row_lanes::<L>(&rows, base), out);
        }
        lane += L::LANES;
    }
    columns
}

/// First covered row, and which lanes of the vector that starts at row `base` are covered.
#[inline(always)]
pub(super) fn row_lanes<L: Lanes>(rows: &Range<usize>, base: usize) -> (usize, Range<usize>) {
    let start = rows.start.max(base).min(base + L::LANES);
    let end = rows.end.max(base).min(base + L::LANES);
    (start, start - base..end - base)
}

#[inline(always)]
unsafe fn load_sums<L: Lanes, const T: usize>(
    acc: &mut [L::Float; T],
    (first, columns): (usize, usize),
    (row, lanes): (usize, Range<usize>),
    out: OutputColumns<'_>,
) {
    if lanes.is_empty() {
        return;
    }
    for (index, acc) in acc.iter_mut().enumerate().take(columns) {
        let mut values = [0.0; ROWS];
        let source = out.at(first + index, row);
        // SAFETY: rows `row .. row + lanes.len()` are in the output and this thread's.
        unsafe {
            for (offset, value) in values[lanes.clone()].iter_mut().enumerate() {
                *value = source.add(offset).read();
            }
            *acc = L::load_f32(values.as_ptr());
        }
    }
}

#[inline(always)]
pub(super) unsafe fn store_sums<L: Lanes, const T: usize>(
    acc: &[L::Float; T],
    (first, columns): (usize, usize),
    (row, lanes): (usize, Range<usize>),
    out: OutputColumns<'_>,
) {
    if lanes.is_empty() {
        return;
    }
    for (index, acc) in acc.iter().enumerate().take(columns) {
        let target = out.at(first + index, row);
        // SAFETY: rows `row .. row + lanes.len()` are in the output and this thread's.
        unsafe {
            if lanes.len() == L::LANES {
                L::store_f32(target, *acc);
                continue;
            }
            let mut values = [0.0; ROWS];
            L::store_f32(values.as_mut_ptr(), *acc);
            for (offset, value) in values[lanes.clone()].iter().enumerate() {
                target.add(offset).write(*value);
            }
        }
    }
}

/// Pointers to a column's groups: integers, and scales with sums.
pub(super) type Column = (*const i8, *const GroupScale);

#[inline(always)]
unsafe fn sum_blocks<L: Lanes, P: Packed, const T: usize>(
    panel: &Panel<'_>,
    lane: usize,
    x: &[Column; T],
    acc: &mut [L::Float; T],
) {
    let groups = const { P::DTYPE.block_elements() / GROUP };
    for index in 0..panel.blocks {
        let bytes = panel.packed.wrapping_add(index * const { ROWS * P::DTYPE.block_bytes() });
        let block = Block { bytes, lane };
        for group in 0..groups {
            // What the group takes of the stream, in whole cache lines.
            let lines = const {
                (ROWS * P::DTYPE.block_bytes() * GROUP).div_ceil(64 * P::DTYPE.block_elements())
            };
            for line in 0..lines {
                let ahead = PREFETCH_BYTES + 64 * (group * lines + line);
                // SAFETY: a prefetch of any address is harmless.
                unsafe { L::prefetch(bytes.wrapping_add(ahead)) };
            }
            // SAFETY: the block and the group exist.
            unsafe { sum_group::<L, P, T>(block, group, index * groups + group, x, acc) };
        }
    }
}

/// One step of the accumulation for `T` columns; the twin of `scalar::accumulate`.
#[inline(always)]
unsafe fn sum_group<L: Lanes, P: Packed, const T: usize>(
    block: Block,
    group: usize,
    x_group: usize,
    x: &[Column; T],
    acc: &mut [L::Float; T],
) {
    // SAFETY: `group` is one of the block's, and `x_group` one of the column's.
    unsafe {
        let parts = if P::HALVES { 2 } else { 1 };
        for half in 0..parts {
            let mut isum = zero_points::<L, P, T>(half, x_group, x);
            let words = 8 / parts;
            for word in half * words..(half + 1) * words {
                dot_word::<L, P, T>((block, group, word), x_group, x, &mut isum);
            }
            let scale = P::scale::<L>(block, group, half);
            for c in 0..T {
                let scale = L::mul(scale, L::splat_f32((*x[c].1.add(x_group)).scale));
                acc[c] = L::fma(L::to_f32(isum[c]), scale, acc[c]);
            }
        }
        match P::MIN {
            MinKind::None => {}
            MinKind::One => {
                let min = P::min::<L>(block, group);
                for c in 0..T {
                    let sum = (*x[c].1.add(x_group)).scaled_sum;
                    acc[c] = L::fma(min, L::splat_f32(sum), acc[c]);
                }
            }
            MinKind::Pair => {
                let (pair, scale) = P::min_pair::<L>(block, group);
                for c in 0..T {
                    let sums = L::pair_dot(pair, sums::<L>(x[c], x_group));
                    let scale = L::mul(scale, L::splat_f32((*x[c].1.add(x_group)).scale));
                    acc[c] = L::fma(L::to_f32(sums), scale, acc[c]);
                }
            }
        }
    }
}

/// The i16 pair of sums of a group, in every lane.
#[inline(always)]
pub(super) unsafe fn sums<L: Lanes>(x: Column, group: usize) -> L::Int {
    // SAFETY: `group` is one of the column's.
    unsafe { L::splat((&raw const (*x.1.add(group)).sums).cast::<i32>().read_unaligned()) }
}

/// What the sums of a group's activations (as an i16 pair) are multiplied with to start the
/// integer sums: minus the zero point, which makes `Σ q·x` of unsigned quants `Σ (q − zero)·x`.
pub(super) fn zero_pair<L: Lanes, P: Packed>(half: usize) -> i32 {
    let zero = if P::SIGNED { L::SIGNED_EXCESS } else { P::ZERO };
    let pair = match (P::HALVES, half) {
        (false, _) => [-zero, -zero],
        (true, 0) => [-zero, 0],
        (true, _) => [0, -zero],
    };
    i32::from(pair[0] as u16) | i32::from(pair[1]) << 16
}

/// Start of the integer sums of `T` columns.
#[inline(always)]
unsafe fn zero_points<L: Lanes, P: Packed, const T: usize>(
    half: usize,
    group: usize,
    x: &[Column; T],
) -> [L::Int; T] {
    let pair = zero_pair::<L, P>(half);
    // SAFETY: `group` is one of the column's.
    unsafe {
        let mut start = [L::splat(0); T];
        if pair != 0 {
            for c in 0..T {
                start[c] = L::pair_dot(L::splat(pair), sums::<L>(x[c], group));
            }
        }
        start
    }
}

/// Four elements of each row times the same four of each column.
#[inline(always)]
unsafe fn dot_word<L: Lanes, P: Packed, const T: usize>(
    (block, group, word): (Block, usize, usize),
    x_group: usize,
    x: &[Column; T],
    isum: &mut [L::Int; T],
) {
    // SAFETY: group and word exist in the block, `x_group` in the column.
    unsafe {
        let w = P::quants::<L>(block, group, word);
        let signed = L::signed(w);
        for c in 0..T {
            let at = x[c].0.add(x_group * GROUP + 4 * word).cast::<i32>();
            let x = L::splat(at.read_unaligned());
            isum[c] = if P::SIGNED {
                L::dot_signed(isum[c], signed, x)
            } else {
                L::dot_unsigned(isum[c], w, x)
            };
        }
    }
}
