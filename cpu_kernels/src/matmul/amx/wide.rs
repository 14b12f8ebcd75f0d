//! More than 32 columns: weights are decoded once for all of them, into a buffer in the
//! second-level cache, and sums wait in memory between chunks of a row, which costs them nothing.
//!
//! ```text
//! for each 128 rows, for each 512 columns:
//!   for each chunk of 512 elements:
//!     decode 8 × 16 tiles of weights                                    (128 KiB)
//!     for each 32 columns:                       their chunk is 32 KiB
//!       for each 32 rows:  4 sums; for each group 4 loads and 4 products
//!   write the sums                                                      (256 KiB)
//! ```
//! Two loaded tiles of 1 KiB per 32 cycles come from the second-level cache, which delivers twice
//! that, and columns are read once for 128 rows.

use super::super::lanes::Lanes;
use super::super::packed::{Block, Packed};
use super::super::{MatrixView, OutputColumns};
use super::decode::{Largest, decode, decode_any};
use super::narrow::Columns;
use super::unit::{self, Sums, TILE_COLUMNS, Weights};
use super::{Vectors, write_sums};
use crate::activations::{Bf16, Line};
use crate::blocks::GROUP;
use crate::repack::ROWS;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Groups of 32 elements of a chunk.
const CHUNK_GROUPS: usize = 16;
/// Groups of 16 rows that are decoded together.
const HEIGHT: usize = 8;
/// Columns whose sums wait together.
const COLUMNS_MAX: usize = 512;
/// Columns that the registers are configured for.
const BLOCK_COLUMNS: usize = 2 * TILE_COLUMNS;

struct Scratch {
    /// The decoded chunk.
    weights: [[MaybeUninit<Weights>; CHUNK_GROUPS]; HEIGHT],
    sums: [[MaybeUninit<Sums>; HEIGHT]; COLUMNS_MAX / TILE_COLUMNS],
}

/// A chunk of some groups of rows.
#[derive(Clone, Copy)]
struct Chunk {
    /// First packed block, and bytes from one group of rows to the next.
    packed: *const u8,
    apart: usize,
    blocks: usize,
    first_group: usize,
    height: usize,
    /// The chunk that is decoded next: fetched while the first columns are multiplied.
    next: *const u8,
}

/// Rows `rows` of all columns.
///
/// # Safety
/// The CPU has AMX and what [`decode`] needs; shapes were checked by `Kernels::matmul`; `weights`
/// are of type `P`, with 16 rows interleaved.
#[inline(always)]
pub(super) unsafe fn multiply<P: Packed>(
    weights: &MatrixView<'_>,
    x: Bf16<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    let mut scratch = Scratch {
        weights: [[const { MaybeUninit::uninit() }; CHUNK_GROUPS]; HEIGHT],
        sums: [[const { MaybeUninit::uninit() }; HEIGHT]; COLUMNS_MAX / TILE_COLUMNS],
    };
    let mut first_row = rows.start / ROWS * ROWS;
    while first_row < rows.end {
        let height = (rows.end - first_row).div_ceil(ROWS).min(HEIGHT);
        let covered = rows.start.max(first_row)..rows.end.min(first_row + height * ROWS);
        for first in (0..out.columns()).step_by(COLUMNS_MAX) {
            let count = (out.columns() - first).min(COLUMNS_MAX);
            let columns = Columns { x, first, count };
            // SAFETY: our own contract; rows of a group exist in whole, padding included.
            unsafe {
                block::<P>(weights, columns, (first_row, height), &mut scratch);
                for (tile, sums) in scratch.sums.iter().enumerate().take(count.div_ceil(16)) {
                    let start = tile * TILE_COLUMNS;
                    let these = first + start..first + count.min(start + TILE_COLUMNS);
                    for (r, sums) in sums.iter().enumerate().take(height) {
                        let rows = (first_row + r * ROWS, &covered);
                        write_sums(sums.as_ptr(), these.clone(), rows, out);
                    }
                }
            }
        }
        first_row += height * ROWS;
    }
}

/// The sums of some columns and groups of rows.
#[inline(always)]
unsafe fn block<P: Packed>(
    weights: &MatrixView<'_>,
    columns: Columns<'_>,
    (first_row, height): (usize, usize),
    scratch: &mut Scratch,
) {
    let block_groups = const { P::DTYPE.block_elements() / GROUP };
    let apart = ROWS * weights.row_bytes();
    let rows = weights.bytes().as_ptr().wrapping_add(first_row / ROWS * apart);
    let blocks = weights.cols() / P::DTYPE.block_elements();
    for start in (0..blocks).step_by(CHUNK_GROUPS / block_groups) {
        let at = |block: usize| rows.wrapping_add(block * ROWS * P::DTYPE.block_bytes());
        let count = (CHUNK_GROUPS / block_groups).min(blocks - start);
        let is_last = start + count == blocks;
        let chunk = Chunk {
            packed: at(start),
            apart,
            blocks: count,
            first_group: start * block_groups,
            height,
            next: if is_last { rows.wrapping_add(height * apart) } else { at(start + count) },
        };
        // SAFETY: the blocks exist; the rest is our own contract.
        unsafe {
            decode_chunk::<P>(chunk, &mut scratch.weights);
            add_chunk::<P>(chunk, columns, scratch);
        }
    }
}

#[inline(always)]
unsafe fn decode_chunk<P: Packed>(
    chunk: Chunk,
    weights: &mut [[MaybeUninit<Weights>; CHUNK_GROUPS]; HEIGHT],
) {
    let block_groups = const { P::DTYPE.block_elements() / GROUP };
    // SAFETY: the caller's blocks exist, and there is a tile for each of their groups.
    unsafe {
        for (r, weights) in weights.iter_mut().enumerate().take(chunk.height) {
            let rows = chunk.packed.wrapping_add(r * chunk.apart);
            let at = |block: usize| rows.wrapping_add(block * ROWS * P::DTYPE.block_bytes());
            let mut largest = Largest::none();
            for (step, tile) in weights.iter_mut().enumerate().take(chunk.blocks * block_groups) {
                let block = Block { bytes: at(step / block_groups), lane: 0 };
                decode::<P>(block, step % block_groups, tile.as_mut_ptr(), &mut largest);
            }
            if !largest.is_in_range::<P>() {
                for (step, tile) in weights.iter_mut().enumerate().take(chunk.blocks * block_groups)
                {
                    let group = step % block_groups;
                    decode_any(P::DTYPE, at(step / block_groups), group, tile.as_mut_ptr());
                }
            }
        }
    }
}

/// Adds the products of a chunk to the sums.
#[inline(always)]
unsafe fn add_chunk<P: Packed>(chunk: Chunk, columns: Columns<'_>, scratch: &mut Scratch) {
    let groups = chunk.blocks * const { P::DTYPE.block_elements() / GROUP };
    let mut configured = 0;
    for first in (0..columns.count).step_by(BLOCK_COLUMNS) {
        let count = (columns.count - first).min(BLOCK_COLUMNS);
        let x = &columns.x.lines[(columns.first + first) * columns.x.lines_apart..];
        let x = (&raw const x[chunk.first_group], columns.x.lines_apart * size_of::<Line>());
        // SAFETY: registers are configured for columns that exist; the chunk is decoded.
        unsafe {
            if count != configured {
                unit::configure(count);
                configured = count;
            }
            for r in (0..chunk.height).step_by(2) {
                if first == 0 {
                    fetch::<P>(chunk, groups, r);
                }
                let (at, is_first) = ((first / TILE_COLUMNS, r), chunk.first_group == 0);
                match (count > TILE_COLUMNS, r + 1 < chunk.height) {
                    (true, true) => add::<2, 2>(x, groups, at, is_first, scratch),
                    (true, false) => add::<2, 1>(x, groups, at, is_first, scratch),
                    (false, true) => add::<1, 2>(x, groups, at, is_first, scratch),
                    (false, false) => add::<1, 1>(x, groups, at, is_first, scratch),
                }
            }
        }
    }
}

/// Asks for what two groups of rows have in the chunk that is decoded next.
#[inline(always)]
unsafe fn fetch<P: Packed>(chunk: Chunk, groups: usize, row: usize) {
    let bytes = const { ROWS * P::DTYPE.block_bytes() * GROUP / P::DTYPE.block_elements() };
    for row in row..chunk.height.min(row + 2) {
        let rows = chunk.next.wrapping_add(row * chunk.apart);
        for line in (0..groups * bytes).step_by(64) {
            // SAFETY: a prefetch of any address is harmless.
            unsafe { Vectors::prefetch(rows.wrapping_add(line)) };
        }
    }
}

/// `A` tiles of columns times `R` groups of rows.
#[inline(always)]
unsafe fn add<const A: usize, const R: usize>(
    (x, stride): (*const Line, usize),
    groups: usize,
    (tile, row): (usize, usize),
    is_first: bool,
    scratch: &mut Scratch,
) {
    let sums: [[*mut Sums; R]; A] = std::array::from_fn(|a| {
        std::array::from_fn(|r| scratch.sums[tile + a][row + r].as_mut_ptr())
    });
    let weights: [_; R] = std::array::from_fn(|r| scratch.weights[row + r].as_ptr());
    // SAFETY: the caller's registers, columns and weights; sums exist, and were stored before
    // unless this is the first chunk.
    unsafe {
        if is_first {
            unit::clear();
        } else {
            unit::load::<A, R>(sums.map(|sums| sums.map(|sums| sums.cast_const())));
        }
        for group in 0..groups {
            let weights = weights.map(|weights| weights.wrapping_add(group).cast());
            unit::multiply::<A, R>(x.wrapping_add(group), stride, weights);
        }
        unit::store::<A, R>(sums);
    }
}
