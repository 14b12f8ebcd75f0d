//! What a matmul reads and writes: a weight matrix in one of two layouts, and output columns.

use crate::blocks::DType;
use crate::repack::{ROWS, packed_bytes};
use std::marker::PhantomData;
use std::ops::Range;

/// How the blocks of a matrix lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// File order: row after row, block after block.
    RowMajor,
    /// 16 rows interleaved, so that SIMD lanes are rows; see [`crate::repack`].
    Rows16,
}

/// A matrix view that does not add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// A row is no whole number of blocks.
    #[error("{cols} columns are no whole number of {dtype} blocks of {}", dtype.block_elements())]
    PartialBlock {
        /// Type of the weights.
        dtype: DType,
        /// Columns asked for.
        cols: usize,
    },
    /// The bytes given are not those of the shape.
    #[error("{dtype} [{rows}, {cols}] in {layout:?} takes {wanted} bytes, got {got}")]
    WrongBytes {
        /// Type of the weights.
        dtype: DType,
        /// Layout of the bytes.
        layout: Layout,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Bytes that the shape takes.
        wanted: usize,
        /// Bytes given.
        got: usize,
    },
    /// Only quantised types have [`Layout::Rows16`], and the size must fit `usize`.
    #[error("{dtype} [{rows}, {cols}] has no {layout:?} layout")]
    NoLayout {
        /// Type of the weights.
        dtype: DType,
        /// Layout asked for.
        layout: Layout,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
}

/// A weight matrix `[rows, cols]` in borrowed bytes.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    dtype: DType,
    layout: Layout,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

impl<'a> MatrixView<'a> {
    /// A view of `bytes` as `[rows, cols]` elements of `dtype` in `layout`.
    ///
    /// # Errors
    /// [`MatrixError`] when the length of `bytes` is not that of the shape.
    pub fn new(
        dtype: DType,
        layout: Layout,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
    ) -> Result<MatrixView<'a>, MatrixError> {
        if dtype.row_bytes(cols).is_none() {
            return Err(MatrixError::PartialBlock { dtype, cols });
        }
        let got = bytes.len();
        match packed_bytes(dtype, layout, rows, cols) {
            None => Err(MatrixError::NoLayout { dtype, layout, rows, cols }),
            Some(wanted) if wanted != got => {
                Err(MatrixError::WrongBytes { dtype, layout, rows, cols, wanted, got })
            }
            Some(_) => Ok(MatrixView { dtype, layout, rows, cols, bytes }),
        }
    }

    /// The view of some rows, which become rows `0 ..`.
    ///
    /// # Panics
    /// When there are no such rows, or interleaved ones begin inside a group of 16.
    pub fn cut(&self, rows: Range<usize>) -> MatrixView<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        let end = match self.layout {
            Layout::RowMajor => rows.end,
            Layout::Rows16 => {
                assert!(rows.start.is_multiple_of(ROWS), "rows {rows:?} of groups of {ROWS}");
                rows.end.next_multiple_of(ROWS)
            }
        };
        let bytes = &self.bytes[rows.start * self.row_bytes()..end * self.row_bytes()];
        MatrixView { rows: rows.len(), bytes, ..*self }
    }

    /// Type of the weights.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Layout of the bytes.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Rows: outputs per token.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: inputs per token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The bytes, padding rows of the last group included.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes of one row in file order.
    pub(crate) fn row_bytes(&self) -> usize {
        self.cols / self.dtype.block_elements() * self.dtype.block_bytes()
    }
}

/// Where a matmul writes: `[columns, rows]` f32 with `stride` elements from column to column.
///
/// It is a raw view, so that each worker can have a copy of it and write its own rows.
#[derive(Clone, Copy, Debug)]
pub struct OutputColumns<'a> {
    pointer: *mut f32,
    columns: usize,
    rows: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: the promise made at `new` is exactly that uses on several threads do not conflict.
unsafe impl Send for OutputColumns<'_> {}
// SAFETY: as above.
unsafe impl Sync for OutputColumns<'_> {}

impl<'a> OutputColumns<'a> {
    /// A view of `[columns, rows]` f32, row-major, at `pointer`.
    ///
    /// # Safety
    /// `pointer` must be valid for writes (and reads) of `columns · rows` f32 during `'a`. While
    /// copies of the view live, no element may be used by two threads at the same time: matmuls
    /// that run together must get disjoint row ranges, and nothing else may touch those rows.
    pub unsafe fn new(pointer: *mut f32, columns: usize, rows: usize) -> OutputColumns<'a> {
        OutputColumns { pointer, columns, rows, stride: rows, lifetime: PhantomData }
    }

    /// The view of rows `first ..`, for a matrix whose output is a part of a fused one (row 0 of
    /// the result is row `first` of `self`).
    ///
    /// # Panics
    /// When `first` exceeds the rows.
    pub fn skip_rows(self, first: usize) -> OutputColumns<'a> {
        assert!(first <= self.rows, "row {first} of {}", self.rows);
        // SAFETY: `first` stays within the first column's rows, which are valid.
        let pointer = unsafe { self.pointer.add(first) };
        OutputColumns { pointer, rows: self.rows - first, ..self }
    }

    /// Tokens.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows that may be written, from row 0 of this view.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Pointer to `[column][row]`; rows that follow are contiguous.
    #[inline(always)]
    pub(crate) fn at(&self, column: usize, row: usize) -> *mut f32 {
        debug_assert!(column < self.columns && row < self.rows);
        // SAFETY: kernels pass columns and rows of this view, within the allocation.
        unsafe { self.pointer.add(column * self.stride + row) }
    }
}
