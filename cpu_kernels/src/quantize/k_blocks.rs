//! Blocks of 256 elements: scales of sub-blocks are integers in units of the block's f16 scale.

use super::small_blocks::codebook_quants;
use super::{bounds, extreme, nearest, store_f16, store_nibbles};

/// Integer scales and mins of a block's sub-blocks, with the f16 units they are stored in.
struct Scales<const N: usize> {
    d: f32,
    dmin: f32,
    scales: [i32; N],
    mins: [i32; N],
}

/// For types with offsets: `quant_max` steps from `−min ≤ 0` upwards; both integers fit
/// `0..=scale_max`.
fn ranges<const N: usize>(
    values: &[f32],
    quant_max: f32,
    scale_max: i32,
    out: (&mut [u8], usize),
) -> Scales<N> {
    let sub_blocks = |i: usize| &values[i * (256 / N)..][..256 / N];
    let wanted: [(f32, f32); N] = std::array::from_fn(|i| {
        let (low, high) = bounds(sub_blocks(i));
        let low = low.min(0.0);
        ((high.max(low) - low) / quant_max, -low)
    });
    let largest = |of: fn(&(f32, f32)) -> f32| wanted.iter().map(of).fold(0.0, f32::max);
    let d = store_f16(out.0, out.1, largest(|w| w.0) / scale_max as f32);
    let dmin = store_f16(out.0, out.1 + 2, largest(|w| w.1) / scale_max as f32);
    Scales {
        d,
        dmin,
        scales: wanted.map(|(scale, _)| nearest(scale, d, 0, scale_max)),
        mins: wanted.map(|(_, min)| nearest(min, dmin, 0, scale_max)),
    }
}

impl<const N: usize> Scales<N> {
    /// Integers `0..=quant_max` of all 256 elements.
    fn quants(&self, values: &[f32], quant_max: i32) -> [u8; 256] {
        std::array::from_fn(|element| {
            let sub_block = element / (256 / N);
            let step = self.d * self.scales[sub_block] as f32;
            let offset = self.dmin * self.mins[sub_block] as f32;
            nearest(values[element] + offset, step, 0, quant_max) as u8
        })
    }
}

/// For types without offsets: the extreme element of each sub-block becomes `quant_min`, and the
/// extreme scale `scale_min`. Returns the block's scale and the integer scales.
fn symmetric<const N: usize>(
    values: &[f32],
    quant_min: f32,
    scale_min: i32,
    out: (&mut [u8], usize),
) -> (f32, [i32; N]) {
    let wanted: [f32; N] =
        std::array::from_fn(|i| extreme(&values[i * (256 / N)..][..256 / N]) / quant_min);
    let d = store_f16(out.0, out.1, extreme(&wanted) / scale_min as f32);
    (d, wanted.map(|scale| nearest(scale, d, scale_min, -scale_min - 1)))
}

/// Integers of all 256 elements, shifted by `−quant_min` to start at 0.
fn symmetric_quants(values: &[f32], d: f32, scales: &[i32], quant_min: i32) -> [u8; 256] {
    std::array::from_fn(|element| {
        let step = d * scales[element / (256 / scales.len())] as f32;
        (nearest(values[element], step, quant_min, -quant_min - 1) - quant_min) as u8
    })
}

/// Two bits of each element: element `32·(4a + b) + l` in bits `2b` of byte `32a + l`.
fn store_crumbs(out: &mut [u8], quants: impl Fn(usize) -> u8) {
    for element in 0..256 {
        let (byte, shift) = (element / 128 * 32 + element % 32, element / 32 % 4 * 2);
        out[byte] |= (quants(element) & 3) << shift;
    }
}

/// One bit of each element: element `32·g + l` in bit `g` of byte `l`.
fn store_bits(out: &mut [u8], bit: impl Fn(usize) -> u8) {
    for element in 0..256 {
        out[element % 32] |= (bit(element) & 1) << (element / 32);
    }
}

pub(super) fn q2_k(values: &[f32], out: &mut [u8]) {
    let scales: Scales<16> = ranges(values, 3.0, 15, (out, 80));
    let packed = scales.scales.iter().zip(&scales.mins);
    for (out, (&scale, &min)) in out.iter_mut().zip(packed) {
        *out = scale as u8 | (min as u8) << 4;
    }
    let quants = scales.quants(values, 3);
    store_crumbs(&mut out[16..80], |element| quants[element]);
}

pub(super) fn q3_k(values: &[f32], out: &mut [u8]) {
    let (d, scales): (f32, [i32; 16]) = symmetric(values, -4.0, -32, (out, 108));
    for (i, scale) in scales.iter().enumerate() {
        let scale = (scale + 32) as u8;
        out[96 + i % 8] |= (scale & 15) << (4 * (i / 8));
        out[104 + i % 4] |= (scale >> 4) << (2 * (i / 4));
    }
    let quants = symmetric_quants(values, d, &scales, -4);
    store_bits(&mut out[..32], |element| quants[element] >> 2);
    store_crumbs(&mut out[32..96], |element| quants[element]);
}

/// The 12 bytes of 6-bit scales and mins of `Q4_K` and `Q5_K`.
fn store_six_bits(out: &mut [u8], scales: &Scales<8>) {
    for i in 0..4 {
        let (scale, min) = (scales.scales[i] as u8, scales.mins[i] as u8);
        let (scale_late, min_late) = (scales.scales[i + 4] as u8, scales.mins[i + 4] as u8);
        out[i] = scale | (scale_late >> 4) << 6;
        out[i + 4] = min | (min_late >> 4) << 6;
        out[i + 8] = (scale_late & 15) | min_late << 4;
    }
}

fn store_paired_nibbles(out: &mut [u8], quants: &[u8; 256]) {
    for (out, quants) in out.chunks_exact_mut(32).zip(quants.chunks_exact(64)) {
        store_nibbles(out, quants);
    }
}

pub(super) fn q4_k(values: &[f32], out: &mut [u8]) {
    let scales = ranges(values, 15.0, 63, (out, 0));
    store_six_bits(&mut out[4..16], &scales);
    store_paired_nibbles(&mut out[16..], &scales.quants(values, 15));
}

pub(super) fn q5_k(values: &[f32], out: &mut [u8]) {
    let scales = ranges(values, 31.0, 63, (out, 0));
    store_six_bits(&mut out[4..16], &scales);
    let quants = scales.quants(values, 31);
    store_bits(&mut out[16..48], |element| quants[element] >> 4);
    store_paired_nibbles(&mut out[48..], &quants);
}

pub(super) fn q6_k(values: &[f32], out: &mut [u8]) {
    let (d, scales): (f32, [i32; 16]) = symmetric(values, -32.0, -128, (out, 208));
    for (out, scale) in out[192..208].iter_mut().zip(scales) {
        *out = scale as i8 as u8;
    }
    let quants = symmetric_quants(values, d, &scales, -32);
    for (out, quants) in out[..128].chunks_exact_mut(64).zip(quants.chunks_exact(128)) {
        store_nibbles(out, quants);
    }
    store_crumbs(&mut out[128..192], |element| quants[element] >> 4);
}

pub(super) fn iq4_xs(values: &[f32], out: &mut [u8]) {
    let (d, scales): (f32, [i32; 8]) = symmetric(values, -127.0, -32, (out, 0));
    let mut high = 0u16;
    for (i, (&scale, values)) in scales.iter().zip(values.chunks_exact(32)).enumerate() {
        let stored = (scale + 32) as u8;
        high |= u16::from(stored >> 4) << (2 * i);
        out[4 + i / 2] |= (stored & 15) << (4 * (i % 2));
        let quants = codebook_quants(values, d * scale as f32);
        store_nibbles(&mut out[8 + 16 * i..][..16], &quants);
    }
    out[2..4].copy_from_slice(&high.to_le_bytes());
}
