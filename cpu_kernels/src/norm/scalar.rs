//! The specification of the norm: the sum of squares in f64, so that it is exact for our purpose.

/// `output[i] = input[i] / sqrt(mean(input²) + eps) · weight[i]`, `i < weight.len()`.
///
/// # Safety
/// `input` and `output` are valid for `weight.len()` elements; they may be the same row.
pub(crate) unsafe fn rms_norm(input: *const f32, weight: &[f32], eps: f32, output: *mut f32) {
    let mut squares = 0.0f64;
    for i in 0..weight.len() {
        // SAFETY: `i` is below the length that the caller vouches for.
        let x = f64::from(unsafe { *input.add(i) });
        squares += x * x;
    }
    let scale = inverse_root(squares, weight.len(), eps);
    for (i, w) in weight.iter().enumerate() {
        // SAFETY: as above; element `i` is read before it is written.
        unsafe { *output.add(i) = *input.add(i) * scale * w };
    }
}

/// `1 / sqrt(squares / n + eps)`, rounded once to f32.
pub(crate) fn inverse_root(squares: f64, n: usize, eps: f32) -> f32 {
    (1.0 / (squares / n as f64 + f64::from(eps)).sqrt()) as f32
}
