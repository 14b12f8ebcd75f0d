//! Blocks of the types that checkpoints of servers become.

use super::{bounds, extreme, nearest, store_f16, store_nibbles};
use crate::blocks::GROUP;
use crate::dequantize::half_of_e4m3;

/// Largest finite e4m3.
const E4M3_MAX: f32 = 448.0;

/// One scale and one zero point for all groups.
pub(super) fn int4(values: &[f32], out: &mut [u8]) {
    let (d, zero) = scale_and_zero(values, out, 0);
    out[2] = zero;
    store_groups(values, (d, zero), &mut out[3..]);
}

/// Two groups with a scale and a zero point each.
pub(super) fn int4_pair(values: &[f32], out: &mut [u8]) {
    for (index, values) in values.chunks_exact(GROUP).enumerate() {
        let (d, zero) = scale_and_zero(values, out, 2 * index);
        out[4] |= zero << (4 * index);
        store_groups(values, (d, zero), &mut out[5 + 16 * index..]);
    }
}

/// 15 steps from the least to the greatest element, 0 among them.
fn scale_and_zero(values: &[f32], out: &mut [u8], scale_at: usize) -> (f32, u8) {
    let (low, high) = bounds(values);
    let (low, high) = (low.min(0.0), high.max(0.0));
    let d = store_f16(out, scale_at, (high - low) / 15.0);
    (d, nearest(-low, d, 0, 15) as u8)
}

fn store_groups(values: &[f32], (d, zero): (f32, u8), out: &mut [u8]) {
    let zero = i32::from(zero);
    for (values, out) in values.chunks_exact(GROUP).zip(out.chunks_exact_mut(GROUP / 2)) {
        let quants: [u8; GROUP] =
            std::array::from_fn(|i| (nearest(values[i], d, -zero, 15 - zero) + zero) as u8);
        store_nibbles(out, &quants);
    }
}

/// The greatest magnitude becomes 448.
pub(super) fn e4m3(values: &[f32], out: &mut [u8]) {
    let scale = extreme(values).abs() / E4M3_MAX;
    let (stored, elements) = out.split_at_mut(size_of::<f32>());
    stored.copy_from_slice(&(256.0 * scale).to_le_bytes());
    for (value, out) in values.iter().zip(elements) {
        *out = if scale > 0.0 { nearest_e4m3(value / scale) } else { 0 };
    }
}

/// Codes of one sign ascend with their values, so the nearest is beside the first that is not less.
fn nearest_e4m3(value: f32) -> u8 {
    const GREATEST: u8 = 0x7e;
    let of = |code: u8| 256.0 * half_of_e4m3(code).to_f32();
    let magnitude = value.abs();
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let (mut low, mut high) = (0, GREATEST);
    while low < high {
        let middle = (low + high) / 2;
        if of(middle) < magnitude { low = middle + 1 } else { high = middle }
    }
    let below = low.saturating_sub(1);
    let (down, up) = (magnitude - of(below), of(low) - magnitude);
    let nearer = down < up || (down == up && below % 2 == 0);
    sign | if nearer { below } else { low }
}
