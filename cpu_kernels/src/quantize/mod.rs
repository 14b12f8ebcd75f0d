//! Owns a plain quantiser for every type: round to nearest with scales from minima and maxima.
//! It must not know matrices or instruction sets, and it is not tuned for quality.
//! Called by tests and by builders of synthetic models; real models come quantised.

mod k_blocks;
mod server_blocks;
mod small_blocks;

use crate::blocks::DType;
use half::{bf16, f16};

/// Encodes one row (or any whole number of blocks) as `dtype`, the inverse of
/// [`crate::dequantize_row`] up to rounding.
///
/// # Panics
/// When `out.len()` is not `dtype.row_bytes(values.len())`.
pub fn quantize_row(dtype: DType, values: &[f32], out: &mut [u8]) {
    assert_eq!(dtype.row_bytes(values.len()), Some(out.len()), "{dtype} row of {}", values.len());
    let values = values.chunks_exact(dtype.block_elements());
    for (values, out) in values.zip(out.chunks_exact_mut(dtype.block_bytes())) {
        quantize_block(dtype, values, out);
    }
}

fn quantize_block(dtype: DType, values: &[f32], out: &mut [u8]) {
    out.fill(0);
    match dtype {
        DType::F32 => out.copy_from_slice(&values[0].to_le_bytes()),
        DType::F16 => out.copy_from_slice(&f16::from_f32(values[0]).to_le_bytes()),
        DType::BF16 => out.copy_from_slice(&bf16::from_f32(values[0]).to_le_bytes()),
        DType::Q4_0 => small_blocks::q4_0(values, out),
        DType::Q4_1 => small_blocks::q4_1(values, out),
        DType::Q5_0 => small_blocks::q5_0(values, out),
        DType::Q5_1 => small_blocks::q5_1(values, out),
        DType::Q8_0 => small_blocks::q8_0(values, out),
        DType::IQ4_NL => small_blocks::iq4_nl(values, out),
        DType::Q2_K => k_blocks::q2_k(values, out),
        DType::Q3_K => k_blocks::q3_k(values, out),
        DType::Q4_K => k_blocks::q4_k(values, out),
        DType::Q5_K => k_blocks::q5_k(values, out),
        DType::Q6_K => k_blocks::q6_k(values, out),
        DType::IQ4_XS => k_blocks::iq4_xs(values, out),
        DType::INT4_128 | DType::INT4_64 => server_blocks::int4(values, out),
        DType::INT4_32 => server_blocks::int4_pair(values, out),
        DType::E4M3_128 | DType::E4M3_32 => server_blocks::e4m3(values, out),
    }
}

/// Stores a scale as f16 and returns the value that decoders will read.
fn store_f16(out: &mut [u8], offset: usize, value: f32) -> f32 {
    let stored = f16::from_f32(value);
    out[offset..offset + 2].copy_from_slice(&stored.to_le_bytes());
    stored.to_f32()
}

/// `value / step` rounded to the nearest integer in `low..=high`; 0 for a zero step.
fn nearest(value: f32, step: f32, low: i32, high: i32) -> i32 {
    if step == 0.0 {
        return 0.clamp(low, high);
    }
    (value / step).round_ties_even().clamp(low as f32, high as f32) as i32
}

/// The element with the largest magnitude, with its sign.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |a: f32, &b| if b.abs() > a.abs() { b } else { a })
}

/// Smallest and largest element.
fn bounds(values: &[f32]) -> (f32, f32) {
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    (low, values.iter().copied().fold(f32::NEG_INFINITY, f32::max))
}

/// Writes nibbles: element `i` low and element `i + n` high in byte `i`, for `2n` elements.
fn store_nibbles(out: &mut [u8], quants: &[u8]) {
    let (low, high) = quants.split_at(quants.len() / 2);
    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
        *out = (low & 15) | high << 4;
    }
}
