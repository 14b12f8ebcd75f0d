//! Owns the gated activations of feed-forward layers. It must not know the layer's shape: gate and
//! up are two runs of equal length. Called by the executor's workers between two matmuls.
//!
//! `out = act(gate) · up` (Shazeer, arXiv 2002.05202), with `silu(x) = x / (1 + e^−x)` or the tanh
//! form of GELU, `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))` (Hendrycks, arXiv 1606.08415).

pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod simd;

use crate::dispatch::Kernels;

impl Kernels {
    /// `gate[i] = silu(gate[i]) · up[i]`.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn swiglu(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up");
        // SAFETY: the table came from `for_isa`; the lengths are equal.
        unsafe { (self.vector.swiglu)(gate, up) }
    }

    /// `gate[i] = gelu(gate[i]) · up[i]` with the tanh form of GELU.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn geglu(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up");
        // SAFETY: the table came from `for_isa`; the lengths are equal.
        unsafe { (self.vector.geglu)(gate, up) }
    }
}
