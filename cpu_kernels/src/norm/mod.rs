//! Owns root-mean-square normalisation of rows. It must not know which rows are tokens and which
//! are heads: a row is as long as the weight. Called by the executor's workers on rows of theirs.
//!
//! `out[i] = x[i] / sqrt(mean(x²) + eps) · weight[i]` (Zhang and Sennrich, arXiv 1910.07467).

pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod simd;

use crate::dispatch::Kernels;

impl Kernels {
    /// Normalises each row of `input` `[n, weight.len()]` into `output` of the same shape.
    ///
    /// # Panics
    /// When the lengths disagree or `input` is no whole number of rows.
    pub fn rms_norm(&self, input: &[f32], weight: &[f32], eps: f32, output: &mut [f32]) {
        assert_eq!(input.len(), output.len(), "input and output of a norm");
        assert_whole_rows(input.len(), weight.len());
        if weight.is_empty() {
            return;
        }
        let rows = input.chunks_exact(weight.len()).zip(output.chunks_exact_mut(weight.len()));
        for (row, out) in rows {
            // SAFETY: the table came from `for_isa`; `row`, `out` and `weight` have one length.
            unsafe { (self.vector.rms_norm)(row.as_ptr(), weight, eps, out.as_mut_ptr()) }
        }
    }

    /// Normalises each row of `rows` `[n, weight.len()]` in place; with `weight` as long as a head
    /// this is the norm of queries and keys per head.
    ///
    /// # Panics
    /// When `rows` is no whole number of rows.
    pub fn rms_norm_in_place(&self, rows: &mut [f32], weight: &[f32], eps: f32) {
        assert_whole_rows(rows.len(), weight.len());
        if weight.is_empty() {
            return;
        }
        for row in rows.chunks_exact_mut(weight.len()) {
            let pointer = row.as_mut_ptr();
            // SAFETY: as in `rms_norm`; the kernels allow the output to be the input.
            unsafe { (self.vector.rms_norm)(pointer, weight, eps, pointer) }
        }
    }
}

/// Panics unless `len` elements are whole rows of `row` elements.
pub(crate) fn assert_whole_rows(len: usize, row: usize) {
    let whole = if row == 0 { len == 0 } else { len.is_multiple_of(row) };
    assert!(whole, "{len} elements are no whole number of rows of {row}");
}
