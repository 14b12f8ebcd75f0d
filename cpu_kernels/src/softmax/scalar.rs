//! The specification of the parts of softmax: sums in f64.

/// The largest entry; NaN if any entry is NaN; −∞ for an empty row.
///
/// # Safety
/// None is needed; the signature is the table's.
pub(crate) unsafe fn max(row: &[f32]) -> f32 {
    let mut max = f32::NEG_INFINITY;
    for value in row {
        if value.is_nan() {
            return f32::NAN;
        }
        max = max.max(*value);
    }
    max
}

/// `Σ e^(row[i] − shift)`; `shift` is finite and no entry exceeds it by more than 80.
///
/// # Safety
/// None is needed; the signature is the table's.
pub(crate) unsafe fn sum_exp_minus(row: &[f32], shift: f32) -> f64 {
    row.iter().map(|value| f64::from((value - shift).exp())).sum()
}

/// `row[i] = e^(row[i] − shift)`; returns the sum of the new entries.
///
/// # Safety
/// None is needed; the signature is the table's.
pub(crate) unsafe fn exp_minus(row: &mut [f32], shift: f32) -> f64 {
    let mut sum = 0.0f64;
    for value in row {
        *value = (*value - shift).exp();
        sum += f64::from(*value);
    }
    sum
}
