//! Tiles of bytes on AMX (Intel, from Sapphire Rapids on). The standard library's intrinsics are
//! not stable, so the instructions are written out.

use super::packed::Packed;
use super::tiles::{TILE_COLUMNS, TileUnit};
use super::{MatmulFn, MatmulTable, MatrixView, OutputColumns, avx512, interleaved};
use crate::activations::Activations;
use crate::repack::ROWS;
use std::arch::asm;
use std::ops::Range;

/// Bytes of a row of weights words and of products: a cache line.
const LINE: usize = 64;

/// The AMX unit. Registers: products in tmm0 (16 columns) or tmm1 (the rest), columns in tmm2 or
/// tmm3, weights in tmm4.
#[derive(Clone, Copy)]
pub(super) struct Amx;

/// What `ldtilecfg` reads: shapes of the tile registers, palette 1.
#[repr(C, align(64))]
struct TileShapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileUnit for Amx {
    const EXISTS: bool = true;

    #[inline(always)]
    unsafe fn configure(depth: usize, rest: usize) {
        let mut shapes = TileShapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        // A register without rows is invalid; nobody uses that of no rest.
        let rest = rest.max(1);
        let all = [
            (TILE_COLUMNS, LINE),
            (rest, LINE),
            (TILE_COLUMNS, depth),
            (rest, depth),
            (depth / 4, LINE),
        ];
        for (register, (rows, bytes)) in all.into_iter().enumerate() {
            (shapes.rows[register], shapes.row_bytes[register]) = (rows as u8, bytes as u16);
        }
        // SAFETY: the caller promises the unit; the shapes are within palette 1 (16 × 64 bytes).
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
    }

    #[inline(always)]
    unsafe fn release() {
        // SAFETY: the caller promises the unit.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    #[inline(always)]
    unsafe fn product(
        words: *const u8,
        (x, stride): (*const i8, usize),
        (_depth, columns): (usize, usize),
        out: *mut [[i32; ROWS]; TILE_COLUMNS],
    ) {
        /// One product in the named registers.
        macro_rules! product {
            ($sum:literal, $columns:literal) => {
                asm!(
                    concat!("tilezero ", $sum),
                    concat!("tileloadd ", $columns, ", [{x} + {stride}*1]"),
                    "tileloadd tmm4, [{words} + {line}*1]",
                    concat!("tdpbssd ", $sum, ", ", $columns, ", tmm4"),
                    concat!("tilestored [{out} + {line}*1], ", $sum),
                    x = in(reg) x,
                    stride = in(reg) stride,
                    words = in(reg) words,
                    line = in(reg) LINE,
                    out = in(reg) out,
                    options(nostack, preserves_flags),
                )
            };
        }
        // SAFETY: the caller promises configured registers, `depth / 4` lines of words, `columns`
        // columns of `depth` bytes and room for the products.
        unsafe {
            if columns == TILE_COLUMNS {
                product!("tmm0", "tmm2");
            } else {
                product!("tmm1", "tmm3");
            }
        }
    }
}

/// Whether tiles of every shape give the products that they should. Only where AMX was granted.
pub(crate) fn multiplies() -> bool {
    const DEPTH: usize = 32;
    let shapes = [(DEPTH, TILE_COLUMNS), (DEPTH, 3), (DEPTH / 2, TILE_COLUMNS), (DEPTH / 2, 1)];
    let byte = |seed: usize| (seed.wrapping_mul(0x9e37_79b9) >> 8) as u8 as i8;
    let words: [i8; DEPTH * ROWS] = std::array::from_fn(|at| byte(at + 1));
    let x: [i8; TILE_COLUMNS * DEPTH] = std::array::from_fn(|at| byte(at + 10_001));
    shapes.into_iter().all(|(depth, columns)| {
        let mut products = [[0; ROWS]; TILE_COLUMNS];
        // SAFETY: the caller asked for AMX; `words` are 8 lines or more, `x` 16 columns
        // of 32 bytes.
        unsafe {
            Amx::configure(depth, columns % TILE_COLUMNS);
            let shape = (depth, columns);
            Amx::product(words.as_ptr().cast(), (x.as_ptr(), DEPTH), shape, &mut products);
            Amx::release();
        }
        let wanted = |column: usize, row: usize| -> i32 {
            let weight = |k: usize| i32::from(words[LINE * (k / 4) + 4 * row + k % 4]);
            (0..depth).map(|k| weight(k) * i32::from(x[column * DEPTH + k])).sum()
        };
        (0..TILE_COLUMNS).all(|column| {
            let exists = column < columns;
            (0..ROWS)
                .all(|row| products[column][row] == if exists { wanted(column, row) } else { 0 })
        })
    })
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn amx<P: Packed>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    // SAFETY: the caller checked the CPU and the shapes.
    unsafe { interleaved::matmul::<avx512::Wide<true, Amx>, P>(weights, x, rows, out) }
}

pub(crate) const TABLE: MatmulTable =
    MatmulTable { kernels: super::packed::table!(avx512::VNNI.kernels, amx) };
