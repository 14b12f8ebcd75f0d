//! The quantised kernel: 16 interleaved rows against tiles of columns.
//!
//! ```text
//! for each R groups of 16 rows:
//!   for each tile of T columns:                 weights come from DRAM once, then from L1/L2
//!     for each group of 32 elements:
//!       for each of 8 words (4 elements):
//!         w[r] = decode(word of 16 rows)        R vectors, used for all T columns
//!         for each column c:  isum[r][c] += w[r] · broadcast(x[c].word)
//!       acc[r][c] = fma(isum[r][c], scale[r] · x[c].scale, acc[r][c]), then offsets
//! ```
//! With R = 1 and T = 8 a word takes 9 loads for 8 products, more than two loads a cycle can feed;
//! R = 2 halves the broadcasts. The 16 accumulators then go through memory, which is idle. It does
//! not pay where halves of groups have scales, which keep more registers busy.
//!
//! A lane does exactly what `scalar.rs` does for its row. Row-major weights are interleaved chunk
//! by chunk into a buffer on the stack first; their sums wait in the output between chunks.

use super::columns::Column;
use super::fetch::{Ahead, ByGroups, InRuns, Never, blocks_ahead, fetch_group, fetch_run};
use super::group_sums::{for_each_group, keep_order, sum_group, sum_together};
use super::lanes::Lanes;
use super::packed::{Block, Packed, SixBits};
use super::sums::{load_sums, row_lanes, store_sums};
use super::{Layout, MatrixView, OutputColumns, wide};
use crate::activations::{Activations, Quantized};
use crate::blocks::GROUP;
use crate::isa::follows_streams;
use crate::repack::{ROWS, block_of_rows, pack_block};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Elements per row of a chunk of row-major weights.
pub(super) const CHUNK_ELEMENTS: usize = 1024;
/// Bytes of 16 rows of a chunk in the largest type, `Q8_0` with 34 bytes per 32 elements.
pub(super) const CHUNK_BYTES: usize = ROWS * CHUNK_ELEMENTS / 32 * 34;

/// Which weights one column asks for ahead of their use; several columns ask for all.
#[derive(Clone, Copy)]
enum Wanted {
    /// None, of several columns neither: they have just been written.
    Nothing,
    /// Those that hardware does not fetch.
    Apart,
    All,
}

/// Runs of packed blocks of 16 rows, and the activations that meet them.
#[derive(Clone, Copy)]
struct Panel<'a, const R: usize> {
    /// First packed block of each group of rows.
    packed: [*const u8; R],
    /// Packed blocks along the columns.
    blocks: usize,
    /// First group of 32 elements within the row.
    group: usize,
    wanted: Wanted,
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
    let wanted = if follows_streams() { Wanted::Apart } else { Wanted::All };
    let mut first_row = rows.start / ROWS * ROWS;
    if weights.layout() == Layout::Rows16 && blocks > 0 {
        let group_bytes = ROWS * row_bytes;
        let at = |row: usize| weights.bytes()[row / ROWS * group_bytes..][..group_bytes].as_ptr();
        while first_row < rows.end {
            let pair =
                L::TILE == 8 && !P::HALVES && out.columns() > 4 && first_row + ROWS < rows.end;
            let height = if pair { 2 * ROWS } else { ROWS };
            let covered = rows.start.max(first_row)..rows.end.min(first_row + height);
            // SAFETY: the rows of a group exist in whole, padding included.
            unsafe {
                if pair {
                    let packed = [at(first_row), at(first_row + ROWS)];
                    let panel = Panel { packed, blocks, group: 0, wanted, x };
                    multiply_panel::<L, P, 2>(&panel, covered, out);
                } else {
                    let packed = [at(first_row)];
                    let panel = Panel { packed, blocks, group: 0, wanted, x };
                    multiply_panel::<L, P, 1>(&panel, covered, out);
                }
            }
            first_row += height;
        }
        return;
    }
    let chunk = CHUNK_ELEMENTS / elements;
    let mut scratch = [0; CHUNK_BYTES];
    while first_row < rows.end {
        let covered = rows.start.max(first_row)..rows.end.min(first_row + ROWS);
        let source = &weights.bytes()[first_row * row_bytes..];
        let source = &source[..source.len().min(ROWS * row_bytes)];
        let mut block = 0;
        while block < blocks.max(1) {
            let count = chunk.min(blocks - block);
            pack_chunk::<P>(source, row_bytes, block..block + count, &mut scratch);
            let (packed, group) = ([scratch.as_ptr()], block * (elements / GROUP));
            let panel = Panel { packed, blocks: count, group, wanted: Wanted::Nothing, x };
            // SAFETY: `packed` holds `count` packed blocks; the rest is our own contract.
            unsafe { multiply_panel::<L, P, 1>(&panel, covered.clone(), out) };
            block += chunk;
        }
        first_row += ROWS;
    }
}

pub(super) fn pack_chunk<P: Packed>(
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
unsafe fn multiply_panel<L: Lanes, P: Packed, const R: usize>(
    panel: &Panel<'_, R>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    let mut column = 0;
    while column < out.columns() {
        let left = out.columns() - column;
        // SAFETY: our own contract, passed on; tiles start at an existing column.
        unsafe {
            column += match left {
                1 => multiply_tile::<L, P, R, 1>(panel, column, &rows, out),
                5.. if L::TILE == 8 => multiply_tile::<L, P, R, 8>(panel, column, &rows, out),
                _ => multiply_tile::<L, P, R, 4>(panel, column, &rows, out),
            };
        }
    }
}

/// Up to `T` columns from `first`: past the last one a tile repeats it and drops the results.
/// Returns how many columns it did.
#[inline(always)]
unsafe fn multiply_tile<L: Lanes, P: Packed, const R: usize, const T: usize>(
    panel: &Panel<'_, R>,
    first: usize,
    rows: &Range<usize>,
    out: OutputColumns<'_>,
) -> usize {
    let columns = T.min(out.columns() - first);
    let mut x = [Column::NONE; T];
    for (index, x) in x.iter_mut().enumerate() {
        *x = Column::new(&panel.x, first + index.min(columns - 1), panel.group);
    }
    let mut lane = 0;
    while lane < ROWS {
        // SAFETY: `x` points to the groups of existing columns; the rest is our own contract.
        unsafe {
            let mut acc = [[L::splat_f32(0.0); T]; R];
            let base = rows.start / ROWS * ROWS + lane;
            let lanes = |r: usize| row_lanes::<L>(rows, base + r * ROWS);
            if panel.group > 0 {
                for (r, acc) in acc.iter_mut().enumerate() {
                    load_sums::<L, T>(acc, (first, columns), lanes(r), out);
                }
            }
            match panel.wanted {
                Wanted::Apart if T == 1 && P::IN_RUNS => {
                    sum_blocks::<L, P, R, T, InRuns>(panel, lane, &x, &mut acc);
                }
                Wanted::Apart if T == 1 && !P::APART => {
                    sum_blocks::<L, P, R, T, Never>(panel, lane, &x, &mut acc);
                }
                Wanted::Nothing => sum_blocks::<L, P, R, T, Never>(panel, lane, &x, &mut acc),
                _ => sum_blocks::<L, P, R, T, ByGroups>(panel, lane, &x, &mut acc),
            }
            for (r, acc) in acc.iter().enumerate() {
                store_sums::<L, T>(acc, (first, columns), lanes(r), out);
            }
        }
        lane += L::LANES;
    }
    columns
}

#[inline(always)]
unsafe fn sum_blocks<L: Lanes, P: Packed, const R: usize, const T: usize, A: Ahead>(
    panel: &Panel<'_, R>,
    lane: usize,
    x: &[Column; T],
    acc: &mut [[L::Float; T]; R],
) {
    let groups = const { P::DTYPE.block_elements() / GROUP };
    let block_bytes = const { ROWS * P::DTYPE.block_bytes() };
    // The block that is fetched: of these rows or, further on, of those that follow them.
    let ahead = const { blocks_ahead::<P, T>() };
    let (mut fetched, mut rows_on) = (ahead % panel.blocks.max(1), ahead / panel.blocks.max(1));
    for index in 0..panel.blocks {
        let mut six_bits = [const { MaybeUninit::uninit() }; R];
        let mut blocks = [Block { bytes: std::ptr::null(), lane, six_bits: std::ptr::null() }; R];
        for ((block, packed), six_bits) in blocks.iter_mut().zip(panel.packed).zip(&mut six_bits) {
            block.bytes = packed.wrapping_add(index * block_bytes);
            if P::SIX_BITS {
                // SAFETY: the block exists, of a type with 6-bit integers.
                unsafe { SixBits::unpack(block.bytes, six_bits) };
                block.six_bits = six_bits.as_ptr();
            }
        }
        let fetch = (rows_on * R * panel.blocks + fetched) * block_bytes;
        fetched += 1;
        if fetched == panel.blocks {
            (fetched, rows_on) = (0, rows_on + 1);
        }
        let fetched = panel.packed.map(|packed| packed.wrapping_add(fetch));
        let turns = const { turns::<P, T>() };
        for first in 0..groups / turns {
            let (first, at) = (turns * first, index * groups);
            // SAFETY: the blocks exist, and the groups below their number.
            unsafe {
                if const { A::BY_GROUPS } {
                    for_each_group!(turns, |turn| {
                        fetch_group::<L, P, R, T>(fetched, first + turn);
                    });
                } else if const { A::IN_RUNS } {
                    let group_bytes = block_bytes / groups;
                    for fetched in fetched {
                        let from = fetched.wrapping_add(first * group_bytes);
                        fetch_run(from, turns * group_bytes);
                    }
                }
                sum_groups::<L, P, R, T>(&blocks, first, at + first, x, acc);
            }
        }
    }
}

/// [`turns`] groups from `first` on.
#[inline(always)]
unsafe fn sum_groups<L: Lanes, P: Packed, const R: usize, const T: usize>(
    blocks: &[Block; R],
    first: usize,
    x_first: usize,
    x: &[Column; T],
    acc: &mut [[L::Float; T]; R],
) {
    let turns = const { turns::<P, T>() };
    // SAFETY: passed on.
    unsafe {
        keep_order::<P>();
        match turns {
            4 if T == 1 => return sum_together::<L, P, R, T, 4>(blocks, first, x_first, x, acc),
            2 if T == 1 => return sum_together::<L, P, R, T, 2>(blocks, first, x_first, x, acc),
            _ => {}
        }
        for_each_group!(turns, |turn| {
            sum_group::<L, P, R, T>(blocks, first + turn, x_first + turn, x, acc);
            keep_order::<P>()
        });
    }
}

/// How many groups of a block follow each other with what differs between them known at compile
/// time: two where they are the halves of the same bytes, four of one column where they are
/// quarters. More columns then have more code than the compiler keeps in order.
const fn turns<P: Packed, const T: usize>() -> usize {
    if P::SIX_BITS {
        2
    } else if T == 1 && P::HALVES {
        4
    } else {
        1
    }
}
