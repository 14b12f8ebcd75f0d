//! Owns the meaning of quantised bytes: what f32 value each element of a block stands for.
//! It must not know matrices, activations or instruction sets: it is the specification of them all.
//! Called for embedding rows, by the scalar matmul, and by every test as the oracle.

mod group;

use crate::blocks::{DType, GROUP};
pub(crate) use group::{Group, IQ4_CODEBOOK, Min, Scales, decode_group};
use half::{bf16, f16};

/// Writes the f32 values of one row (or any whole number of blocks).
///
/// `bytes` are `out.len()` elements of type `dtype` in file order. The result is exactly the f32
/// arithmetic of the formula in [`DType`], each operation rounded once.
///
/// # Panics
/// When `bytes.len()` is not `dtype.row_bytes(out.len())`.
pub fn dequantize_row(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(dtype.row_bytes(out.len()), Some(bytes.len()), "{dtype} row of {}", out.len());
    match dtype {
        DType::F32 => convert(bytes, out, f32::from_le_bytes),
        DType::F16 => convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        DType::BF16 => convert(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        DType::E4M3_128 | DType::E4M3_32 => {
            let blocks = bytes.chunks_exact(dtype.block_bytes());
            for (block, out) in blocks.zip(out.chunks_exact_mut(dtype.block_elements())) {
                write_e4m3(block, out);
            }
        }
        _ => {
            let blocks = bytes.chunks_exact(dtype.block_bytes());
            for (block, out) in blocks.zip(out.chunks_exact_mut(dtype.block_elements())) {
                for (index, out) in out.chunks_exact_mut(GROUP).enumerate() {
                    write_group(&decode_group(dtype, block, index), out);
                }
            }
        }
    }
}

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    for (bytes, out) in bytes.as_chunks::<N>().0.iter().zip(out) {
        *out = value(*bytes);
    }
}

/// An f32 scale, then the elements.
fn write_e4m3(block: &[u8], out: &mut [f32]) {
    let (scale, elements) = block.split_at(size_of::<f32>());
    let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
    for (bits, out) in elements.iter().zip(out) {
        *out = scale * half_of_e4m3(*bits).to_f32();
    }
}

/// The bits of an e4m3 in an f16, whose exponent's bias is 8 more: 1/256 of the value, exactly.
pub(crate) fn half_of_e4m3(bits: u8) -> f16 {
    let bits = u16::from(bits);
    f16::from_bits((bits & 0x80) << 8 | (bits & 0x7f) << 7)
}

fn write_group(group: &Group, out: &mut [f32]) {
    for (half, out) in out.chunks_exact_mut(GROUP / 2).enumerate() {
        let quants = &group.quants[half * GROUP / 2..];
        let scale = group.scales.of_half(half);
        match group.min.of_half(half) {
            None => out.iter_mut().zip(quants).for_each(|(out, &q)| *out = scale * f32::from(q)),
            Some(min) => {
                out.iter_mut().zip(quants).for_each(|(out, &q)| *out = scale * f32::from(q) + min)
            }
        }
    }
}
