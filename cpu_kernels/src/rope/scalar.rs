//! The specification of the rotation.

use super::RopeRow;

/// Turns pairs `(2i, 2i + 1)` of `head`.
///
/// # Safety
/// `head` has at least `2 · row.cos.len()` elements; `cos` and `sin` have one length.
pub(crate) unsafe fn rope_interleaved(head: &mut [f32], row: RopeRow<'_>) {
    for (i, (cos, sin)) in row.cos.iter().zip(row.sin).enumerate() {
        let (a, b) = (head[2 * i], head[2 * i + 1]);
        head[2 * i] = a * cos - b * sin;
        head[2 * i + 1] = b * cos + a * sin;
    }
}

/// Turns pairs `(i, i + dims/2)` of `head`.
///
/// # Safety
/// As [`rope_interleaved`].
pub(crate) unsafe fn rope_half_split(head: &mut [f32], row: RopeRow<'_>) {
    let half = row.cos.len();
    for (i, (cos, sin)) in row.cos.iter().zip(row.sin).enumerate() {
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}
