//! F32, F16 and BF16 weights against f32 activations.
//!
//! ```text
//! for each block of rows, for each tile of columns:
//!   for each 32 elements:  partial[row][column][0..32] = fma(w[row], x[column], partial)
//! out = tree sum of the 32 partial sums
//! ```
//! A pair of row and column has its own 32 sums, so blocking changes no bit. The last elements of
//! a row that is no multiple of 32 are padded with zeros, as in `scalar.rs`.

use super::scalar::tree_sum;
use super::{MatrixView, OutputColumns};
use crate::activations::Activations;
use crate::blocks::GROUP;
use std::ops::Range;

/// How far ahead of its use a row is fetched.
const PREFETCH_BYTES: usize = 2048;

/// Operations on 32 floats at a time.
///
/// # Safety
/// The CPU must have the instruction set; pointers must be valid for 32 elements.
pub(super) trait Vector {
    /// Rows of a block and columns of a tile: as many sums as registers hold.
    const ROWS: usize;
    /// Columns per tile, when there is more than one column.
    const COLUMNS: usize;
    /// 32 f32.
    type Floats: Copy;

    /// Asks for the cache line at `at`, which need not exist.
    unsafe fn prefetch(at: *const u8) -> ();
    /// Zeros.
    unsafe fn zero() -> Self::Floats;
    /// 32 f32.
    unsafe fn load(from: *const f32) -> Self::Floats;
    /// 32 f16.
    unsafe fn load_f16(from: *const u8) -> Self::Floats;
    /// 32 bf16.
    unsafe fn load_bf16(from: *const u8) -> Self::Floats;
    /// Writes 32 f32.
    unsafe fn store(to: *mut f32, value: Self::Floats) -> ();
    /// `a · b + c`, rounded once.
    unsafe fn fma(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
}

/// A float weight type.
///
/// # Safety
/// As [`Vector`].
pub(super) trait Weight {
    const BYTES: usize;
    unsafe fn load<V: Vector>(from: *const u8) -> V::Floats;
}

pub(super) struct F32;
impl Weight for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const u8) -> V::Floats {
        // SAFETY: the contract of `Weight`; vector loads need no alignment.
        unsafe { V::load(from.cast()) }
    }
}

pub(super) struct F16;
impl Weight for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const u8) -> V::Floats {
        // SAFETY: the contract of `Weight`.
        unsafe { V::load_f16(from) }
    }
}

pub(super) struct Bf16;
impl Weight for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const u8) -> V::Floats {
        // SAFETY: the contract of `Weight`.
        unsafe { V::load_bf16(from) }
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
        let block = if rows.end - row < V::ROWS { 1 } else { V::ROWS };
        let mut column = 0;
        while column < x.columns() {
            let tile = if x.columns() - column < V::COLUMNS { 1 } else { V::COLUMNS };
            let at = (row, column);
            // SAFETY: `block` rows and `tile` columns exist; the rest is our own contract.
            unsafe {
                match (block, tile) {
                    (2, 4) => multiply::<V, W, 2, 4>(weights, x, at, out),
                    (_, 4) => multiply::<V, W, 1, 4>(weights, x, at, out),
                    (_, 2) => multiply::<V, W, 1, 2>(weights, x, at, out),
                    (2, _) => multiply::<V, W, 2, 1>(weights, x, at, out),
                    _ => multiply::<V, W, 1, 1>(weights, x, at, out),
                }
            }
            column += tile;
        }
        row += block;
    }
}

/// `R` rows times `C` columns.
#[inline(always)]
unsafe fn multiply<V: Vector, W: Weight, const R: usize, const C: usize>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    (row, column): (usize, usize),
    out: OutputColumns<'_>,
) {
    let cols = weights.cols();
    let whole = cols / GROUP * GROUP;
    // SAFETY: all rows and columns are in bounds, and a step reads 32 elements of what is left.
    unsafe {
        let mut w = [weights.bytes().as_ptr(); R];
        for (index, w) in w.iter_mut().enumerate() {
            *w = w.add((row + index) * cols * W::BYTES);
        }
        let mut y = [std::ptr::null(); C];
        for (index, y) in y.iter_mut().enumerate() {
            *y = x.column(column + index).as_ptr();
        }
        let mut partial = [[V::zero(); C]; R];
        let mut element = 0;
        while element < whole {
            for w in w {
                let ahead = element * W::BYTES + PREFETCH_BYTES;
                V::prefetch(w.wrapping_add(ahead));
                V::prefetch(w.wrapping_add(ahead + 32 * W::BYTES - 64));
            }
            step::<V, W, R, C>(&w, &y, element, &mut partial);
            element += GROUP;
        }
        if whole < cols {
            let padded = pad::<R, C>(&w, &y, (whole, cols - whole), W::BYTES);
            let (w, y) = (padded.0.each_ref().map(|w| w.as_ptr()), padded.1.each_ref());
            step::<V, W, R, C>(&w, &y.map(|y| y.as_ptr()), 0, &mut partial);
        }
        for (r, partial) in partial.into_iter().enumerate() {
            for (c, partial) in partial.into_iter().enumerate() {
                let mut sums = [0.0; GROUP];
                V::store(sums.as_mut_ptr(), partial);
                out.at(column + c, row + r).write(tree_sum(sums));
            }
        }
    }
}

#[inline(always)]
unsafe fn step<V: Vector, W: Weight, const R: usize, const C: usize>(
    w: &[*const u8; R],
    x: &[*const f32; C],
    element: usize,
    partial: &mut [[V::Floats; C]; R],
) {
    // SAFETY: the caller has 32 elements from `element` on, in each row and column.
    unsafe {
        for (w, partial) in w.iter().zip(partial) {
            let w = W::load::<V>(w.add(element * W::BYTES));
            for (x, partial) in x.iter().zip(partial) {
                *partial = V::fma(w, V::load(x.add(element)), *partial);
            }
        }
    }
}

/// Bytes of 32 weights, and 32 activations.
type Padded<const R: usize, const C: usize> = ([[u8; 4 * GROUP]; R], [[f32; GROUP]; C]);

/// The last `count` (below 32) elements from `first` on, followed by zeros.
#[cold]
unsafe fn pad<const R: usize, const C: usize>(
    w: &[*const u8; R],
    x: &[*const f32; C],
    (first, count): (usize, usize),
    weight_bytes: usize,
) -> Padded<R, C> {
    let mut padded = ([[0; 4 * GROUP]; R], [[0.0; GROUP]; C]);
    // SAFETY: the caller has `count` elements from `first` on, in each row and column.
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
