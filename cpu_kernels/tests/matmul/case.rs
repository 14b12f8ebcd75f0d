//! Random weights in both layouts, and products of them.

use std::ops::Range;
use tandem_cpu_kernels::*;

/// Weights in file order and the same interleaved.
pub struct Weights {
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
    pub row_major: Vec<u8>,
    pub rows16: Vec<u8>,
}

impl Weights {
    pub fn new(dtype: DType, rows: usize, cols: usize, row_major: Vec<u8>) -> Weights {
        let row_bytes = dtype.row_bytes(cols).expect("whole blocks");
        let mut rows16 = Vec::new();
        if let Some(bytes) = packed_bytes(dtype, Layout::Rows16, rows, cols) {
            rows16 = vec![0xaa; bytes];
            let sources = row_major.chunks(16 * row_bytes);
            for (source, packed) in sources.zip(rows16.chunks_mut(16 * row_bytes)) {
                repack_row_group(dtype, cols, source, packed);
            }
        }
        Weights { dtype, rows, cols, row_major, rows16 }
    }

    pub fn view(&self, layout: Layout) -> MatrixView<'_> {
        let bytes = if layout == Layout::Rows16 { &self.rows16 } else { &self.row_major };
        MatrixView::new(self.dtype, layout, self.rows, self.cols, bytes).expect("a valid view")
    }

    pub fn layouts(&self) -> &'static [Layout] {
        if self.dtype.is_quantized() {
            &[Layout::RowMajor, Layout::Rows16]
        } else {
            &[Layout::RowMajor]
        }
    }
}

/// A small generator, so that one seed stands for a whole case.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// Between −1 and 1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

pub fn quantized_weights(dtype: DType, rows: usize, cols: usize, random: &mut Random) -> Weights {
    let values = random.floats(rows * cols);
    let mut bytes = vec![0; rows * dtype.row_bytes(cols).expect("whole blocks")];
    quantize_row(dtype, &values, &mut bytes);
    Weights::new(dtype, rows, cols, bytes)
}

/// `[columns, rows]` of `rows_wanted`, other rows stay NaN; columns are quantised with `kernels`.
pub fn multiply(
    kernels: &Kernels,
    view: &MatrixView<'_>,
    x: &[f32],
    rows_wanted: &[Range<usize>],
) -> Vec<f32> {
    let (rows, cols) = (view.rows(), view.cols());
    let columns = x.len() / cols;
    let mut out = vec![f32::NAN; columns * rows];
    let mut buffer = ActivationBuffer::new(kernels.activation_form(), columns, cols);
    let activations = if view.dtype().is_quantized() {
        // SAFETY: one thread, and all is filled before the view is made.
        let target = unsafe { buffer.writer(columns, cols) };
        round_all(kernels, target, x);
        target.view(x)
    } else {
        Activations::float(x, columns, cols)
    };
    for range in rows_wanted {
        // SAFETY: the pointer is that of `out`, and only this thread writes.
        let out = unsafe { OutputColumns::new(out.as_mut_ptr(), columns, rows) };
        kernels.matmul(view, &activations, range.clone(), out);
    }
    out
}

/// Fills the rounded form of all columns of `x`.
pub fn round_all(kernels: &Kernels, target: ActivationsMut<'_>, x: &[f32]) {
    let cols = target.cols();
    for (column, values) in x.chunks_exact(cols).enumerate() {
        kernels.quantize_activations(values, target, column, 0..cols);
    }
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    // All NaNs are alike: their payload and sign follow the operand order of instructions.
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}
