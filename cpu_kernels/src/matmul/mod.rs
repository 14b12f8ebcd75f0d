//! Owns the product of a weight matrix with a few columns of activations, for a range of rows.
//! It must not know threads, models or where rows of a fused output belong: the caller says.
//! Called by the executor's workers, each with its own row range.
//!
//! `out[c][r] = Σ_k weights[r][k] · activations[c][k]`. For quantised weights the activations are
//! the rounded ones and the arithmetic is fixed, group of 32 after group of 32, in every layout and
//! for any number of columns. There are two: that of bf16 tiles is in `bf16.rs`, and that of 8-bit
//! activations, on every other instruction set, is
//! ```text
//! acc = 0
//! for each group:  isum = Σ quant·activation            (exact; per half where scales are)
//!                  acc  = fma(isum, weight_scale · activation_scale, acc)
//!                  acc  = fma(min, activation_scaled_sum, acc)         (types with offsets)
//! ```
//! So results are bit-identical whatever the batch, the tile or, with one kind of activations, the
//! ISA. Float weights keep 32
//! partial sums (element `k` goes to `k mod 32`) that are added in one fixed tree.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod bf16;
#[cfg(target_arch = "x86_64")]
mod columns;
#[cfg(target_arch = "x86_64")]
mod fetch;
#[cfg(target_arch = "x86_64")]
mod float;
#[cfg(target_arch = "x86_64")]
mod group_sums;
#[cfg(target_arch = "x86_64")]
mod int4;
#[cfg(target_arch = "x86_64")]
mod interleaved;
#[cfg(target_arch = "x86_64")]
mod k_types;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(target_arch = "x86_64")]
mod packed;
pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
mod sums;
mod view;
#[cfg(target_arch = "x86_64")]
mod wide;

use crate::activations::Activations;
use crate::blocks::DType;
use crate::dispatch::Kernels;
use std::ops::Range;
pub use view::{Layout, MatrixError, MatrixView, OutputColumns};

/// A matmul kernel: shapes are already checked, the CPU too.
pub(crate) type MatmulFn =
    unsafe fn(&MatrixView<'_>, &Activations<'_>, Range<usize>, OutputColumns<'_>);

/// The matmul kernels of one instruction set.
pub(crate) struct MatmulTable {
    /// Indexed by `DType as usize`; each handles every layout of its type.
    pub kernels: [MatmulFn; DType::COUNT],
}

impl Kernels {
    /// Computes `out[c][r]` for every column `c` and the given rows of `weights`.
    ///
    /// Any range is right; multiples of 16 are fastest for [`Layout::Rows16`].
    ///
    /// # Panics
    /// When shapes disagree, `rows` exceeds the matrix or the output, or quantised weights meet
    /// activations without the rounded form that these kernels read.
    pub fn matmul(
        &self,
        weights: &MatrixView<'_>,
        activations: &Activations<'_>,
        rows: Range<usize>,
        out: OutputColumns<'_>,
    ) {
        let (cols, columns) = (weights.cols(), activations.columns());
        assert_eq!(cols, activations.cols(), "inner dimensions of weights and activations");
        assert_eq!(columns, out.columns(), "columns of activations and output");
        assert!(rows.end <= weights.rows(), "rows {rows:?} of {}", weights.rows());
        assert!(rows.end <= out.rows(), "rows {rows:?} of an output of {}", out.rows());
        if weights.dtype().is_quantized() {
            let (wanted, got) = (self.activation_form(), activations.form());
            assert_eq!(got, Some(wanted), "{} needs rounded input", weights.dtype());
        }
        if rows.is_empty() || columns == 0 {
            return;
        }
        let kernel = self.matmul.kernels[weights.dtype() as usize];
        // SAFETY: this table was reached through `for_isa`, so the CPU can run its functions, and
        // the shapes were checked above and when the views were made.
        unsafe { kernel(weights, activations, rows, out) }
    }
}
