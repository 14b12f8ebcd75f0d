//! Products of made-up weights, for measures of what the matmul kernels of a type reach.

use crate::activations::ActivationBuffer;
use crate::blocks::DType;
use crate::dispatch::Kernels;
use crate::matmul::{Layout, MatrixView, OutputColumns};
use crate::quantize::quantize_row;
use crate::repack::{layout_for, repack_row_group};

/// Elements of a row.
const COLS: usize = 4096;
/// Rows whose values differ; they are repeated.
const ROWS: usize = 16;
/// Vector loads across two lines cost double, so weights and values begin at one.
const LINE_BYTES: usize = 64;

/// A matrix of one type in the layout of its kernels, and activations for it.
pub struct TrialProduct {
    kernels: &'static Kernels,
    dtype: DType,
    layout: Layout,
    rows: usize,
    /// From its first line on.
    weights: Vec<u8>,
    /// `[columns_max, COLS]`, row-major, from its first line on.
    values: Vec<f32>,
    rounded: ActivationBuffer,
    columns_max: usize,
    /// `[columns_max, rows]`, row-major.
    out: Vec<f32>,
}

impl TrialProduct {
    /// About `weight_bytes` of weights of `dtype`, at least 16 rows of 4,096, that meet up to
    /// `columns_max` tokens.
    pub fn new(
        kernels: &'static Kernels,
        dtype: DType,
        weight_bytes: usize,
        columns_max: usize,
    ) -> Self {
        let layout = layout_for(dtype, kernels.isa());
        let group = made_up_rows(dtype, layout);
        let groups = (weight_bytes / group.len()).max(1);
        let mut weights = vec![0; groups * group.len() + LINE_BYTES];
        let first = weights.as_ptr().align_offset(LINE_BYTES);
        weights[first..].chunks_exact_mut(group.len()).for_each(|to| to.copy_from_slice(&group));
        let values = made_up(columns_max * COLS + LINE_BYTES / size_of::<f32>());
        let mut rounded = ActivationBuffer::new(kernels.activation_form(), columns_max, COLS);
        // SAFETY: this thread alone fills it, and nothing looks at it here.
        let target = unsafe { rounded.writer(columns_max, COLS) };
        for (column, values) in columns_of(&values, columns_max).chunks_exact(COLS).enumerate() {
            kernels.quantize_activations(values, target, column, 0..COLS);
        }
        let rows = groups * ROWS;
        let out = vec![0.0; columns_max * rows];
        Self { kernels, dtype, layout, rows, weights, values, rounded, columns_max, out }
    }

    /// Multiplies all weights with the first `columns` tokens; returns how many
    /// multiply-accumulates that were.
    ///
    /// # Panics
    /// With more tokens than there are.
    pub fn multiply(&mut self, columns: usize) -> u64 {
        let (start, bytes) = (self.weights.as_ptr().align_offset(LINE_BYTES), self.bytes());
        // Taken out for as long as all of `self` is in use.
        let weights = std::mem::take(&mut self.weights);
        let macs = self.multiply_piece(&weights[start..][..bytes], columns);
        self.weights = weights;
        macs
    }

    /// The same with weights that lie elsewhere, as [`TrialProduct::weights`] are.
    ///
    /// # Panics
    /// With more tokens than there are, or another number of bytes.
    pub fn multiply_piece(&mut self, weights: &[u8], columns: usize) -> u64 {
        let rows = self.rows;
        let view = MatrixView::new(self.dtype, self.layout, rows, COLS, weights);
        // SAFETY: nothing fills the activations while their view is in use.
        let target = unsafe { self.rounded.writer(self.columns_max, COLS) };
        let all = target.view(columns_of(&self.values, self.columns_max));
        let out = &mut self.out[..columns * rows];
        // SAFETY: the pointer is that of `out`, which this thread alone uses.
        let out = unsafe { OutputColumns::new(out.as_mut_ptr(), columns, rows) };
        let view = view.expect("as many bytes as rows have");
        self.kernels.matmul(&view, &all.slice(0..columns), 0..rows, out);
        std::hint::black_box(&self.out);
        (rows * COLS * columns) as u64
    }

    /// The weights, in whole groups of 16 rows.
    pub fn weights(&self) -> &[u8] {
        &self.weights[self.weights.as_ptr().align_offset(LINE_BYTES)..][..self.bytes()]
    }

    fn bytes(&self) -> usize {
        self.rows * self.dtype.row_bytes(COLS).expect("whole blocks of any type")
    }
}

/// 16 rows in a layout.
fn made_up_rows(dtype: DType, layout: Layout) -> Vec<u8> {
    let mut rows = vec![0; ROWS * dtype.row_bytes(COLS).expect("whole blocks of any type")];
    quantize_row(dtype, &made_up(ROWS * COLS), &mut rows);
    if layout == Layout::Rows16 {
        let source = rows.clone();
        repack_row_group(dtype, COLS, &source, &mut rows);
    }
    rows
}

/// Numbers in ±1.
pub(super) fn made_up(count: usize) -> Vec<f32> {
    (0..count).map(|at| ((at * 7919) % 2003) as f32 / 1001.5 - 1.0).collect()
}

/// The first tokens of values that begin on a line.
fn columns_of(values: &[f32], columns: usize) -> &[f32] {
    &values[values.as_ptr().align_offset(LINE_BYTES)..][..columns * COLS]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn all_types_multiply_with_any_number_of_tokens() {
        for isa in Isa::available() {
            let kernels = Kernels::for_isa(isa).unwrap();
            for dtype in DType::ALL {
                let mut product = TrialProduct::new(kernels, dtype, 1, 3);
                for columns in [1, 3] {
                    product.out.fill(f32::NAN);
                    assert_eq!(product.multiply(columns), (columns * ROWS * COLS) as u64);
                    let made = product.out.iter().filter(|value| value.is_finite()).count();
                    assert_eq!(made, columns * ROWS, "{isa} {dtype}");
                    let (wanted, elsewhere) = (product.out.clone(), product.weights().to_vec());
                    product.out.fill(f32::NAN);
                    product.multiply_piece(&elsewhere, columns);
                    let same = |a: &f32, b: &f32| a.to_bits() == b.to_bits();
                    let all = product.out.iter().zip(&wanted);
                    assert!(all.take(made).all(|(a, b)| same(a, b)), "{isa} {dtype}");
                }
            }
        }
    }
}
