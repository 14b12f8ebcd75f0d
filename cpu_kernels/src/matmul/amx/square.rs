//! The inner loop of `wide.rs`: a square of two tiles of columns and two groups of rows, or of one
//! of either, through a chunk.

use super::super::lanes::Lanes;
use super::super::packed::{self, Packed};
use super::decode::{Largest, STEPS, decode, decode_any};
use super::unit::{self, Sums, Weights};
use super::wide::{CHUNK_GROUPS, Chunk, HEIGHT, Scratch, Target};
use super::{Vectors, write_sums};
use crate::activations::{ColumnTile, Line, TILE_COLUMNS};
use crate::blocks::GROUP;
use crate::repack::ROWS;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Lines of two tiles of columns.
const PAIR_LINES: usize = 2 * TILE_COLUMNS;
/// Lines of the sums of a square.
const SUMS_LINES: usize = 4 * TILE_COLUMNS;

/// A square of sums.
#[derive(Clone, Copy)]
pub(super) struct Square<'a> {
    pub chunk: &'a Chunk<'a>,
    /// Decoded in the place of this one if these columns are its last.
    pub next: Option<&'a Chunk<'a>>,
    /// Which of the tiles and groups of rows is the first.
    pub tile: usize,
    pub row: usize,
    /// From that tile on.
    pub target: Target<'a>,
    pub ahead: Ahead,
}

/// What a square asks for, a part of it with each group. A prefetch of any address is harmless.
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
    fn columns(&self, group: usize) -> *const Line {
        let first = self.first + group * self.count * unit::INSTRUCTIONS;
        if first < self.lines {
            self.columns[0].wrapping_add(first)
        } else {
            self.columns[1].wrapping_add(first - self.lines)
        }
    }

    /// Asks for the part of an instruction of the lines that [`Ahead::columns`] has given.
    #[inline(always)]
    fn fetch_columns(&self, lines: *const Line, instruction: usize) {
        for line in 0..self.count {
            let at = lines.wrapping_add(instruction * self.count + line);
            // SAFETY: harmless; the caller of all this has the instruction.
            unsafe { Vectors::prefetch_second(at.cast()) };
        }
    }

    #[inline(always)]
    fn fetch_packed(&self, group: usize) {
        for rows in self.packed.into_iter().flatten() {
            for at in (0..self.bytes).step_by(64) {
                // SAFETY: as above.
                unsafe { Vectors::prefetch_second(rows.wrapping_add(group * self.bytes + at)) };
            }
        }
    }
}

/// What a square multiplies, from the chunk's first group on.
#[derive(Clone, Copy)]
struct Operands<const A: usize, const R: usize> {
    tiles: [ColumnTile; A],
    weights: [*mut Weights; R],
}

impl<const A: usize, const R: usize> Operands<A, R> {
    #[inline(always)]
    fn at(&self, group: usize) -> ([*const Line; A], [*const Weights; R]) {
        let x = self.tiles.map(|tile| tile.lines.wrapping_add(group * tile.apart));
        (x, self.weights.map(|weights| weights.wrapping_add(group).cast_const()))
    }
}

impl Square<'_> {
    /// `A` tiles of columns times `R` groups of rows.
    ///
    /// # Safety
    /// As for `wide::multiply`; registers are configured for the tiles, the chunk is decoded, sums
    /// were stored before unless this is the first chunk; the covered rows are this thread's.
    #[inline(always)]
    pub unsafe fn add<P: Packed, const A: usize, const R: usize>(
        &self,
        mut tiles: [ColumnTile; A],
        scratch: &mut Scratch,
    ) {
        let Square { chunk, tile, row, .. } = *self;
        let sums: [[*mut Sums; R]; A] = std::array::from_fn(|a| {
            std::array::from_fn(|r| scratch.sums[tile + a][row + r].as_mut_ptr())
        });
        for tile in &mut tiles {
            tile.lines = tile.lines.wrapping_add(chunk.first_group * tile.apart);
        }
        let weights: [*mut Weights; R] =
            std::array::from_fn(|r| scratch.weights[row + r].as_mut_ptr().cast());
        let operands = Operands { tiles, weights };
        // SAFETY: our own contract; sums exist.
        unsafe {
            if chunk.first_group == 0 {
                unit::clear();
            } else {
                unit::load::<A, R>(sums.map(|sums| sums.map(|sums| sums.cast_const())));
            }
            match self.next {
                Some(next) if R == 2 && row + R <= next.height => {
                    let weights = [weights[0], weights[R - 1]];
                    let operands = Operands { tiles, weights };
                    self.multiply_and_decode::<P, A>(operands, next, &mut scratch.weights);
                }
                next => {
                    self.multiply(operands, &scratch.sums);
                    if let Some(next) = next {
                        let rows = row..next.height.min(row + R);
                        decode_rows::<P>(next, rows, &mut scratch.weights);
                    }
                }
            }
            if chunk.is_last {
                self.finish::<A, R>(tiles, scratch)
            } else {
                unit::store::<A, R>(sums)
            }
        }
    }

    /// Multiplies, group by group.
    ///
    /// # Safety
    /// As [`Square::add`].
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512fp16"
    )]
    #[inline(never)]
    unsafe fn multiply<const A: usize, const R: usize>(
        &self,
        operands: Operands<A, R>,
        sums: &[[MaybeUninit<Sums>; HEIGHT]],
    ) {
        let ahead = self.ahead;
        for group in 0..self.chunk.groups {
            let columns = ahead.columns(group);
            // SAFETY: the caller's columns and weights.
            unsafe {
                let (these, next) = (operands.at(group), operands.at(group + 1));
                unit::multiply_in_turn::<A, R>(these, next, |instruction| {
                    ahead.fetch_columns(columns, instruction);
                });
            }
            ahead.fetch_packed(group);
            self.fetch_sums(group, sums);
        }
    }

    /// Multiplies, and decodes each group of the chunk that comes next into the place of a group
    /// that has been multiplied.
    ///
    /// # Safety
    /// As [`Square::add`]; two groups of rows of `next` have blocks.
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512fp16"
    )]
    #[inline(never)]
    unsafe fn multiply_and_decode<P: Packed, const A: usize>(
        &self,
        operands: Operands<A, 2>,
        next: &Chunk<'_>,
        decoded: &mut [[MaybeUninit<Weights>; CHUNK_GROUPS]; HEIGHT],
    ) {
        let both = self.chunk.groups.min(next.groups);
        // SAFETY: the caller's columns and weights; groups below `both` exist in either chunk.
        unsafe {
            let mut largest = [Largest::none(); 2];
            for group in 0..self.chunk.groups {
                let (x, weights) = operands.at(group);
                if group == 0 || group >= both {
                    unit::multiply::<A, 2>(x, weights);
                    continue;
                }
                let columns = self.ahead.columns(group);
                // Written out, not a loop: the number of an instruction shall be a constant.
                macro_rules! decode_beside {
                    ($r:literal) => {
                        let of = (next, self.row + $r, group - 1);
                        let tile = operands.weights[$r].wrapping_add(group - 1);
                        decode_group::<P>(of, tile, &mut largest[$r], |step| {
                            let at = $r * STEPS + step;
                            if at.is_multiple_of(2) {
                                unit::instruction::<A, 2>(at / 2, x, weights);
                                self.ahead.fetch_columns(columns, at / 2);
                            }
                        });
                    };
                }
                decode_beside!(0);
                decode_beside!(1);
            }
            for (r, largest) in largest.into_iter().enumerate() {
                let row = self.row + r;
                decode_rest::<P>(next, (row, both - 1), largest, &mut decoded[row]);
            }
        }
    }

    /// Writes finished sums as results.
    #[inline(always)]
    unsafe fn finish<const A: usize, const R: usize>(
        &self,
        tiles: [ColumnTile; A],
        scratch: &mut Scratch,
    ) {
        let Target { out, mut column, row, covered } = self.target;
        let finished: [[*mut Sums; R]; A] =
            std::array::from_fn(|a| std::array::from_fn(|r| scratch.finished[a][r].as_mut_ptr()));
        // SAFETY: the caller's tiles; the covered rows of the columns are this thread's.
        unsafe {
            unit::store::<A, R>(finished);
            for (tile, finished) in tiles.iter().zip(finished) {
                let columns = column..column + tile.columns;
                column = columns.end;
                for (r, sums) in finished.into_iter().enumerate() {
                    let base = row + (self.row + r) * ROWS;
                    write_sums(sums, columns.clone(), (base, &(covered.0..covered.1)), out);
                }
            }
        }
    }

    /// Asks for a few lines after group `group`: of the sums of the square that follows, or, if
    /// sums are finished, of this one's results.
    #[inline(always)]
    fn fetch_sums(&self, group: usize, sums: &[[MaybeUninit<Sums>; HEIGHT]]) {
        let Target { out, column, row, covered } = self.target;
        let part = |group: usize| group * SUMS_LINES / self.chunk.groups;
        let is_below = self.row + 2 < self.chunk.height;
        let (tile, next_row) =
            if is_below { (self.tile, self.row + 2) } else { (self.tile + 2, 0) };
        for index in part(group)..part(group + 1) {
            let at: *const u8 = if self.chunk.is_last {
                let (column, r) = (column + index / 2, index % 2);
                if column >= out.columns() {
                    break;
                }
                let base = row + (self.row + r) * ROWS;
                out.at(column, covered.0).wrapping_add(base).wrapping_sub(covered.0).cast()
            } else {
                let (a, line) = (index / PAIR_LINES, index % PAIR_LINES);
                let of_tile = sums.as_ptr().wrapping_add(tile + a).cast::<Sums>();
                of_tile.wrapping_add(next_row).cast::<u8>().wrapping_add(64 * line)
            };
            // SAFETY: a prefetch of any address is harmless.
            unsafe { Vectors::prefetch(at) };
        }
    }
}

/// Decodes some groups of rows of a chunk.
///
/// # Safety
/// The CPU has what [`decode`] needs; the chunk's blocks exist.
#[inline(always)]
pub(super) unsafe fn decode_rows<P: Packed>(
    chunk: &Chunk<'_>,
    rows: Range<usize>,
    weights: &mut [[MaybeUninit<Weights>; CHUNK_GROUPS]; HEIGHT],
) {
    for row in rows {
        // SAFETY: our own contract.
        unsafe { decode_rest::<P>(chunk, (row, 0), Largest::none(), &mut weights[row]) };
    }
}

/// Decodes a group of rows from group `from` of elements on, the groups before which have come to
/// `largest`; and all of them one by one if they are too large.
///
/// # Safety
/// As for [`decode_rows`].
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512fp16"
)]
#[inline(never)]
unsafe fn decode_rest<P: Packed>(
    chunk: &Chunk<'_>,
    (row, from): (usize, usize),
    mut largest: Largest,
    weights: &mut [MaybeUninit<Weights>; CHUNK_GROUPS],
) {
    // SAFETY: the caller's blocks exist, and there is a tile for each of their groups.
    unsafe {
        for (group, tile) in weights.iter_mut().enumerate().take(chunk.groups).skip(from) {
            decode_group::<P>((chunk, row, group), tile.as_mut_ptr(), &mut largest, |_| {});
        }
        if !largest.is_in_range::<P>() {
            for (group, tile) in weights.iter_mut().enumerate().take(chunk.groups) {
                let (bytes, group) = place::<P>((chunk, row, group));
                decode_any(P::DTYPE, bytes, group, tile.as_mut_ptr());
            }
        }
    }
}

/// The packed block that has a group of a row, and which of its groups that is.
#[inline(always)]
fn place<P: Packed>((chunk, row, group): (&Chunk<'_>, usize, usize)) -> (*const u8, usize) {
    let block_groups = const { P::DTYPE.block_elements() / GROUP };
    let rows = chunk.packed.wrapping_add(row * chunk.apart);
    let bytes = rows.wrapping_add(group / block_groups * ROWS * P::DTYPE.block_bytes());
    (bytes, group % block_groups)
}

/// [`decode`] of what [`place`] names.
#[inline(always)]
unsafe fn decode_group<P: Packed>(
    of: (&Chunk<'_>, usize, usize),
    tile: *mut Weights,
    largest: &mut Largest,
    between: impl FnMut(usize),
) {
    let (bytes, group) = place::<P>(of);
    let block = packed::Block { bytes, lane: 0, six_bits: std::ptr::null() };
    // SAFETY: the caller's block and tile exist.
    unsafe { decode::<P>(block, group, tile, largest, between) };
}
