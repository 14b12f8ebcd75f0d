//! Packs blocks of our own types the way that AWQ, GPTQ and FP8 checkpoints have the same numbers.
//! Written from the published layouts, not from the reader: words are built output by output.

#![allow(dead_code, reason = "each test binary uses its part")]

use super::hf_folder::{Format, Stored};
use half::f16;
use tandem::tensor::DType;

/// Which of eight outputs each nibble of an AWQ word has.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Adds the tensors of a layer whose blocks are `data`.
pub fn add(
    all: &mut Vec<Stored>,
    module: &str,
    (dtype, rows, cols): (DType, usize, usize),
    data: &[u8],
    format: Format,
) {
    if matches!(dtype, DType::E4M3_128 | DType::E4M3_32) {
        return add_fp8(all, module, (dtype, rows, cols), data);
    }
    let int4 = Int4::unpack((dtype, rows, cols), data);
    if format == Format::Packed {
        return add_packed(all, module, (rows, cols), &int4);
    }
    let (qweight, qzeros) = match format {
        Format::Awq => (
            words(cols, rows / 8, |k, word, i| int4.quant(8 * word + AWQ_ORDER[i], k)),
            words(cols / int4.group, rows / 8, |g, word, i| int4.zero(8 * word + AWQ_ORDER[i], g)),
        ),
        Format::Gptq | Format::GptqV2 => (
            words(cols / 8, rows, |word, n, i| int4.quant(n, 8 * word + i)),
            words(cols / int4.group, rows / 8, |g, word, i| int4.zero(8 * word + i, g)),
        ),
        _ => panic!("{dtype} as {format:?}"),
    };
    let less = if format == Format::Gptq { 0x1111_1111 } else { 0 };
    let groups = cols / int4.group;
    let scales = (0..groups).flat_map(|g| (0..rows).map(move |n| (g, n)));
    let scales = scales.flat_map(|(g, n)| int4.scales[n * groups + g].to_le_bytes()).collect();
    let shape = match format {
        Format::Awq => [cols, rows / 8],
        _ => [cols / 8, rows],
    };
    let mut push = |name: &str, dtype, shape: &[usize], data: Vec<u8>| {
        all.push(Stored { name: format!("{module}.{name}"), dtype, shape: shape.to_vec(), data });
    };
    let bytes = |words: Vec<u32>, less: u32| {
        words.into_iter().flat_map(|word| word.wrapping_sub(less).to_le_bytes()).collect()
    };
    push("qweight", "I32", &shape, bytes(qweight, 0));
    push("qzeros", "I32", &[groups, rows / 8], bytes(qzeros, less));
    push("scales", "F16", &[groups, rows], scales);
    if format != Format::Awq {
        let order = (0..cols).flat_map(|k| ((k / int4.group) as i32).to_le_bytes()).collect();
        push("g_idx", "I32", &[cols], order);
    }
}

/// compressed-tensors: quants and zero points are signed, and packed with 8 added; quants along a
/// row, zero points along the outputs.
fn add_packed(all: &mut Vec<Stored>, module: &str, (rows, cols): (usize, usize), int4: &Int4) {
    let groups = cols / int4.group;
    let signed = |value: u32| value as i32 - 8;
    let packed = |values: [i32; 8]| {
        let places = values.into_iter().enumerate();
        places.map(|(place, value)| ((value + 8) as u32) << (4 * place)).sum::<u32>()
    };
    let quants = (0..rows).flat_map(|n| (0..cols / 8).map(move |word| (n, word)));
    let quants = quants.map(|(n, word)| {
        packed(std::array::from_fn(|place| signed(int4.quant(n, 8 * word + place))))
    });
    let zeros = (0..rows / 8).flat_map(|word| (0..groups).map(move |g| (word, g)));
    let zeros = zeros.map(|(word, g)| {
        packed(std::array::from_fn(|place| signed(int4.zero(8 * word + place, g))))
    });
    let shape = [rows as i64, cols as i64].into_iter().flat_map(i64::to_le_bytes).collect();
    for (name, dtype, shape, data) in [
        ("weight_packed", "I32", vec![rows, cols / 8], quants.flat_map(u32::to_le_bytes).collect()),
        ("weight_zero_point", "I32", vec![rows / 8, groups], {
            zeros.flat_map(u32::to_le_bytes).collect()
        }),
        ("weight_scale", "F16", vec![rows, groups], {
            int4.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect()
        }),
        ("weight_shape", "I64", vec![2], shape),
    ] {
        all.push(Stored { name: format!("{module}.{name}"), dtype, shape, data });
    }
}

/// `[a, b]` words of eight nibbles.
fn words(a: usize, b: usize, nibble: impl Fn(usize, usize, usize) -> u32) -> Vec<u32> {
    let places = (0..a).flat_map(|a| (0..b).map(move |b| (a, b)));
    places.map(|(a, b)| (0..8).map(|i| nibble(a, b, i) << (4 * i)).sum()).collect()
}

/// Numbers of a matrix, `[rows, cols]` and `[rows, groups]`.
struct Int4 {
    group: usize,
    cols: usize,
    quants: Vec<u8>,
    zeros: Vec<u8>,
    scales: Vec<f16>,
}

impl Int4 {
    fn quant(&self, row: usize, col: usize) -> u32 {
        u32::from(self.quants[row * self.cols + col])
    }

    fn zero(&self, row: usize, group: usize) -> u32 {
        u32::from(self.zeros[row * (self.cols / self.group) + group])
    }

    fn unpack((dtype, rows, cols): (DType, usize, usize), data: &[u8]) -> Self {
        let (group, quants_at) = match dtype {
            DType::INT4_128 => (128, 3),
            DType::INT4_64 => (64, 3),
            DType::INT4_32 => (32, 5),
            other => panic!("{other}"),
        };
        let mut all = Self {
            group,
            cols,
            quants: Vec::with_capacity(rows * cols),
            zeros: Vec::new(),
            scales: Vec::new(),
        };
        for block in data.chunks_exact(dtype.block_bytes()) {
            let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
            if dtype == DType::INT4_32 {
                all.scales.extend([half(0), half(2)]);
                all.zeros.extend([block[4] & 15, block[4] >> 4]);
            } else {
                all.scales.push(half(0));
                all.zeros.push(block[2]);
            }
            for group in block[quants_at..].chunks_exact(16) {
                all.quants.extend(group.iter().map(|byte| byte & 15));
                all.quants.extend(group.iter().map(|byte| byte >> 4));
            }
        }
        all
    }
}

fn add_fp8(
    all: &mut Vec<Stored>,
    module: &str,
    (dtype, rows, cols): (DType, usize, usize),
    data: &[u8],
) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for block in data.chunks_exact(dtype.block_bytes()) {
        let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        scales.extend_from_slice(&(scale / 256.0).to_le_bytes());
        codes.extend_from_slice(&block[4..]);
    }
    let scale_shape = vec![rows, cols / dtype.block_elements()];
    for (name, dtype, shape, data) in [
        ("weight", "F8_E4M3", vec![rows, cols], codes),
        ("weight_scale_inv", "F32", scale_shape, scales),
    ] {
        all.push(Stored { name: format!("{module}.{name}"), dtype, shape, data });
    }
}
