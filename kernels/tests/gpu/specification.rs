//! Products by the scalar specification of the CPU kernels.

use std::num::NonZero;
use std::thread::available_parallelism;

use super::{EightBitMemory, Random, from_gpu, on_gpu, scalar};
use tandem_cpu_kernels::{
    ActivationBuffer, Activations, DType, Layout, MatrixView, OutputColumns, quantize_row,
};
use tandem_kernels::{Columns, DeviceMatrix, DeviceMemory, Gpu, Product, RoundRows, half_bytes};

/// Rows that each processor takes of `rows`, at least one.
fn rows_each(rows: usize) -> usize {
    rows.div_ceil(available_parallelism().map_or(1, NonZero::get)).max(1)
}

/// A matrix as it lies in a file.
pub fn file_bytes(dtype: DType, rows: usize, cols: usize, random: &mut Random) -> Vec<u8> {
    let row_bytes = dtype.row_bytes(cols).expect("whole blocks");
    let (values, mut bytes) = (random.floats(rows * cols), vec![0; rows * row_bytes]);
    let each = rows_each(rows);
    std::thread::scope(|scope| {
        for (values, bytes) in values.chunks(each * cols).zip(bytes.chunks_mut(each * row_bytes)) {
            scope.spawn(move || quantize_row(dtype, values, bytes));
        }
    });
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
    // SAFETY: the pointer is that of `out`, and each thread writes rows of its own.
    let target = unsafe { OutputColumns::new(out.as_mut_ptr(), columns, rows) };
    let each = rows_each(rows);
    std::thread::scope(|scope| {
        for first in (0..rows).step_by(each) {
            let (view, activations) = (&view, &activations);
            let rows = first..rows.min(first + each);
            scope.spawn(move || scalar().matmul(view, activations, rows, target));
        }
    });
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

/// The same products on the GPU, `[columns, rows]` of each matrix.
pub fn got(gpu: &Gpu, matrices: &[&DeviceMatrix], x: &[f32], second: bool) -> Vec<Vec<f32>> {
    got_with(gpu, matrices, x, (second, None))
}

/// The same with a second row of 8 bits, or with a bias that is as long as the longest matrix.
pub fn got_with(
    gpu: &Gpu,
    matrices: &[&DeviceMatrix],
    x: &[f32],
    (second, bias): (bool, Option<&DeviceMemory>),
) -> Vec<Vec<f32>> {
    let cols = matrices[0].cols();
    let columns = x.len() / cols;
    let values = on_gpu(gpu, x);
    let is_narrow = columns <= gpu.narrow_max();
    let eight_bits = EightBitMemory::new(gpu, columns, cols, second);
    let half_memory = on_gpu(gpu, &vec![0xffu8; half_bytes(columns, cols)]);
    let eight_bits = (is_narrow && cols.is_multiple_of(32)).then(|| eight_bits.view());
    let halves = (!is_narrow).then(|| half_memory.span());
    let x = Columns { columns, cols, values: Some(values.span()), eight_bits, halves };
    gpu.round_rows(&round(&x)).expect("rounding");
    let out: Vec<_> = matrices
        .iter()
        .map(|matrix| on_gpu(gpu, &vec![f32::NAN; columns * matrix.rows()]))
        .collect();
    let products: Vec<_> = matrices
        .iter()
        .zip(&out)
        .map(|(matrix, out)| {
            let (out, stride) = (out.span(), matrix.rows());
            Product { matrix, bias: bias.map(DeviceMemory::span), out, stride }
        })
        .collect();
    gpu.multiply(&products, &x).expect("products");
    let sizes = matrices.iter().map(|matrix| columns * matrix.rows());
    out.iter().zip(sizes).map(|(out, size)| from_gpu(gpu, out, size)).collect()
}
