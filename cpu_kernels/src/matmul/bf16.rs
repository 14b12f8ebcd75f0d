//! The arithmetic of quantised weights on bf16 tiles, and its specification. It is another one
//! than that of 8-bit activations: weights *and* activations are bf16, and sums stay in f32 over
//! the whole row, so that nothing is left to be scaled product by product.
//!
//! ```text
//! weight:  step   = r11(scale)                        scale, min: f32, as the type defines them
//!          offset = r11(fma(scale, middle, min))      types with offsets: q − middle is about 0
//!          w      = r8(r11(step · (q − middle) + offset))
//! sum:     acc = 0
//!          for each group of 32:  even = odd = 0
//!            for each of 16 pairs (a, b), in the order 0 2, 1 3, 4 6, 5 7, …:
//!              even = fma(w[a], x[a], even);  odd = fma(w[b], x[b], odd)
//!            acc = acc + (even + odd)
//! ```
//! `r11` rounds to the 11 bits of an f16 significand, ties to even, `r8` to the 8 bits of bf16,
//! ties away from zero, both with exponents of any size; products and sums are f32 without
//! subnormal numbers. The sums are what `TDPBF16PS` does (Intel SDM, volume 2). A weight is off by
//! up to 2⁻⁸ of itself, an activation too: on average a fifth of what 8 bits with a scale per group
//! miss.
//!
//! **Why these roundings.** Small integers times a scale, in f16 vectors, are 32 weights at a time.
//! Every weight of every type is a whole multiple of 2⁻²⁴ (a scale is an f16 times an integer), so
//! times 2¹⁰ it is zero or a normal f16, if it is below 64; larger ones take a slow way with the
//! same result. Bits of an f16, shifted right by 3 under the sign, are those of a bf16 whose
//! exponent is smaller by 112. So tiles see weights times 2⁻¹⁰² and activations times 2⁶⁴: the sums
//! are too small by 2³⁸, which stays far from both ends of f32.

use super::{MatmulFn, MatmulTable, MatrixView, OutputColumns, scalar};
use crate::activations::{Activations, BF16_EXPONENT, BF16_ORDER, Line};
use crate::blocks::{DType, GROUP};
use crate::dequantize::decode_group;
use std::ops::Range;

/// Power of two that weights are multiplied with before they become f16.
pub(super) const F16_EXPONENT: i32 = 10;
/// What the exponents of f16 and bf16 differ by.
const BIAS_DIFFERENCE: i32 = 127 - 15;
/// Power of two that a weight is multiplied with in a tile.
const WEIGHT_EXPONENT: i32 = F16_EXPONENT - BIAS_DIFFERENCE;

pub(crate) const SPECIFICATION: MatmulTable = MatmulTable {
    kernels: {
        let mut kernels: [MatmulFn; DType::COUNT] = [quantized; DType::COUNT];
        kernels[DType::F32 as usize] = scalar::float;
        kernels[DType::F16 as usize] = scalar::float;
        kernels[DType::BF16 as usize] = scalar::float;
        kernels[DType::E4M3_128 as usize] = scalar::float;
        kernels[DType::E4M3_32 as usize] = scalar::float;
        kernels
    },
};

/// What finished sums are multiplied with.
pub(super) const RESULT_FACTOR: f32 = {
    let exponent = -(WEIGHT_EXPONENT + BF16_EXPONENT);
    assert!(exponent > -127 && exponent < 128);
    f32::from_bits(((127 + exponent) as u32) << 23)
};

/// The integer that the quants of a type with offsets are taken about.
pub(super) const fn middle(dtype: DType) -> i16 {
    match dtype {
        DType::Q2_K => 2,
        DType::Q4_1 | DType::Q4_K | DType::INT4_128 | DType::INT4_64 | DType::INT4_32 => 8,
        DType::Q5_1 | DType::Q5_K => 16,
        _ => 0,
    }
}

/// A group of weights as a tile has them, in the order of activations.
pub(super) fn weights(dtype: DType, block: &[u8], index: usize) -> Line {
    let group = decode_group(dtype, block, index);
    let middle = middle(dtype);
    let mut line = Line::default();
    for (place, out) in line.0.iter_mut().enumerate() {
        let element = place / 4 * 4 + BF16_ORDER[place % 4];
        let half = element / (GROUP / 2);
        let scale = group.scales.of_half(half);
        let step = to_eleven_bits(f64::from(scale));
        let integer = i16::from(group.quants[element]) - middle;
        // Exact: multiples of 2⁻²⁴ below 2²⁹.
        let mut weight = step * f64::from(integer);
        if let Some(min) = group.min.of_half(half) {
            let offset = scale.mul_add(f32::from(middle), min);
            weight += to_eleven_bits(f64::from(offset));
        }
        *out = to_bf16(to_eleven_bits(weight));
    }
    line
}

/// To 11 significant bits, ties to even; exponents of any size.
fn to_eleven_bits(value: f64) -> f64 {
    const DROPPED: u32 = 52 - 10;
    if !value.is_finite() {
        return value;
    }
    let bits = value.to_bits();
    let half_less = (1 << (DROPPED - 1)) - 1;
    let rounded = bits + half_less + (bits >> DROPPED & 1);
    f64::from_bits(rounded >> DROPPED << DROPPED)
}

/// To 8 significant bits, ties away from zero, with the exponent of weights in tiles.
fn to_bf16(value: f64) -> u16 {
    const DROPPED: u32 = 52 - 7;
    let bits = value.to_bits() + if value.is_finite() { 1 << (DROPPED - 1) } else { 0 };
    let rounded = f64::from_bits(bits >> DROPPED << DROPPED);
    // Within the normal numbers of f32: multiples of 2⁻¹²⁶ below 2⁻⁷³.
    ((rounded * 2f64.powi(WEIGHT_EXPONENT)) as f32).to_bits().wrapping_shr(16) as u16
}

/// The specification: see the module.
fn quantized(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    let Some(x) = x.bf16() else { return };
    let dtype = weights.dtype();
    let groups_per_block = dtype.block_elements() / GROUP;
    let mut block = [0; scalar::BLOCK_BYTES_MAX];
    let block = &mut block[..dtype.block_bytes()];
    for row in rows {
        for column in 0..out.columns() {
            scalar::write(out, column, row, 0.0);
        }
        for group in 0..weights.cols() / GROUP {
            if group % groups_per_block == 0 {
                scalar::read_block(weights, row, group / groups_per_block, block);
            }
            let line = self::weights(dtype, block, group % groups_per_block);
            for column in 0..out.columns() {
                let sum = scalar::read(out, column, row);
                let acc = add_products(sum, &line, x.line(column, group));
                scalar::write(out, column, row, acc);
            }
        }
        for column in 0..out.columns() {
            scalar::write(out, column, row, scalar::read(out, column, row) * RESULT_FACTOR);
        }
    }
}

/// One `TDPBF16PS` for one row and one column.
pub(super) fn add_products(acc: f32, weights: &Line, x: &Line) -> f32 {
    let [mut even, mut odd] = [0.0; 2];
    for (w, x) in weights.0.as_chunks::<2>().0.iter().zip(x.0.as_chunks::<2>().0) {
        even = normal(value(w[0]).mul_add(value(x[0]), even));
        odd = normal(value(w[1]).mul_add(value(x[1]), odd));
    }
    normal(acc + normal(even + odd))
}

fn value(bf16: u16) -> f32 {
    normal(f32::from_bits(u32::from(bf16) << 16))
}

/// The number itself, or zero for a subnormal one.
fn normal(value: f32) -> f32 {
    if value.is_subnormal() { 0f32.copysign(value) } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roundings_are_to_the_bits_named() {
        assert_eq!(to_eleven_bits(2049.0), 2048.0);
        assert_eq!(to_eleven_bits(2051.0), 2052.0);
        assert_eq!(to_eleven_bits(-0.1), f64::from(half::f16::from_f32(-0.1)));
        let bf16 =
            |value: f64| f64::from(super::value(to_bf16(value))) * 2f64.powi(-WEIGHT_EXPONENT);
        assert_eq!([bf16(257.0), bf16(-257.0), bf16(256.9)], [258.0, -258.0, 256.0]);
        assert_eq!(bf16(2f64.powi(-24)), 2f64.powi(-24), "the smallest weight is kept");
        assert_eq!(bf16(65504.0 * 128.0 * 32.0), 2f64.powi(28), "and the largest");
        assert!(super::value(to_bf16(f64::NAN)).is_nan());
        assert_eq!(super::value(to_bf16(f64::NEG_INFINITY)), f32::NEG_INFINITY);
    }
}
