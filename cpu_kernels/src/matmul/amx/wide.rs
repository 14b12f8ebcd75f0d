//! More than 32 columns: weights are decoded once for up to 512 of them, into a buffer in the
//! second-level cache, and sums wait in memory between chunks of a row.
//!
//! ```text
//! for each 256 rows, for each 512 columns:
//!   for each chunk of 1024 elements:
//!     decode 16 × 32 tiles of weights                                   (512 KiB)
//!     for each 32 columns:                       their chunk is 64 KiB
//!       for each 32 rows:  4 sums; for each group 4 loads and 4 products
//! ```
//! The last chunk writes its sums as results. Meanwhile the sums, or the lines of the results, that
//! come next are asked for, and the columns that come next, a few lines with each group.
//!
//! More rows read columns from the shared cache less often, and longer chunks move sums less often:
//! with 16 threads the product of 16,384 × 4,096 weights with 512 columns took 20 % longer for 128
//! rows or for 256 elements, or both, than for 256 rows and 512 elements; 1024 elements then took
//! 4 % from the products of a whole prompt.

use super::super::lanes::Lanes;
use super::super::packed::{self, Packed};
use super::super::{MatrixView, OutputColumns};
use super::decode::{Largest, decode, decode_any};
use super::unit::{self, Sums, Weights};
use super::{Pair, Vectors, write_sums};
use crate::activations::{Bf16, ColumnTile, Line, TILE_COLUMNS};
use crate::blocks::GROUP;
use crate::repack::ROWS;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Groups of 32 elements of a chunk.
const CHUNK_GROUPS: usize = 32;
/// Groups of 16 rows that are decoded together, at most.
const HEIGHT: usize = 16;
/// Tiles of columns whose sums wait together.
const TILES_MAX: usize = 32;

struct Scratch {
    /// The decoded chunk.
    weights: [[MaybeUninit<Weights>; CHUNK_GROUPS]; HEIGHT],
    /// Of each tile of columns and group of rows.
    sums: [[MaybeUninit<Sums>; HEIGHT]; TILES_MAX],
    /// Those that are finished.
    finished: [[MaybeUninit<Sums>; 2]; 2],
}

/// A chunk of some groups of rows.
#[derive(Clone, Copy)]
struct Chunk {
    /// First packed block, and bytes from one group of rows to the next.
    packed: *const u8,
    apart: usize,
    groups: usize,
    first_group: usize,
    height: usize,
    /// The chunk that is decoded next: fetched while the first columns are multiplied.
    next: *const u8,
    /// Whether its sums are finished.
    is_last: bool,
}

/// Where results go.
#[derive(Clone, Copy)]
struct Target<'a> {
    out: OutputColumns<'a>,
    /// Column of the first tile.
    column: usize,
    /// Row of the first group, and which of the rows are to be written.
    row: usize,
    covered: (usize, usize),
}

/// Sums of two tiles of columns and two groups of rows, or of one.
#[derive(Clone, Copy)]
struct Square<'a> {
    /// Which of the tiles and groups is the first.
    tile: usize,
    row: usize,
    /// From that tile on.
    target: Target<'a>,
    /// The chunk of the columns that are multiplied next.
    ahead: [*const Line; 2],
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
        sums: [[const { MaybeUninit::uninit() }; HEIGHT]; TILES_MAX],
        finished: [[const { MaybeUninit::uninit() }; 2]; 2],
    };
    let mut first_row = rows.start / ROWS * ROWS;
    while first_row < rows.end {
        // What is left in parts of the same height, each of them even.
        let left = (rows.end - first_row).div_ceil(ROWS);
        let height = left.div_ceil(left.div_ceil(HEIGHT)).next_multiple_of(2).min(left);
        let covered = rows.start.max(first_row)..rows.end.min(first_row + height * ROWS);
        let mut first = 0;
        while first < out.columns() {
            let mut tiles = [x.tile(first, out.columns() - first); TILES_MAX];
            let mut columns = first;
            let mut count = 0;
            while count < TILES_MAX && columns < out.columns() {
                tiles[count] = x.tile(columns, out.columns() - columns);
                columns += tiles[count].columns;
                count += 1;
            }
            let covered = (covered.start, covered.end);
            let target = Target { out, column: first, row: first_row, covered };
            // SAFETY: our own contract; rows of a group exist in whole, padding included.
            unsafe { block::<P>(weights, &tiles[..count], (height, target), &mut scratch) }
            first = columns;
        }
        first_row += height * ROWS;
    }
}

/// The products of some columns and `height` groups of rows.
#[inline(always)]
unsafe fn block<P: Packed>(
    weights: &MatrixView<'_>,
    tiles: &[ColumnTile],
    (height, target): (usize, Target<'_>),
    scratch: &mut Scratch,
) {
    let block_groups = const { P::DTYPE.block_elements() / GROUP };
    let apart = ROWS * weights.row_bytes();
    let rows = weights.bytes().as_ptr().wrapping_add(target.row / ROWS * apart);
    let blocks = weights.cols() / P::DTYPE.block_elements();
    for start in (0..blocks).step_by(CHUNK_GROUPS / block_groups) {
        let at = |block: usize| rows.wrapping_add(block * ROWS * P::DTYPE.block_bytes());
        let count = (CHUNK_GROUPS / block_groups).min(blocks - start);
        let is_last = start + count == blocks;
        let chunk = Chunk {
            packed: at(start),
            apart,
            groups: count * block_groups,
            first_group: start * block_groups,
            height,
            next: if is_last { rows.wrapping_add(height * apart) } else { at(start + count) },
            is_last,
        };
        // SAFETY: the blocks exist; the rest is our own contract.
        unsafe {
            decode_chunk::<P>(chunk, &mut scratch.weights);
            add_chunk::<P>(chunk, tiles, target, scratch);
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
            for (step, tile) in weights.iter_mut().enumerate().take(chunk.groups) {
                let bytes = at(step / block_groups);
                let block = packed::Block { bytes, lane: 0, six_bits: std::ptr::null() };
                let (group, tile) = (step % block_groups, tile.as_mut_ptr());
                decode::<P>(block, group, tile, &mut largest, |_| {});
            }
            if !largest.is_in_range::<P>() {
                for (step, tile) in weights.iter_mut().enumerate().take(chunk.groups) {
                    let group = step % block_groups;
                    decode_any(P::DTYPE, at(step / block_groups), group, tile.as_mut_ptr());
                }
            }
        }
    }
}

/// Adds the products of a chunk to the sums.
#[inline(always)]
unsafe fn add_chunk<P: Packed>(
    chunk: Chunk,
    tiles: &[ColumnTile],
    mut target: Target<'_>,
    scratch: &mut Scratch,
) {
    let mut configured = [0; 2];
    for (index, pair) in tiles.chunks(2).enumerate() {
        let (next, group) = match tiles[2 * index..].get(2..) {
            Some(next) if !next.is_empty() => (next, chunk.first_group),
            _ => (tiles, chunk.first_group + chunk.groups),
        };
        let ahead = [next[0], next[next.len().min(2) - 1]];
        let ahead = ahead.map(|tile| tile.lines.wrapping_add(group * tile.apart));
        let pair = match *pair {
            [first, second] => Pair::Two([first, second]),
            _ => Pair::One(pair[0]),
        };
        // SAFETY: registers are configured for columns that exist; the chunk is decoded.
        unsafe {
            if pair.columns() != configured {
                configured = pair.columns();
                unit::configure(configured);
            }
            for row in (0..chunk.height).step_by(2) {
                if index == 0 {
                    fetch::<P>(chunk, row);
                }
                let square = Square { tile: 2 * index, row, target, ahead };
                match (pair, row + 1 < chunk.height) {
                    (Pair::Two(tiles), true) => add::<2, 2>(tiles, chunk, square, scratch),
                    (Pair::Two(tiles), false) => add::<2, 1>(tiles, chunk, square, scratch),
                    (Pair::One(tile), true) => add::<1, 2>([tile], chunk, square, scratch),
                    (Pair::One(tile), false) => add::<1, 1>([tile], chunk, square, scratch),
                }
            }
        }
        target.column += pair.columns().iter().sum::<usize>();
    }
}

/// Asks for what two groups of rows have in the chunk that is decoded next.
#[inline(always)]
unsafe fn fetch<P: Packed>(chunk: Chunk, row: usize) {
    let bytes = const { ROWS * P::DTYPE.block_bytes() * GROUP / P::DTYPE.block_elements() };
    for row in row..chunk.height.min(row + 2) {
        let rows = chunk.next.wrapping_add(row * chunk.apart);
        for line in (0..chunk.groups * bytes).step_by(64) {
            // SAFETY: a prefetch of any address is harmless.
            unsafe { Vectors::prefetch(rows.wrapping_add(line)) };
        }
    }
}

/// `A` tiles of columns times `R` groups of rows.
#[inline(always)]
unsafe fn add<const A: usize, const R: usize>(
    tiles: [ColumnTile; A],
    chunk: Chunk,
    square: Square<'_>,
    scratch: &mut Scratch,
) {
    let Square { tile, row, target, .. } = square;
    let sums: [[*mut Sums; R]; A] = std::array::from_fn(|a| {
        std::array::from_fn(|r| scratch.sums[tile + a][row + r].as_mut_ptr())
    });
    let weights: [_; R] = std::array::from_fn(|r| scratch.weights[row + r].as_ptr());
    // SAFETY: the caller's registers, columns and weights; sums exist, and were stored before
    // unless this is the first chunk; the covered rows of the columns are this thread's.
    unsafe {
        if chunk.first_group == 0 {
            unit::clear();
        } else {
            unit::load::<A, R>(sums.map(|sums| sums.map(|sums| sums.cast_const())));
        }
        for group in 0..chunk.groups {
            let x =
                tiles.map(|tile| tile.lines.wrapping_add((chunk.first_group + group) * tile.apart));
            let weights = weights.map(|weights| weights.wrapping_add(group).cast());
            unit::multiply_in_turn::<A, R>(x, weights);
            fetch_ahead(chunk, &square, group, &scratch.sums);
        }
        if !chunk.is_last {
            return unit::store::<A, R>(sums);
        }
        let finished: [[*mut Sums; R]; A] =
            std::array::from_fn(|a| std::array::from_fn(|r| scratch.finished[a][r].as_mut_ptr()));
        unit::store::<A, R>(finished);
        let (mut first, covered) = (target.column, target.covered.0..target.covered.1);
        for (tile, finished) in tiles.iter().zip(finished) {
            let columns = first..first + tile.columns;
            first = columns.end;
            for (r, sums) in finished.into_iter().enumerate() {
                let base = target.row + (row + r) * ROWS;
                write_sums(sums, columns.clone(), (base, &covered), target.out);
            }
        }
    }
}

/// Asks for a few lines after group `group` of a block: of the sums of the block that follows, or,
/// if sums are finished, of this one's results, and of the columns that come next. A whole chunk of
/// 16 groups of 16 rows asks for all of them, a smaller one for the first.
#[inline(always)]
unsafe fn fetch_ahead(
    chunk: Chunk,
    square: &Square<'_>,
    group: usize,
    sums: &[[MaybeUninit<Sums>; HEIGHT]; TILES_MAX],
) {
    const LINES: usize = 4 * TILE_COLUMNS / CHUNK_GROUPS;
    let Square { tile, row, target, ahead } = *square;
    let (tile, next_row) = if row + 2 < chunk.height { (tile, row + 2) } else { (tile + 2, 0) };
    for index in LINES * group..LINES * (group + 1) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe {
            if chunk.is_last {
                let (column, r) = (target.column + index / 2, index % 2);
                if column < target.out.columns() {
                    let base = target.row + (row + r) * ROWS;
                    let at = target.out.at(column, target.covered.0).wrapping_add(base);
                    Vectors::prefetch(at.wrapping_sub(target.covered.0).cast());
                }
            } else {
                let (a, line) = (index / (2 * TILE_COLUMNS), index % (2 * TILE_COLUMNS));
                let first = sums.as_ptr().wrapping_add(tile + a).cast::<Sums>();
                Vectors::prefetch(
                    first.wrapping_add(next_row).cast::<u8>().wrapping_add(64 * line),
                );
            }
        }
    }
    const COLUMN_LINES: usize = 4 * TILE_COLUMNS / HEIGHT;
    let lines = chunk.groups * TILE_COLUMNS;
    let first = COLUMN_LINES * (row / 2 * chunk.groups + group);
    for index in first..first + COLUMN_LINES {
        let at = if index < lines {
            ahead[0].wrapping_add(index)
        } else {
            ahead[1].wrapping_add(index - lines)
        };
        // SAFETY: as above.
        unsafe { Vectors::prefetch_second(at.cast()) }
    }
}
