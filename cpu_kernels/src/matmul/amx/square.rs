//! The inner loop of `wide.rs`: a square of two tiles of columns and two groups of rows, or of one
//! of either, through a chunk.

use super::super::packed::{self, Packed};
use super::ahead::{Ahead, EndLines, LAST_GROUPS};
use super::decode::{Largest, STEPS, decode, decode_any};
use super::unit::{self, Sums, Weights};
use super::wide::{CHUNK_GROUPS, Chunk, HEIGHT, Scratch, Target};
use super::write_sums;
use crate::activations::{ColumnTile, Line};
use crate::blocks::GROUP;
use crate::repack::ROWS;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Groups between decoding and use in a chunk that is multiplied as it is decoded: a load of a tile
/// does not see stores that are still under way.
const LAG: usize = 4;

/// A square of sums.
#[derive(Clone, Copy)]
pub(super) struct Square<'a> {
    pub chunk: &'a Chunk<'a>,
    /// Decoded in the place of this one if these columns are its last.
    pub next: Option<&'a Chunk<'a>>,
    /// Whether this chunk is yet to be decoded, and the first of its row.
    pub is_packed: bool,
    /// Which of the tiles and groups of rows is the first.
    pub tile: usize,
    pub row: usize,
    /// From that tile on.
    pub target: Target<'a>,
    pub ahead: Ahead,
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

    /// The same, known to be of two groups of rows.
    fn pair(self) -> Operands<A, 2> {
        const { assert!(R > 0) };
        Operands { tiles: self.tiles, weights: [self.weights[0], self.weights[R - 1]] }
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
                _ if self.is_packed && R == 2 => {
                    self.decode_and_multiply::<P, A>(operands.pair(), &mut scratch.weights);
                }
                Some(next) if R == 2 && row + R <= next.height => {
                    let operands = operands.pair();
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
        let Square { chunk, ahead, .. } = *self;
        let end_lines = EndLines::new(chunk, &self.target, (self.tile, self.row), sums);
        for group in 0..chunk.groups {
            let columns = ahead.columns(group);
            let (x, weights) = operands.at(group);
            // SAFETY: the caller's columns and weights.
            unsafe {
                if A == 2 && R == 2 {
                    let next = operands.at(group + 1).0;
                    let pairs = ([x[0], x[A - 1]], [weights[0], weights[R - 1]]);
                    unit::multiply_square(pairs, [next[0], next[A - 1]], columns);
                    ahead.fetch_columns_from(columns, unit::INSTRUCTIONS);
                } else {
                    unit::multiply::<A, R>(x, weights);
                    ahead.fetch_columns_from(columns, 0);
                }
            }
            ahead.fetch_packed(group);
            if let Some(index) = (group + LAST_GROUPS).checked_sub(chunk.groups) {
                end_lines.fetch(index);
            }
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
                if group == 0 || group >= both {
                    let (x, weights) = operands.at(group);
                    unit::multiply::<A, 2>(x, weights);
                } else {
                    self.decode_beside::<P, A>(&operands, group, (next, group - 1), &mut largest);
                }
            }
            for (r, largest) in largest.into_iter().enumerate() {
                let row = self.row + r;
                decode_rest::<P>(next, (row, both - 1), largest, &mut decoded[row]);
            }
        }
    }

    /// Decodes the chunk, and multiplies each of its groups some groups later.
    ///
    /// # Safety
    /// As [`Square::add`], but nothing is decoded; two groups of rows have blocks, sums are zero.
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512fp16"
    )]
    #[inline(never)]
    unsafe fn decode_and_multiply<P: Packed, const A: usize>(
        &self,
        operands: Operands<A, 2>,
        decoded: &mut [[MaybeUninit<Weights>; CHUNK_GROUPS]; HEIGHT],
    ) {
        let Square { chunk, row, .. } = *self;
        let lag = LAG.min(chunk.groups);
        // SAFETY: the caller's columns and weights; groups below their number exist.
        unsafe {
            let mut largest = [Largest::none(); 2];
            for (r, largest) in largest.iter_mut().enumerate() {
                for group in 0..lag {
                    let tile = operands.weights[r].wrapping_add(group);
                    decode_group::<P>((chunk, row + r, group), tile, largest, |_| {});
                }
            }
            for group in 0..chunk.groups {
                if group + lag < chunk.groups {
                    let later = (chunk, group + lag);
                    self.decode_beside::<P, A>(&operands, group, later, &mut largest);
                } else {
                    let (x, weights) = operands.at(group);
                    unit::multiply::<A, 2>(x, weights);
                }
            }
            if !largest.iter().all(|largest| largest.is_in_range::<P>()) {
                decode_rows::<P>(chunk, row..row + 2, decoded);
                let weights = [row, row + 1].map(|row| decoded[row].as_mut_ptr().cast());
                let operands = Operands { weights, ..operands };
                unit::clear();
                for group in 0..chunk.groups {
                    let (x, weights) = operands.at(group);
                    unit::multiply::<A, 2>(x, weights);
                }
            }
        }
    }

    /// Multiplies a group, and decodes another one beside that, into its place of the operands.
    ///
    /// # Safety
    /// As [`Square::add`]; two groups of rows of what is decoded have blocks.
    #[inline(always)]
    unsafe fn decode_beside<P: Packed, const A: usize>(
        &self,
        operands: &Operands<A, 2>,
        group: usize,
        (packed, other): (&Chunk<'_>, usize),
        largest: &mut [Largest; 2],
    ) {
        let (x, weights) = operands.at(group);
        let columns = self.ahead.columns(group);
        // Written out, not a loop: the number of an instruction shall be a constant.
        macro_rules! decode {
            ($r:literal) => {
                let tile = operands.weights[$r].wrapping_add(other);
                let of = (packed, self.row + $r, other);
                decode_group::<P>(of, tile, &mut largest[$r], |step| {
                    let at = $r * STEPS + step;
                    if at.is_multiple_of(2) {
                        unit::instruction::<A, 2>(at / 2, x, weights);
                        self.ahead.fetch_columns(columns, at / 2);
                    }
                });
            };
        }
        // SAFETY: passed on.
        unsafe {
            decode!(0);
            decode!(1);
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
