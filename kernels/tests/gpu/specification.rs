//! Products by the scalar specification of the CPU kernels.

use super::{Random, scalar};
use tandem_cpu_kernels::{
    ActivationBuffer, Activations, DType, Layout, MatrixView, OutputColumns, quantize_row,
};
use tandem_kernels::{Columns, RoundRows};

/// A matrix as it lies in a file.
pub fn file_bytes(dtype: DType, rows: usize, cols: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; rows * dtype.row_bytes(cols).expect("whole blocks")];
    quantize_row(dtype, &random.floats(rows * cols), &mut bytes);
    bytes
}

/// `[columns, rows]` by the specification.
pub fn wanted(dtype: DType, (rows, cols): (usize, usize), file: &[u8], x: &[f32]) -> Vec<f32> {
    let view = MatrixView::new(dtype, Layout::RowMajor, rows, cols, file).expect("a view");
    let columns = x.len() / cols;
    let mut out = vec![f32::NAN; columns * rows];
    let mut buffer = ActivationBuffer::new(scalar().activation_form(), columns, cols);
    let activations = if dtype.is_quantized() {
        // SAFETY: one thread, and all is filled before the view is made.
        let target = unsafe { buffer.writer(columns, cols) };
        for (column, values) in x.chunks_exact(cols).enumerate() {
            scalar().quantize_activations(values, target, column, 0..cols);
        }
        target.view(x)
    } else {
        Activations::float(x, columns, cols)
    };
    // SAFETY: the pointer is that of `out`, and only this thread writes.
    let target = unsafe { OutputColumns::new(out.as_mut_ptr(), columns, rows) };
    scalar().matmul(&view, &activations, 0..rows, target);
    out
}

/// What makes the forms of activations that are wanted.
pub fn round<'a>(x: &Columns<'a>) -> RoundRows<'a> {
    RoundRows {
        values: x.values.expect("values"),
        up: None,
        out: None,
        eight_bits: x.eight_bits,
        halves: x.halves,
        rows: x.columns,
        cols: x.cols,
    }
}
