//! Quantised weights on the bf16 tiles of AMX (Intel, from Sapphire Rapids on): 512 products a
//! cycle, and sums that never leave the tiles before the end of a row. What they are is in
//! `bf16.rs`, for any number of columns the same. Must not know threads or models; called through
//! the table.

mod ahead;
mod decode;
mod narrow;
mod square;
mod unit;
mod wide;

use super::avx512::{self, Wide};
use super::bf16::{self, RESULT_FACTOR};
use super::packed::Packed;
use super::{Layout, MatmulFn, MatmulTable, MatrixView, OutputColumns};
use crate::activations::{Activations, Bf16, ColumnTile, Line, TILE_COLUMNS};
use crate::repack::ROWS;
use std::arch::x86_64::*;
use std::ops::Range;
use unit::Sums;

type Vectors = Wide<true>;

/// Columns that have their sums in registers.
const NARROW_COLUMNS: usize = 2 * TILE_COLUMNS;

pub(crate) const TABLE: MatmulTable =
    MatmulTable { kernels: super::packed::table!(avx512::VNNI.kernels, matmul) };

#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512fp16"
)]
unsafe fn matmul<P: Packed>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    let Some(x) = x.bf16() else { return };
    // SAFETY: the caller checked the CPU and the shapes; registers are configured for the columns.
    unsafe {
        let is_wide = out.columns() > NARROW_COLUMNS && weights.cols() > 0;
        if is_wide && weights.layout() == Layout::Rows16 {
            wide::<P>(weights, x, rows, out);
        } else {
            let mut first = 0;
            while first < out.columns() {
                let pair = Pair::new(x, first, out.columns());
                unit::configure(pair.columns());
                match pair {
                    Pair::One(tile) => {
                        narrow::multiply::<P, 1>(weights, (first, [tile]), &rows, out);
                    }
                    Pair::Two(tiles) => {
                        narrow::multiply::<P, 2>(weights, (first, tiles), &rows, out);
                    }
                }
                first += pair.columns().iter().sum::<usize>();
            }
        }
        unit::release();
    }
}

/// [`wide::multiply`] with its buffers in a frame of their own, whose pages are touched at each
/// call.
///
/// # Safety
/// As for [`wide::multiply`].
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512fp16"
)]
#[inline(never)]
unsafe fn wide<P: Packed>(
    weights: &MatrixView<'_>,
    x: Bf16<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    // SAFETY: passed on.
    unsafe { wide::multiply::<P>(weights, x, rows, out) }
}

/// What registers are configured for: one tile of columns, or two.
#[derive(Clone, Copy)]
enum Pair {
    One(ColumnTile),
    Two([ColumnTile; 2]),
}

impl Pair {
    /// The tiles from column `first` on, none of them beyond column `end`.
    fn new(x: Bf16<'_>, first: usize, end: usize) -> Pair {
        let tile = x.tile(first, end - first);
        match end - first - tile.columns {
            0 => Pair::One(tile),
            left => Pair::Two([tile, x.tile(first + tile.columns, left)]),
        }
    }

    /// Columns of either.
    fn columns(&self) -> [usize; 2] {
        match self {
            Pair::One(tile) => [tile.columns, 0],
            Pair::Two(tiles) => tiles.each_ref().map(|tile| tile.columns),
        }
    }
}

/// Whether tiles of every shape give the sums that they should. Only where AMX was granted.
pub(crate) fn multiplies() -> bool {
    // Ordinary numbers of either sign, from 1/8 to 8 in steps of 1/128 of them.
    let number = |seed: usize| {
        let bits = (seed.wrapping_mul(0x9e37_79b9) >> 8) as u16;
        bits & 0x8000 | (0x3e00 + bits % 0x280)
    };
    let line = |seed: usize| Line(std::array::from_fn(|at| number(seed + at)));
    let x: [Line; 2 * TILE_COLUMNS] = std::array::from_fn(|column| line(1000 * column));
    let of_row: [Line; 2 * ROWS] = std::array::from_fn(|row| line(50_000 + 1000 * row));
    let mut weights = [unit::Weights([[0; 2 * ROWS]; 16]); 2];
    for (row, place) in (0..2 * ROWS).flat_map(|row| (0..32).map(move |place| (row, place))) {
        let tile = &mut weights[row / ROWS];
        tile.0[place / 2][2 * (row % ROWS) + place % 2] = of_row[row].0[place];
    }
    [[16, 16], [16, 0], [16, 3], [3, 0], [5, 16]].into_iter().all(|columns: [usize; 2]| {
        let mut sums = [[Sums([[0.0; ROWS]; TILE_COLUMNS]); 2]; 2];
        let places = sums.each_mut().map(|sums| sums.each_mut().map(|sums| &raw mut *sums));
        // SAFETY: the caller asked for AMX; there are 32 lines of one column each.
        unsafe {
            unit::configure(columns);
            for _ in 0..2 {
                let tiles = weights.each_ref().map(|tile| &raw const *tile);
                let second = &raw const x[columns[0]..][0];
                unit::multiply::<2, 2>([x.as_ptr(), second], tiles);
            }
            unit::store::<2, 2>(places);
            unit::release();
        }
        let places = columns.iter().enumerate().flat_map(|(a, n)| (0..*n).map(move |at| (a, at)));
        places.enumerate().all(|(column, (a, at))| {
            (0..2 * ROWS).all(|row| {
                let add = |sum| bf16::add_products(sum, &of_row[row], &x[column]);
                let got = sums[a][row / ROWS].0[at][row % ROWS];
                got.to_bits() == add(add(0.0)).to_bits()
            })
        })
    })
}

/// Writes the finished sums of up to 16 columns and of the covered of 16 rows from `base`.
///
/// # Safety
/// The CPU has AVX-512; sums of the columns exist; the covered rows are this thread's.
#[inline(always)]
unsafe fn write_sums(
    sums: *const Sums,
    columns: Range<usize>,
    (base, covered): (usize, &Range<usize>),
    out: OutputColumns<'_>,
) {
    let (start, end) = (covered.start.max(base), covered.end.min(base + ROWS));
    if start >= end {
        return;
    }
    let mask = ((1_u32 << (end - base)) - (1 << (start - base))) as __mmask16;
    for (index, column) in columns.enumerate() {
        // SAFETY: the sums exist; masked lanes are not touched, so the pointer may begin before
        // the first row that is this thread's.
        unsafe {
            let sums = _mm512_loadu_ps((&raw const (*sums).0[index]).cast());
            let sums = _mm512_mul_ps(sums, _mm512_set1_ps(RESULT_FACTOR));
            _mm512_mask_storeu_ps(out.at(column, start).wrapping_sub(start - base), mask, sums);
        }
    }
}
