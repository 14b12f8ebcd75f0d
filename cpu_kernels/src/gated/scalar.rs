//! The specification of the gated activations, through the standard library's functions.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

/// `2·√(2/π)`: `(1 + tanh u)/2 = 1/(1 + e^−2u)`, so the tanh form of GELU is a scaled SiLU.
pub(crate) const GELU_SLOPE: f32 = (2.0 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2) as f32;
/// The cubic term inside the tanh form of GELU.
pub(crate) const GELU_CUBIC: f32 = 0.044_715;

/// `gate[i] = silu(gate[i]) · up[i]`; equal lengths.
///
/// # Safety
/// None is needed; the signature is the table's.
pub(crate) unsafe fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + (-*gate).exp()) * up;
    }
}

/// `gate[i] = gelu(gate[i]) · up[i]`; equal lengths.
///
/// # Safety
/// None is needed; the signature is the table's.
pub(crate) unsafe fn geglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let x = *gate;
        let twice_u = GELU_SLOPE * (x + GELU_CUBIC * x * x * x);
        *gate = x / (1.0 + (-twice_u).exp()) * up;
    }
}
