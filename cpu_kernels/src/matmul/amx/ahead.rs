//! What the inner loop of `wide.rs` asks for before it is needed. A prefetch of any address is
//! harmless.

use super::super::lanes::Lanes;
use super::super::packed::Packed;
use super::Vectors;
use super::unit::{self, Sums};
use super::wide::{Chunk, HEIGHT, Target};
use crate::activations::{Line, TILE_COLUMNS};
use crate::blocks::GROUP;
use crate::repack::ROWS;
use std::mem::MaybeUninit;

/// Lines of two tiles of columns.
const PAIR_LINES: usize = 2 * TILE_COLUMNS;
/// Lines of the sums of a square.
const SUMS_LINES: usize = 4 * TILE_COLUMNS;
/// Groups before a square's end at which its last lines are asked for that are needed then: what
/// is asked for earlier into the first-level cache would be gone.
pub(super) const LAST_GROUPS: usize = 8;

/// What a square asks for, a part of it with each group.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Where the tiles of columns begin that come next, lines of each, and which of these lines are
    /// this square's.
    columns: [*const Line; 2],
    lines: usize,
    first: usize,
    /// Lines after each instruction of the unit.
    count: usize,
    /// Packed weights of two groups of rows in the chunk that comes next, and bytes of a group of
    /// elements.
    packed: Option<[*const u8; 2]>,
    bytes: usize,
}

impl Ahead {
    /// For groups of rows `row` and `row + 1` of a chunk, and of the packed one that comes next.
    pub fn new<P: Packed>(
        chunk: &Chunk<'_>,
        (row, columns): (usize, [*const Line; 2]),
        packed: Option<&Chunk<'_>>,
    ) -> Ahead {
        let count = PAIR_LINES.div_ceil(unit::INSTRUCTIONS * chunk.height.div_ceil(2));
        let group = |next: &Chunk<'_>, r: usize| next.packed.wrapping_add(r * next.apart);
        Ahead {
            columns,
            lines: chunk.groups * TILE_COLUMNS,
            first: row / 2 * chunk.groups * count * unit::INSTRUCTIONS,
            count,
            packed: packed.map(|next| [group(next, row), group(next, row + 1)]),
            bytes: const { ROWS * P::DTYPE.block_bytes() * GROUP / P::DTYPE.block_elements() },
        }
    }

    /// The columns' lines of a group.
    #[inline(always)]
    pub fn columns(&self, group: usize) -> *const Line {
        let first = self.first + group * self.count * unit::INSTRUCTIONS;
        if first < self.lines {
            self.columns[0].wrapping_add(first)
        } else {
            self.columns[1].wrapping_add(first - self.lines)
        }
    }

    /// Asks for the part of an instruction of the lines that [`Ahead::columns`] has given.
    #[inline(always)]
    pub fn fetch_columns(&self, lines: *const Line, instruction: usize) {
        for line in 0..self.count {
            let at = lines.wrapping_add(instruction * self.count + line);
            // SAFETY: harmless; the caller of all this has the instruction.
            unsafe { Vectors::prefetch_second(at.cast()) };
        }
    }

    /// Asks for a group's lines from line `first` on.
    #[inline(always)]
    pub fn fetch_columns_from(&self, lines: *const Line, first: usize) {
        for line in first..self.count * unit::INSTRUCTIONS {
            // SAFETY: as above.
            unsafe { Vectors::prefetch_second(lines.wrapping_add(line).cast()) };
        }
    }

    #[inline(always)]
    pub fn fetch_packed(&self, group: usize) {
        for rows in self.packed.into_iter().flatten() {
            for at in (0..self.bytes).step_by(64) {
                // SAFETY: as above.
                unsafe { Vectors::prefetch_second(rows.wrapping_add(group * self.bytes + at)) };
            }
        }
    }
}

/// The lines that a square's end needs, or the beginning of the one that follows: its results if
/// the sums of its chunk are finished, else the next one's sums.
#[derive(Clone, Copy)]
pub(super) struct EndLines {
    at: [*const u8; 2],
    /// Bytes from a line of either to the next.
    apart: usize,
    /// Lines of each.
    count: usize,
}

impl EndLines {
    /// Of the square that begins with the group of rows `row` and tile `tile`.
    #[inline(always)]
    pub fn new(
        chunk: &Chunk<'_>,
        target: &Target<'_>,
        (tile, row): (usize, usize),
        sums: &[[MaybeUninit<Sums>; HEIGHT]],
    ) -> EndLines {
        if chunk.is_last {
            let Target { out, column, row: base, covered } = *target;
            let at = |column: usize| -> *const u8 { out.at(column, covered.0).cast() };
            let first = (base + row * ROWS).wrapping_sub(covered.0);
            let lines = at(column).wrapping_add(first.wrapping_mul(size_of::<f32>()));
            let second = lines.wrapping_add(ROWS * size_of::<f32>());
            let left = out.columns() - column;
            let apart = if left > 1 { at(column + 1).addr() - at(column).addr() } else { 0 };
            return EndLines { at: [lines, second], apart, count: left.min(SUMS_LINES / 2) };
        }
        let is_below = row + 2 < chunk.height;
        let (tile, row) = if is_below { (tile, row + 2) } else { (tile + 2, 0) };
        let of_tile = |tile: usize| {
            let sums = sums.as_ptr().wrapping_add(tile).cast::<Sums>();
            sums.wrapping_add(row).cast::<u8>()
        };
        EndLines { at: [of_tile(tile), of_tile(tile + 1)], apart: 64, count: SUMS_LINES / 2 }
    }

    /// Asks for part `index` of them, of [`LAST_GROUPS`].
    #[inline(always)]
    pub fn fetch(&self, index: usize) {
        const PART: usize = SUMS_LINES / 2 / LAST_GROUPS;
        for line in (index * PART..(index + 1) * PART).take_while(|line| *line < self.count) {
            for at in self.at {
                // SAFETY: harmless; the caller has the instruction.
                unsafe { Vectors::prefetch(at.wrapping_add(line * self.apart)) };
            }
        }
    }
}
