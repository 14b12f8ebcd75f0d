//! Up to 32 columns: sums stay in the tile registers over the whole row, and weights are decoded
//! into a ring in the first-level cache, a few groups ahead of the tile unit, so that vectors and
//! tiles work at the same time. Their instructions alternate: a core whose other half is in use
//! looks ahead by half as many, which would be those of one unit alone otherwise, and takes 1.5
//! times as long.
//!
//! ```text
//! for each R groups of 16 rows:            R = 2, so that products need not wait for each other
//!   for each group of 32 elements:
//!     decode R tiles of weights into the ring, and between the steps of that
//!     multiply the group of 4 groups ago: A·R products, A = 2 beyond 16 columns
//!   store the sums
//! ```
//! A load of a tile does not see stores that are still under way, so it has to come later than they
//! do.

use super::super::fetch::stream_lines;
use super::super::interleaved::{CHUNK_BYTES, CHUNK_ELEMENTS, pack_chunk};
use super::super::lanes::Lanes;
use super::super::packed::{Block, Packed};
use super::super::{Layout, MatrixView, OutputColumns};
use super::decode::{Largest, STEPS, decode, decode_any};
use super::unit::{self, Sums, Weights};
use super::{Vectors, write_sums};
use crate::activations::{ColumnTile, Line};
use crate::blocks::GROUP;
use crate::repack::ROWS;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Groups from a decoded tile to its use.
const AHEAD: usize = 4;
const _: () = assert!(unit::INSTRUCTIONS == STEPS);
/// Places of the ring, a power of two beyond that.
const PLACES: usize = 8;
/// How far ahead of its use packed weights are fetched: hardware prefetchers stop at each page.
const PREFETCH_BYTES: usize = 12 << 10;

/// Packed blocks of `R` groups of rows, side by side in memory.
#[derive(Clone, Copy)]
struct Panel<const R: usize> {
    packed: [*const u8; R],
    blocks: usize,
    /// From one group of rows to the next; what is fetched ahead at the end of a row.
    apart: usize,
}

type Ring<const R: usize> = [[MaybeUninit<Weights>; R]; PLACES];

/// Rows `rows` of the columns of some tiles, for which the registers are configured; the first one
/// is column `first` of the output.
///
/// # Safety
/// The CPU has AMX and what [`decode`] needs; shapes were checked by `Kernels::matmul`; `weights`
/// are of type `P`.
#[inline(always)]
pub(super) unsafe fn multiply<P: Packed, const A: usize>(
    weights: &MatrixView<'_>,
    (first, tiles): (usize, [ColumnTile; A]),
    rows: &Range<usize>,
    out: OutputColumns<'_>,
) {
    let mut first_row = rows.start / ROWS * ROWS;
    while first_row < rows.end {
        let pair = weights.layout() == Layout::Rows16 && first_row + ROWS < rows.end;
        let height = if pair { 2 * ROWS } else { ROWS };
        let covered = rows.start.max(first_row)..rows.end.min(first_row + height);
        // SAFETY: our own contract; the rows of a group exist in whole, padding included.
        unsafe {
            if pair {
                strip::<P, A, 2>(weights, (first, &tiles), (first_row, covered), out);
            } else {
                strip::<P, A, 1>(weights, (first, &tiles), (first_row, covered), out);
            }
        }
        first_row += height;
    }
}

/// `R` groups of rows, on the fast way if it is right.
#[inline(always)]
unsafe fn strip<P: Packed, const A: usize, const R: usize>(
    weights: &MatrixView<'_>,
    (first, tiles): (usize, &[ColumnTile; A]),
    (first_row, covered): (usize, Range<usize>),
    out: OutputColumns<'_>,
) {
    let (blocks, group_bytes) =
        (weights.cols() / P::DTYPE.block_elements(), ROWS * weights.row_bytes());
    // SAFETY: our own contract, passed on; the packed groups of rows exist.
    unsafe {
        match weights.layout() {
            Layout::Rows16 => {
                let rows = weights.bytes().as_ptr().wrapping_add(first_row / ROWS * group_bytes);
                let packed = std::array::from_fn(|r| rows.wrapping_add(r * group_bytes));
                let panel = Panel { packed, blocks, apart: group_bytes };
                unit::clear();
                if !sum::<P, A, R>(&panel, tiles, 0) {
                    unit::clear();
                    sum_any::<P, A, R>(&panel, tiles, 0);
                }
            }
            Layout::RowMajor => row_major::<P, A>(weights, tiles, first_row),
        }
        let mut sums = [[const { MaybeUninit::<Sums>::uninit() }; R]; A];
        let places = std::array::from_fn(|a| std::array::from_fn(|r| sums[a][r].as_mut_ptr()));
        unit::store::<A, R>(places);
        let mut column = first;
        for (tile, sums) in tiles.iter().zip(&sums) {
            let these = column..column + tile.columns;
            column = these.end;
            for (r, sums) in sums.iter().enumerate() {
                write_sums(sums.as_ptr(), these.clone(), (first_row + r * ROWS, &covered), out);
            }
        }
    }
}

/// Sums of 16 rows in file order, which are interleaved chunk by chunk.
#[inline(always)]
unsafe fn row_major<P: Packed, const A: usize>(
    weights: &MatrixView<'_>,
    tiles: &[ColumnTile; A],
    first_row: usize,
) {
    let blocks = weights.cols() / P::DTYPE.block_elements();
    let chunk = CHUNK_ELEMENTS / P::DTYPE.block_elements();
    let source = &weights.bytes()[first_row * weights.row_bytes()..];
    let source = &source[..source.len().min(ROWS * weights.row_bytes())];
    let mut scratch = [0; CHUNK_BYTES];
    // SAFETY: `scratch` holds the packed blocks; the rest is our own contract.
    let mut all_chunks = |is_fast: bool| unsafe {
        unit::clear();
        let mut is_right = true;
        for start in (0..blocks).step_by(chunk) {
            let count = chunk.min(blocks - start);
            pack_chunk::<P>(source, weights.row_bytes(), start..start + count, &mut scratch);
            let panel = Panel { packed: [scratch.as_ptr()], blocks: count, apart: CHUNK_BYTES };
            let first_group = start * (P::DTYPE.block_elements() / GROUP);
            if is_fast {
                is_right &= sum::<P, A, 1>(&panel, tiles, first_group);
            } else {
                sum_any::<P, A, 1>(&panel, tiles, first_group);
            }
        }
        is_right
    };
    if !all_chunks(true) {
        all_chunks(false);
    }
}

/// Adds all groups of the panel to the sums; returns whether they are right.
#[inline(always)]
unsafe fn sum<P: Packed, const A: usize, const R: usize>(
    panel: &Panel<R>,
    tiles: &[ColumnTile; A],
    first_group: usize,
) -> bool {
    let block_groups = const { P::DTYPE.block_elements() / GROUP };
    let block_bytes = const { ROWS * P::DTYPE.block_bytes() };
    let groups = panel.blocks * block_groups;
    let mut ring: Ring<R> = [[const { MaybeUninit::uninit() }; R]; PLACES];
    let mut fetched = Fetched::new(panel);
    // SAFETY: blocks and groups below their number exist; a tile is read after it was decoded.
    unsafe {
        let mut largest = Largest::none();
        let (mut block, mut group) = (0, 0);
        for step in 0..groups {
            let is_due = step >= AHEAD;
            let (x, due) = operands(&ring, step.wrapping_sub(AHEAD), tiles, first_group);
            let place: [*mut Weights; R] =
                ring[step % PLACES].each_mut().map(MaybeUninit::as_mut_ptr);
            for (r, tile) in place.into_iter().enumerate() {
                let bytes = panel.packed[r].wrapping_add(block);
                let block = Block { bytes, lane: 0, six_bits: std::ptr::null() };
                decode::<P>(block, group, tile, &mut largest, |word| {
                    if is_due && (r * STEPS + word).is_multiple_of(R) {
                        unit::instruction::<A, R>((r * STEPS + word) / R, x, due);
                    }
                });
                for line in 0..const { stream_lines::<P>() } {
                    Vectors::prefetch(fetched.at[r].wrapping_add(64 * line));
                }
            }
            fetched.advance::<P>();
            group += 1;
            if group == block_groups {
                (group, block) = (0, block + block_bytes);
            }
        }
        for step in groups.saturating_sub(AHEAD)..groups {
            multiply_group::<A, R>(&ring, step, tiles, first_group);
        }
        largest.is_in_range::<P>()
    }
}

/// [`sum`] for weights of any size.
#[cold]
#[inline(never)]
unsafe fn sum_any<P: Packed, const A: usize, const R: usize>(
    panel: &Panel<R>,
    tiles: &[ColumnTile; A],
    first_group: usize,
) {
    let block_groups = P::DTYPE.block_elements() / GROUP;
    let mut ring: Ring<R> = [[const { MaybeUninit::uninit() }; R]; PLACES];
    for step in 0..panel.blocks * block_groups {
        let block = step / block_groups * ROWS * P::DTYPE.block_bytes();
        // SAFETY: as in `sum`.
        unsafe {
            for (packed, tile) in panel.packed.into_iter().zip(&mut ring[step % PLACES]) {
                let packed = packed.wrapping_add(block);
                decode_any(P::DTYPE, packed, step % block_groups, tile.as_mut_ptr());
            }
            multiply_group::<A, R>(&ring, step, tiles, first_group);
        }
    }
}

/// What is multiplied at step `step`, which is group `first_group + step` of the columns.
#[inline(always)]
fn operands<const A: usize, const R: usize>(
    ring: &Ring<R>,
    step: usize,
    tiles: &[ColumnTile; A],
    first_group: usize,
) -> ([*const Line; A], [*const Weights; R]) {
    let place = &ring[step % PLACES];
    let line = first_group.wrapping_add(step);
    let x = tiles.map(|tile| tile.lines.wrapping_add(line.wrapping_mul(tile.apart)));
    (x, std::array::from_fn(|r| place[r].as_ptr()))
}

/// Multiplies what [`operands`] names.
#[inline(always)]
unsafe fn multiply_group<const A: usize, const R: usize>(
    ring: &Ring<R>,
    step: usize,
    tiles: &[ColumnTile; A],
    first_group: usize,
) {
    let (x, weights) = operands(ring, step, tiles, first_group);
    // SAFETY: the tiles were decoded; the columns have a line of this group.
    unsafe { unit::multiply::<A, R>(x, weights) };
}

/// What is fetched: some way ahead in the same rows, or at the start of those that follow them.
struct Fetched<const R: usize> {
    at: [*const u8; R],
    left: usize,
    apart: usize,
}

impl<const R: usize> Fetched<R> {
    #[inline(always)]
    fn new(panel: &Panel<R>) -> Self {
        let (ahead, apart) = (PREFETCH_BYTES, panel.apart.max(1));
        let skipped = ahead / apart * (R - 1) * apart;
        let at = panel.packed.map(|packed| packed.wrapping_add(ahead + skipped));
        Fetched { at, left: apart - ahead % apart, apart }
    }

    #[inline(always)]
    fn advance<P: Packed>(&mut self) {
        let bytes = const { ROWS * P::DTYPE.block_bytes() * GROUP / P::DTYPE.block_elements() };
        let skipped = if self.left <= bytes { (R - 1) * self.apart } else { 0 };
        self.left = if self.left <= bytes { self.left + self.apart } else { self.left } - bytes;
        for at in &mut self.at {
            *at = at.wrapping_add(bytes + skipped);
        }
    }
}
