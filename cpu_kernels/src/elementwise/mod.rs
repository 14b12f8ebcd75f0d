//! Owns the operations that treat every element alike: residual addition, bias, scaling, soft cap.
//! It must not know what the elements mean. Called by the executor's workers on ranges of theirs.

pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod simd;

use crate::dispatch::Kernels;
use crate::norm::assert_whole_rows;

impl Kernels {
    /// `x[i] += addend[i]`: the residual addition.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn add(&self, x: &mut [f32], addend: &[f32]) {
        assert_eq!(x.len(), addend.len(), "both sides of an addition");
        // SAFETY: the table came from `for_isa`; the lengths are equal.
        unsafe { (self.vector.add)(x, addend) }
    }

    /// Adds `bias` to each row of `rows` `[n, bias.len()]`.
    ///
    /// # Panics
    /// When `rows` is no whole number of rows.
    pub fn add_bias(&self, rows: &mut [f32], bias: &[f32]) {
        assert_whole_rows(rows.len(), bias.len());
        if bias.is_empty() {
            return;
        }
        for row in rows.chunks_exact_mut(bias.len()) {
            // SAFETY: as in `add`.
            unsafe { (self.vector.add)(row, bias) }
        }
    }

    /// `x[i] *= factor`: the embedding scale of the Gemma family.
    pub fn scale(&self, x: &mut [f32], factor: f32) {
        // SAFETY: the table came from `for_isa`.
        unsafe { (self.vector.scale)(x, factor) }
    }

    /// `x[i] = cap · tanh(x[i] / cap)`: keeps logits inside `±cap` (Gemma 2, arXiv 2408.00118).
    ///
    /// # Panics
    /// When `cap` is not a positive number.
    pub fn softcap(&self, x: &mut [f32], cap: f32) {
        assert!(cap > 0.0, "a soft cap of {cap}");
        // SAFETY: the table came from `for_isa`.
        unsafe { (self.vector.softcap)(x, cap) }
    }
}
