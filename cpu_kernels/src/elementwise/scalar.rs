//! The specification of the elementwise operations.

/// `x[i] += addend[i]`; equal lengths.
///
/// # Safety
/// None is needed; the signature is the table's.
pub(crate) unsafe fn add(x: &mut [f32], addend: &[f32]) {
    for (x, addend) in x.iter_mut().zip(addend) {
        *x += addend;
    }
}

/// `x[i] *= factor`.
///
/// # Safety
/// None is needed; the signature is the table's.
pub(crate) unsafe fn scale(x: &mut [f32], factor: f32) {
    for x in x {
        *x *= factor;
    }
}

/// `x[i] = cap · tanh(x[i] / cap)`.
///
/// # Safety
/// None is needed; the signature is the table's.
pub(crate) unsafe fn softcap(x: &mut [f32], cap: f32) {
    for x in x {
        *x = softcap_one(*x, cap);
    }
}

/// `cap · tanh(x / cap)`.
pub(crate) fn softcap_one(x: f32, cap: f32) -> f32 {
    cap * (x / cap).tanh()
}
