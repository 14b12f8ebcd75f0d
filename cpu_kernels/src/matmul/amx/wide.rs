//! More than 32 columns: weights are decoded once for up to 512 of them, into a buffer in the
//! second-level cache, and sums wait in memory between chunks of a row.
//!
//! ```text
//! for each 128 rows, for each 512 columns:
//!   for each chunk of up to 2048 elements, all of about one length:
//!     for each 32 columns:                       their chunk is 128 KiB
//!       for each 32 rows:  4 sums; for each group 4 loads and 4 products
//!         with the last 32 columns: decode the group of the chunk that comes next, in its place
//!         with a call's first 32: decode this chunk, some groups ahead
//! ```
//! So the 8 × 64 tiles of weights (512 KiB) of a chunk are decoded while the tile unit works. What
//! comes next is asked for between its instructions: columns, packed weights, sums, and with the
//! last chunk, whose sums are results, the lines of those.
//!
//! More rows read columns from the shared cache less often, and longer chunks move sums less often;
//! two threads of a core share the 2 MiB of both buffers (docs/performance.md).

use super::super::packed::Packed;
use super::super::{MatrixView, OutputColumns};
use super::Pair;
use super::ahead::Ahead;
use super::square::{Square, decode_rows};
use super::unit::{self, Sums, Weights};
use crate::activations::{Bf16, ColumnTile, Line};
use crate::blocks::GROUP;
use crate::repack::ROWS;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Groups of 32 elements of a chunk, at most.
pub(super) const CHUNK_GROUPS: usize = 64;
/// Groups of 16 rows that are decoded together, at most.
pub(super) const HEIGHT: usize = 8;
/// Tiles of columns whose sums wait together.
pub(super) const TILES_MAX: usize = 32;

pub(super) struct Scratch {
    /// The decoded chunk.
    pub weights: [[MaybeUninit<Weights>; CHUNK_GROUPS]; HEIGHT],
    /// Of each tile of columns and group of rows.
    pub sums: [[MaybeUninit<Sums>; HEIGHT]; TILES_MAX],
    /// Those that are finished.
    pub finished: [[MaybeUninit<Sums>; 2]; 2],
}

/// A chunk of some groups of rows, and the columns that it is multiplied with.
#[derive(Clone, Copy)]
pub(super) struct Chunk<'a> {
    /// First packed block, and bytes from one group of rows to the next.
    pub packed: *const u8,
    pub apart: usize,
    pub groups: usize,
    pub first_group: usize,
    pub height: usize,
    /// Whether its sums are finished.
    pub is_last: bool,
    tiles: Tiles,
    target: Target<'a>,
}

/// The first `count` of these.
#[derive(Clone, Copy)]
struct Tiles {
    tiles: [ColumnTile; TILES_MAX],
    count: usize,
}

/// Where results go.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub out: OutputColumns<'a>,
    /// Column of the first tile.
    pub column: usize,
    /// Row of the first group, and which of the rows are to be written.
    pub row: usize,
    pub covered: (usize, usize),
}

/// All chunks in the order in which they are multiplied.
struct Chunks<'a> {
    weights: &'a MatrixView<'a>,
    x: Bf16<'a>,
    rows: Range<usize>,
    out: OutputColumns<'a>,
    /// Groups of a chunk that is not the last of its rows, and of one of their blocks.
    groups: usize,
    block_groups: usize,
    /// What comes next: the first row, the groups of rows from there on that are decoded together,
    /// the first column, and the first group of elements.
    row: usize,
    height: usize,
    column: usize,
    group: usize,
}

impl<'a> Chunks<'a> {
    fn new<P: Packed>(
        weights: &'a MatrixView<'a>,
        x: Bf16<'a>,
        rows: Range<usize>,
        out: OutputColumns<'a>,
    ) -> Chunks<'a> {
        let block_groups = const { P::DTYPE.block_elements() / GROUP };
        let blocks = weights.cols() / P::DTYPE.block_elements();
        let chunks = blocks.div_ceil(CHUNK_GROUPS / block_groups);
        let groups = blocks.div_ceil(chunks) * block_groups;
        let row = rows.start / ROWS * ROWS;
        let (height, column, group) = (height(row, rows.end), 0, 0);
        Chunks { weights, x, rows, out, groups, block_groups, row, height, column, group }
    }
}

/// Groups of rows from `row` to `end` that are decoded together: all of them in parts of the same
/// height, each of them even.
fn height(row: usize, end: usize) -> usize {
    let left = end.saturating_sub(row).div_ceil(ROWS);
    left.div_ceil(left.div_ceil(HEIGHT).max(1)).next_multiple_of(2).min(left)
}

impl<'a> Iterator for Chunks<'a> {
    type Item = Chunk<'a>;

    fn next(&mut self) -> Option<Chunk<'a>> {
        if self.row >= self.rows.end {
            return None;
        }
        let all = self.weights.cols() / GROUP;
        let apart = ROWS * self.weights.row_bytes();
        let before = self.group / self.block_groups * (apart / (all / self.block_groups));
        let first = self.row / ROWS * apart + before;
        let groups = self.groups.min(all - self.group);
        let end = self.row + self.height * ROWS;
        let chunk = Chunk {
            packed: self.weights.bytes().as_ptr().wrapping_add(first),
            apart,
            groups,
            first_group: self.group,
            height: self.height,
            is_last: self.group + groups == all,
            tiles: Tiles::new(&self.x, self.column, self.out.columns()),
            target: Target {
                out: self.out,
                column: self.column,
                row: self.row,
                covered: (self.rows.start.max(self.row), self.rows.end.min(end)),
            },
        };
        self.group += groups;
        if chunk.is_last {
            self.group = 0;
            self.column += chunk.tiles.columns();
        }
        if self.column == self.out.columns() {
            (self.column, self.row) = (0, end);
            self.height = height(end, self.rows.end);
        }
        Some(chunk)
    }
}

impl Tiles {
    /// Columns from `first` on, none of them beyond column `end`.
    fn new(x: &Bf16<'_>, first: usize, end: usize) -> Tiles {
        let mut tiles = Tiles { tiles: [x.tile(first, end - first); TILES_MAX], count: 0 };
        let mut column = first;
        while tiles.count < TILES_MAX && column < end {
            tiles.tiles[tiles.count] = x.tile(column, end - column);
            column += tiles.tiles[tiles.count].columns;
            tiles.count += 1;
        }
        tiles
    }

    fn as_slice(&self) -> &[ColumnTile] {
        &self.tiles[..self.count]
    }

    fn columns(&self) -> usize {
        self.as_slice().iter().map(|tile| tile.columns).sum()
    }

    /// Where two of them from `first` on begin in a chunk; one is named twice.
    fn lines(&self, first: usize, group: usize) -> [*const Line; 2] {
        let last = self.count - 1;
        [first, first + 1].map(|index| {
            let tile = self.tiles[index.min(last)];
            tile.lines.wrapping_add(group * tile.apart)
        })
    }
}

/// Rows `rows` of all columns.
///
/// # Safety
/// The CPU has AMX and what `decode` needs; shapes were checked by `Kernels::matmul`; `weights`
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
    let mut chunks = Chunks::new::<P>(weights, x, rows, out);
    let mut next = chunks.next();
    // SAFETY: our own contract; rows of a group exist in whole, padding included.
    unsafe {
        // A call's first chunk is decoded by the first of its squares, if others decode the second.
        let mut is_packed = next.is_some_and(|first| first.tiles.count > 2);
        if let Some(first) = &next {
            let decoded = if is_packed { first.height / 2 * 2 } else { 0 };
            decode_rows::<P>(first, decoded..first.height, &mut scratch.weights);
        }
        while let Some(chunk) = next {
            next = chunks.next();
            add_chunk::<P>(&chunk, next.as_ref(), is_packed, &mut scratch);
            is_packed = false;
        }
    }
}

/// Adds the products of a chunk to the sums, and decodes the next one; this one, too, if pairs of
/// its groups of rows are packed still, which the first chunk of a row with more than two tiles of
/// columns may be.
///
/// # Safety
/// As [`multiply`]; the chunk is decoded otherwise, and the sums are those of the chunk before.
#[inline(always)]
unsafe fn add_chunk<P: Packed>(
    chunk: &Chunk<'_>,
    next: Option<&Chunk<'_>>,
    is_packed: bool,
    scratch: &mut Scratch,
) {
    let tiles = chunk.tiles.as_slice();
    let passes = tiles.len().div_ceil(2);
    let mut configured = [0; 2];
    let mut target = chunk.target;
    for (index, pair) in tiles.chunks(2).enumerate() {
        let columns = match next {
            Some(next) if index + 1 == passes => next.tiles.lines(0, next.first_group),
            _ => chunk.tiles.lines(2 * index + 2, chunk.first_group),
        };
        let pair = match *pair {
            [first, second] => Pair::Two([first, second]),
            _ => Pair::One(pair[0]),
        };
        // SAFETY: registers are configured for columns that exist; the rest is our own contract.
        unsafe {
            if pair.columns() != configured {
                configured = pair.columns();
                unit::configure(configured);
            }
            for row in (0..chunk.height).step_by(2) {
                let packed = next.filter(|next| index + 2 == passes && row < next.height);
                let ahead = Ahead::new::<P>(chunk, (row, columns), packed);
                let next = next.filter(|_| index + 1 == passes);
                let is_packed = is_packed && index == 0;
                let tile = 2 * index;
                let square = Square { chunk, next, is_packed, tile, row, target, ahead };
                match (pair, row + 1 < chunk.height) {
                    (Pair::Two(tiles), true) => square.add::<P, 2, 2>(tiles, scratch),
                    (Pair::Two(tiles), false) => square.add::<P, 2, 1>(tiles, scratch),
                    (Pair::One(tile), true) => square.add::<P, 1, 2>([tile], scratch),
                    (Pair::One(tile), false) => square.add::<P, 1, 1>([tile], scratch),
                }
            }
        }
        target.column += pair.columns().iter().sum::<usize>();
    }
    if let Some(next) = next {
        // SAFETY: the next chunk's blocks exist.
        unsafe { decode_rows::<P>(next, chunk.height..next.height, &mut scratch.weights) };
    }
}
