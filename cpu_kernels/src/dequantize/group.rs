//! One decoder per quantised type, all to one form: 32 signed integers with scales and offsets.
//!
//! Elements `32·g .. 32·g + 32` of a block are `scale·q`, or `scale·q + min` where the type has
//! offsets. Types with 16-element sub-blocks have one scale (and min) per half.

use crate::blocks::{DType, GROUP};
use half::f16;

/// The 16 values that an IQ4 nibble selects (ggml's `kvalues_iq4nl`).
pub(crate) const IQ4_CODEBOOK: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// 32 decoded elements.
pub(crate) struct Group {
    /// Integers with the type's zero point already subtracted.
    pub quants: [i8; GROUP],
    /// What one integer step is worth.
    pub scales: Scales,
    /// What is added to every element.
    pub min: Min,
}

/// Scales of a group, already multiplied by the block's.
pub(crate) enum Scales {
    /// The same for all 32 elements.
    One(f32),
    /// One for elements 0..16, one for 16..32.
    Halves([f32; 2]),
}

/// Offsets of a group.
pub(crate) enum Min {
    /// The type has none.
    None,
    /// The same for all 32 elements.
    One(f32),
    /// `scale·mins[half]` for each half.
    Halves {
        /// The block's (negated) scale of mins.
        scale: f32,
        /// Integer mins of elements 0..16 and 16..32.
        mins: [i32; 2],
    },
}

impl Scales {
    pub fn of_half(&self, half: usize) -> f32 {
        match self {
            Scales::One(scale) => *scale,
            Scales::Halves(scales) => scales[half],
        }
    }
}

impl Min {
    pub fn of_half(&self, half: usize) -> Option<f32> {
        match self {
            Min::None => None,
            Min::One(min) => Some(*min),
            Min::Halves { scale, mins } => Some(scale * mins[half] as f32),
        }
    }
}

/// Decodes elements `32·index ..` of one block; `index` is 0 for the 32-element types.
pub(crate) fn decode_group(dtype: DType, block: &[u8], index: usize) -> Group {
    debug_assert_eq!(block.len(), dtype.block_bytes());
    match dtype {
        DType::Q4_0 => plain(read_f16(block, 0), nibbles(&block[2..], |q| q as i8 - 8)),
        DType::Q4_1 => with_min(block, nibbles(&block[4..], |q| q as i8)),
        DType::Q5_0 => plain(read_f16(block, 0), fifth_bits(&block[2..], -16)),
        DType::Q5_1 => with_min(block, fifth_bits(&block[4..], 0)),
        DType::Q8_0 => {
            plain(read_f16(block, 0), std::array::from_fn(|element| block[2 + element] as i8))
        }
        DType::IQ4_NL => {
            plain(read_f16(block, 0), nibbles(&block[2..], |q| IQ4_CODEBOOK[usize::from(q)]))
        }
        DType::Q2_K => q2_k(block, index),
        DType::Q3_K => q3_k(block, index),
        DType::Q4_K => q4_k(block, index),
        DType::Q5_K => q5_k(block, index),
        DType::Q6_K => q6_k(block, index),
        DType::IQ4_XS => iq4_xs(block, index),
        DType::INT4_128 | DType::INT4_64 => {
            int4(read_f16(block, 0), block[2], &block[3 + 16 * index..])
        }
        DType::INT4_32 => {
            let zero = block[4] >> (4 * index) & 15;
            int4(read_f16(block, 2 * index), zero, &block[5 + 16 * index..])
        }
        DType::F32 | DType::F16 | DType::BF16 | DType::E4M3_128 | DType::E4M3_32 => {
            unreachable!("{dtype} is a float")
        }
    }
}

fn read_f16(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

fn plain(scale: f32, quants: [i8; GROUP]) -> Group {
    Group { quants, scales: Scales::One(scale), min: Min::None }
}

/// `Q4_1` and `Q5_1`: d and m open the block.
fn with_min(block: &[u8], quants: [i8; GROUP]) -> Group {
    let (scale, min) = (read_f16(block, 0), read_f16(block, 2));
    Group { quants, scales: Scales::One(scale), min: Min::One(min) }
}

fn int4(scale: f32, zero: u8, quants: &[u8]) -> Group {
    Group {
        quants: nibbles(quants, |q| q as i8),
        scales: Scales::One(scale),
        min: Min::One(-(scale * f32::from(zero))),
    }
}

/// 16 bytes: low nibbles are elements 0..16, high nibbles 16..32.
fn nibbles(bytes: &[u8], value: impl Fn(u8) -> i8) -> [i8; GROUP] {
    std::array::from_fn(|element| {
        let byte = bytes[element % 16];
        value(if element < 16 { byte & 15 } else { byte >> 4 })
    })
}

/// A 32-bit word with the fifth bit of every element, then the nibbles.
fn fifth_bits(bytes: &[u8], offset: i8) -> [i8; GROUP] {
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let low = nibbles(&bytes[4..], |q| q as i8);
    std::array::from_fn(|element| (low[element] | ((high >> element & 1) << 4) as i8) + offset)
}

/// Two bits of each element of 32-element group `index`: four groups share 32 bytes.
fn crumbs(bytes: &[u8], index: usize) -> [u8; GROUP] {
    let (base, shift) = (32 * (index / 4), 2 * (index % 4));
    std::array::from_fn(|element| bytes[base + element] >> shift & 3)
}

/// Four bits of each element of group `index`: two groups share 32 bytes.
fn paired_nibbles(bytes: &[u8], index: usize) -> [u8; GROUP] {
    let (base, shift) = (32 * (index / 2), 4 * (index % 2));
    std::array::from_fn(|element| bytes[base + element] >> shift & 15)
}

fn q2_k(block: &[u8], index: usize) -> Group {
    let (d, dmin) = (read_f16(block, 80), read_f16(block, 82));
    let packed = [block[2 * index], block[2 * index + 1]];
    Group {
        quants: crumbs(&block[16..80], index).map(|q| q as i8),
        scales: Scales::Halves(packed.map(|s| d * f32::from(s & 15))),
        min: Min::Halves { scale: -dmin, mins: packed.map(|s| i32::from(s >> 4)) },
    }
}

fn q3_k(block: &[u8], index: usize) -> Group {
    let d = read_f16(block, 108);
    let low = crumbs(&block[32..96], index);
    let quants = std::array::from_fn(|element| {
        let third = block[element] >> index & 1;
        (low[element] | third << 2) as i8 - 4
    });
    let scale = |half: usize| d * f32::from(q3_k_scale(&block[96..108], 2 * index + half));
    Group { quants, scales: Scales::Halves([scale(0), scale(1)]), min: Min::None }
}

/// Scale `i` of 16: nibble `i` of the first 8 bytes, upper two bits in the last 4 bytes.
fn q3_k_scale(scales: &[u8], i: usize) -> i8 {
    let low = scales[i % 8] >> (4 * (i / 8)) & 15;
    let high = scales[8 + i % 4] >> (2 * (i / 4)) & 3;
    (low | high << 4) as i8 - 32
}

/// 6-bit scale and min `i` of 8, in 12 bytes: the first four of each fill the low 6 bits of bytes
/// 0..8; the last four have their low nibbles in bytes 8..12 and borrow the upper bits of 0..8.
fn q4_k_scale_min(scales: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        return (scales[i] & 63, scales[i + 4] & 63);
    }
    let low = scales[i + 4];
    ((low & 15) | (scales[i - 4] >> 6) << 4, (low >> 4) | (scales[i] >> 6) << 4)
}

fn q4_k_scales(block: &[u8], index: usize) -> (Scales, Min) {
    let (d, dmin) = (read_f16(block, 0), read_f16(block, 2));
    let (scale, min) = q4_k_scale_min(&block[4..16], index);
    (Scales::One(d * f32::from(scale)), Min::One(-(dmin * f32::from(min))))
}

fn q4_k(block: &[u8], index: usize) -> Group {
    let (scales, min) = q4_k_scales(block, index);
    Group { quants: paired_nibbles(&block[16..], index).map(|q| q as i8), scales, min }
}

fn q5_k(block: &[u8], index: usize) -> Group {
    let (scales, min) = q4_k_scales(block, index);
    let low = paired_nibbles(&block[48..], index);
    let quants = std::array::from_fn(|element| {
        let fifth = block[16 + element] >> index & 1;
        (low[element] | fifth << 4) as i8
    });
    Group { quants, scales, min }
}

fn q6_k(block: &[u8], index: usize) -> Group {
    let d = read_f16(block, 208);
    let (half, quarter) = (index / 4, index % 4);
    let high = crumbs(&block[128..192], index);
    let quants = std::array::from_fn(|element| {
        let byte = block[64 * half + 32 * (quarter % 2) + element];
        let low = byte >> (4 * (quarter / 2)) & 15;
        (low | high[element] << 4) as i8 - 32
    });
    let scale = |half: usize| d * f32::from(block[192 + 2 * index + half] as i8);
    Group { quants, scales: Scales::Halves([scale(0), scale(1)]), min: Min::None }
}

fn iq4_xs(block: &[u8], index: usize) -> Group {
    let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * index) & 3;
    let low = block[4 + index / 2] >> (4 * (index % 2)) & 15;
    let scale = (low | (high as u8) << 4) as i8 - 32;
    plain(
        read_f16(block, 0) * f32::from(scale),
        nibbles(&block[8 + 16 * index..], |q| IQ4_CODEBOOK[usize::from(q)]),
    )
}
