//! Blocks of 32 elements.

use super::{bounds, extreme, nearest, store_f16, store_nibbles};
use crate::dequantize::IQ4_CODEBOOK;

pub(super) fn q4_0(values: &[f32], out: &mut [u8]) {
    // The extreme element becomes −8, the only end of the range that is exact.
    let d = store_f16(out, 0, extreme(values) / -8.0);
    store_nibbles(&mut out[2..], &quants(values, d, 0.0, (-8, 7)));
}

pub(super) fn q5_0(values: &[f32], out: &mut [u8]) {
    let d = store_f16(out, 0, extreme(values) / -16.0);
    store_five_bits(&mut out[2..], &quants(values, d, 0.0, (-16, 15)));
}

pub(super) fn q4_1(values: &[f32], out: &mut [u8]) {
    let (d, m) = store_range(values, 15.0, out);
    store_nibbles(&mut out[4..], &quants(values, d, m, (0, 15)));
}

pub(super) fn q5_1(values: &[f32], out: &mut [u8]) {
    let (d, m) = store_range(values, 31.0, out);
    store_five_bits(&mut out[4..], &quants(values, d, m, (0, 31)));
}

pub(super) fn q8_0(values: &[f32], out: &mut [u8]) {
    let d = store_f16(out, 0, extreme(values).abs() / 127.0);
    for (out, &value) in out[2..].iter_mut().zip(values) {
        *out = nearest(value, d, -127, 127) as i8 as u8;
    }
}

pub(super) fn iq4_nl(values: &[f32], out: &mut [u8]) {
    let d = store_f16(out, 0, extreme(values) / -127.0);
    store_nibbles(&mut out[2..], &codebook_quants(values, d));
}

/// Index of the codebook entry nearest to each `value / step`.
pub(super) fn codebook_quants(values: &[f32], step: f32) -> [u8; 32] {
    std::array::from_fn(|element| {
        let target = if step == 0.0 { 0.0 } else { values[element] / step };
        let distance = |index: u8| (f32::from(IQ4_CODEBOOK[usize::from(index)]) - target).abs();
        (1..16).fold(0, |best, index| if distance(index) < distance(best) { index } else { best })
    })
}

/// d and m such that `m ..= m + steps·d` spans the values.
fn store_range(values: &[f32], steps: f32, out: &mut [u8]) -> (f32, f32) {
    let (low, high) = bounds(values);
    (store_f16(out, 0, (high - low) / steps), store_f16(out, 2, low))
}

/// Integers in `range`, shifted to start at 0.
fn quants(values: &[f32], d: f32, m: f32, range: (i32, i32)) -> [u8; 32] {
    std::array::from_fn(|i| (nearest(values[i] - m, d, range.0, range.1) - range.0) as u8)
}

fn store_five_bits(out: &mut [u8], quants: &[u8; 32]) {
    let high = quants.iter().rev().fold(0u32, |bits, q| bits << 1 | u32::from(q >> 4));
    out[..4].copy_from_slice(&high.to_le_bytes());
    store_nibbles(&mut out[4..], quants);
}
