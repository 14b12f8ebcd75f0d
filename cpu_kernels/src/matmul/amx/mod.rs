//! Quantised weights on the bf16 tiles of AMX (Intel, from Sapphire Rapids on): 512 products a
//! cycle, and sums that never leave the tiles before the end of a row. What they are is in
//! `bf16.rs`, for any number of columns the same. Must not know threads or models; called through
//! the table.

mod decode;
mod narrow;
mod unit;
mod wide;

use super::avx512::{self, Wide};
use super::bf16::{self, RESULT_FACTOR};
use super::packed::Packed;
use super::{Layout, MatmulFn, MatmulTable, MatrixView, OutputColumns};
use crate::activations::{Activations, Line};
use crate::repack::ROWS;
use narrow::Columns;
use std::arch::x86_64::*;
use std::ops::Range;
use unit::{Sums, TILE_COLUMNS};

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
        if out.columns() > NARROW_COLUMNS && weights.layout() == Layout::Rows16 {
            wide::multiply::<P>(weights, x, rows, out);
        } else {
            for first in (0..out.columns()).step_by(NARROW_COLUMNS) {
                let count = (out.columns() - first).min(NARROW_COLUMNS);
                let columns = Columns { x, first, count };
                unit::configure(count);
                if count > TILE_COLUMNS {
                    narrow::multiply::<P, 2>(weights, columns, rows.clone(), out);
                } else {
                    narrow::multiply::<P, 1>(weights, columns, rows.clone(), out);
                }
            }
        }
        unit::release();
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
    [32, 16, 19, 3].into_iter().all(|columns| {
        let mut sums = [[Sums([[0.0; ROWS]; TILE_COLUMNS]); 2]; 2];
        let places = sums.each_mut().map(|sums| sums.each_mut().map(|sums| &raw mut *sums));
        // SAFETY: the caller asked for AMX; there are 32 lines of one column each.
        unsafe {
            unit::configure(columns);
            for _ in 0..2 {
                let tiles = weights.each_ref().map(|tile| &raw const *tile);
                unit::multiply::<2, 2>(x.as_ptr(), size_of::<Line>(), tiles);
            }
            unit::store::<2, 2>(places);
            unit::release();
        }
        (0..columns).all(|column| {
            (0..2 * ROWS).all(|row| {
                let add = |sum| bf16::add_products(sum, &of_row[row], &x[column]);
                let got = sums[column / TILE_COLUMNS][row / ROWS].0[column % TILE_COLUMNS];
                got[row % ROWS].to_bits() == add(add(0.0)).to_bits()
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
