//! F32, F16, BF16 and E4M3 weights against f32 activations.
//!
//! ```text
//! for each block of 16 rows, for each tile of columns, for each chunk of elements, for 1-2 rows:
//!   for each 32 elements:  partial[row][column][0..32] = fma(w[row], x[column], partial)
//! out = tree sum of the 32 partial sums
//! ```
//! A pair of row and column has its own 32 sums, so blocking changes no bit. The last elements of
//! a row that is no multiple of 32 are padded with zeros, as in `scalar.rs`. An E4M3 is widened to
//! an f16 by moving its bits, to an f32 by the processor, and multiplied with its block's scale.

use super::scalar::tree_sum;
use super::{MatrixView, OutputColumns};
use crate::activations::Activations;
use crate::blocks::GROUP;
use std::ops::Range;

/// How far ahead of its use a row is fetched.
const PREFETCH_BYTES: usize = 2048;
/// How much further ahead a lone column asks the second-level cache, which is all it waits for: two
/// threads of Zen 4 read F16 at 34 instead of 29 GB/s where memory gives 36.
const PREFETCH_SECOND_BYTES: usize = 16 << 10;

/// Rows whose sums are kept between chunks: 16 rows · 4 columns · 32 sums are 8 KiB.
const BLOCK_ROWS: usize = 16;

/// Elements per chunk: 4 columns of them are 16 KiB, which stay in L1 for all 16 rows.
const CHUNK_ELEMENTS: usize = 1024;

/// Operations on 32 floats at a time.
///
/// # Safety
/// The CPU must have the instruction set; pointers must be valid for 32 elements.
pub(super) trait Vector {
    /// Rows side by side, 1 or 2: with the columns as many sums as registers hold.
    const ROWS: usize;
    /// Columns per tile, 2 or 4, where there are as many.
    const COLUMNS: usize;
    /// 32 f32.
    type Floats: Copy;

    /// Asks for the cache line at `at`, which need not exist.
    unsafe fn prefetch(at: *const u8) -> ();
    /// The same into the second-level cache only.
    unsafe fn prefetch_second(at: *const u8) -> ();
    /// Zeros.
    unsafe fn zero() -> Self::Floats;
    /// 32 f32.
    unsafe fn load(from: *const f32) -> Self::Floats;
    /// 32 f16.
    unsafe fn load_f16(from: *const u8) -> Self::Floats;
    /// 32 bf16.
    unsafe fn load_bf16(from: *const u8) -> Self::Floats;
    /// 32 e4m3, each divided by 256, times `scale`.
    unsafe fn load_e4m3(from: *const u8, scale: f32) -> Self::Floats;
    /// Writes 32 f32.
    unsafe fn store(to: *mut f32, value: Self::Floats) -> ();
    /// `a · b + c`, rounded once.
    unsafe fn fma(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
}

/// A float weight type.
///
/// # Safety
/// As [`Vector`]: `row` has 32 elements from `element` on. Blocks are whole groups of 32.
pub(super) trait Weight {
    /// 1 where elements have no blocks.
    const BLOCK: usize = 1;
    const BLOCK_BYTES: usize;
    unsafe fn load<V: Vector>(row: *const u8, element: usize) -> V::Floats;
}

pub(super) struct F32;
impl Weight for F32 {
    const BLOCK_BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<V: Vector>(row: *const u8, element: usize) -> V::Floats {
        // SAFETY: the contract of `Weight`; vector loads need no alignment.
        unsafe { V::load(row.add(4 * element).cast()) }
    }
}

pub(super) struct F16;
impl Weight for F16 {
    const BLOCK_BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Vector>(row: *const u8, element: usize) -> V::Floats {
        // SAFETY: the contract of `Weight`.
        unsafe { V::load_f16(row.add(2 * element)) }
    }
}

pub(super) struct Bf16;
impl Weight for Bf16 {
    const BLOCK_BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Vector>(row: *const u8, element: usize) -> V::Floats {
        // SAFETY: the contract of `Weight`.
        unsafe { V::load_bf16(row.add(2 * element)) }
    }
}

/// Blocks of `N` elements: an f32 scale, then a byte each.
pub(super) struct E4m3<const N: usize>;
impl<const N: usize> Weight for E4m3<N> {
    const BLOCK: usize = N;
    const BLOCK_BYTES: usize = 4 + N;
    #[inline(always)]
    unsafe fn load<V: Vector>(row: *const u8, element: usize) -> V::Floats {
        // SAFETY: the contract of `Weight`: the group lies in one block.
        unsafe {
            let block = row.add(element / N * Self::BLOCK_BYTES);
            let scale = block.cast::<f32>().read_unaligned();
            V::load_e4m3(block.add(4 + element % N), scale)
        }
    }
}

/// The scalar table with the kernel `$kernel::<W>` for the float types.
macro_rules! table {
    ($kernel:ident) => {{
        use crate::blocks::DType;
        let mut kernels = super::scalar::TABLE.kernels;
        kernels[DType::F32 as usize] = $kernel::<super::float::F32>;
        kernels[DType::F16 as usize] = $kernel::<super::float::F16>;
        kernels[DType::BF16 as usize] = $kernel::<super::float::Bf16>;
        kernels[DType::E4M3_128 as usize] = $kernel::<super::float::E4m3<128>>;
        kernels[DType::E4M3_32 as usize] = $kernel::<super::float::E4m3<32>>;
        kernels
    }};
}
pub(super) use table;

/// The kernel; see the module.
///
/// # Safety
/// The CPU has the instruction set of `V`; shapes were checked by `Kernels::matmul`; weights are
/// of type `W`.
#[inline(always)]
pub(super) unsafe fn matmul<V: Vector, W: Weight>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    let mut row = rows.start;
    while row < rows.end {
        let block = row..rows.end.min(row + BLOCK_ROWS);
        let mut column = 0;
        while column < x.columns() {
            let tile = if x.columns() - column < V::COLUMNS { 1 } else { V::COLUMNS };
            // SAFETY: the rows and `tile` columns exist; the rest is our own contract.
            unsafe {
                match tile {
                    4 => multiply_tile::<V, W, 4>(weights, x, (block.clone(), column), out),
                    2 => multiply_tile::<V, W, 2>(weights, x, (block.clone(), column), out),
                    _ => multiply_tile::<V, W, 1>(weights, x, (block.clone(), column), out),
                }
            }
            column += tile;
        }
        row = block.end;
    }
}

/// Up to 16 rows times `C` columns, chunk of elements after chunk.
#[inline(always)]
unsafe fn multiply_tile<V: Vector, W: Weight, const C: usize>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    (rows, column): (Range<usize>, usize),
    out: OutputColumns<'_>,
) {
    let cols = weights.cols();
    let chunk = if C == 1 { cols } else { CHUNK_ELEMENTS };
    let mut sums = [[[0.0; GROUP]; C]; BLOCK_ROWS];
    let mut first = 0;
    while first < cols {
        let elements = first..cols.min(first + chunk);
        let mut row = rows.start;
        while row < rows.end {
            let sums = &mut sums[row - rows.start..];
            let at = (row, column);
            // SAFETY: rows, columns and elements exist; the rest is our own contract.
            unsafe {
                // A lone column takes rows one by one: a single stream from DRAM is fastest.
                if V::ROWS == 2 && C > 1 && rows.end - row >= 2 {
                    multiply::<V, W, 2, C>(weights, x, at, elements.clone(), sums);
                    row += 2;
                } else {
                    multiply::<V, W, 1, C>(weights, x, at, elements.clone(), sums);
                    row += 1;
                }
            }
        }
        first = elements.end;
    }
    for (row, sums) in rows.zip(sums) {
        for (c, sums) in sums.into_iter().enumerate() {
            // SAFETY: row and column are in the output, and this thread's.
            unsafe { out.at(column + c, row).write(tree_sum(sums)) };
        }
    }
}

/// Adds some elements of `R` rows times `C` columns to their 32 partial sums.
#[inline(always)]
unsafe fn multiply<V: Vector, W: Weight, const R: usize, const C: usize>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    (row, column): (usize, usize),
    elements: Range<usize>,
    sums: &mut [[[f32; GROUP]; C]],
) {
    let whole = elements.start + elements.len() / GROUP * GROUP;
    // SAFETY: rows, columns and elements exist, and a step reads 32 elements of what is left.
    unsafe {
        let mut w = [weights.bytes().as_ptr(); R];
        for (index, w) in w.iter_mut().enumerate() {
            *w = w.add((row + index) * weights.row_bytes());
        }
        let mut y = [std::ptr::null(); C];
        for (index, y) in y.iter_mut().enumerate() {
            *y = x.column(column + index).as_ptr();
        }
        let mut partial = [[V::zero(); C]; R];
        for r in 0..R {
            for c in 0..C {
                partial[r][c] = V::load(sums[r][c].as_ptr());
            }
        }
        let mut element = elements.start;
        while element < whole {
            for w in w {
                let ahead = w.wrapping_add(element * W::BLOCK_BYTES / W::BLOCK + PREFETCH_BYTES);
                for line in 0..const { W::BLOCK_BYTES * GROUP / W::BLOCK }.div_ceil(64) {
                    V::prefetch(ahead.wrapping_add(64 * line));
                    if C == 1 {
                        V::prefetch_second(ahead.wrapping_add(64 * line + PREFETCH_SECOND_BYTES));
                    }
                }
            }
            partial = step::<V, W, R, C>(&w, &y, element, partial);
            element += GROUP;
        }
        if whole < elements.end {
            let padded = pad::<R, C>(&w, &y, whole..elements.end, W::BLOCK_BYTES);
            let (w, y) = (padded.0.each_ref().map(|w| w.as_ptr()), padded.1.each_ref());
            partial = step::<V, W, R, C>(&w, &y.map(|y| y.as_ptr()), 0, partial);
        }
        for r in 0..R {
            for c in 0..C {
                V::store(sums[r][c].as_mut_ptr(), partial[r][c]);
            }
        }
    }
}

#[inline(always)]
unsafe fn step<V: Vector, W: Weight, const R: usize, const C: usize>(
    w: &[*const u8; R],
    x: &[*const f32; C],
    element: usize,
    mut partial: [[V::Floats; C]; R],
) -> [[V::Floats; C]; R] {
    // SAFETY: the caller has 32 elements from `element` on, in each row and column.
    unsafe {
        for r in 0..R {
            let w = W::load::<V>(w[r], element);
            for c in 0..C {
                partial[r][c] = V::fma(w, V::load(x[c].add(element)), partial[r][c]);
            }
        }
    }
    partial
}

/// Bytes of 32 weights, and 32 activations.
type Padded<const R: usize, const C: usize> = ([[u8; 4 * GROUP]; R], [[f32; GROUP]; C]);

/// The last elements, fewer than 32, followed by zeros; types with blocks have none.
#[cold]
unsafe fn pad<const R: usize, const C: usize>(
    w: &[*const u8; R],
    x: &[*const f32; C],
    elements: Range<usize>,
    weight_bytes: usize,
) -> Padded<R, C> {
    let (first, count) = (elements.start, elements.len());
    let mut padded = ([[0; 4 * GROUP]; R], [[0.0; GROUP]; C]);
    // SAFETY: the caller has these elements in each row and column.
    unsafe {
        for (w, padded) in w.iter().zip(&mut padded.0) {
            let source = w.add(first * weight_bytes);
            padded[..count * weight_bytes]
                .copy_from_slice(std::slice::from_raw_parts(source, count * weight_bytes));
        }
        for (x, padded) in x.iter().zip(&mut padded.1) {
            padded[..count].copy_from_slice(std::slice::from_raw_parts(x.add(first), count));
        }
    }
    padded
}
