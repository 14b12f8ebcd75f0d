//! The specification of matmul: plain loops over decoded groups, in the fixed order.

use super::{Layout, MatmulFn, MatmulTable, MatrixView, OutputColumns};
use crate::activations::{Activations, GroupScale};
use crate::blocks::{DType, GROUP};
use crate::dequantize::{Group, Min, Scales, decode_group, dequantize_row};
use crate::repack::unpack_block;
use std::ops::Range;

pub(crate) const TABLE: MatmulTable = MatmulTable {
    kernels: {
        let mut kernels: [MatmulFn; DType::COUNT] = [quantized; DType::COUNT];
        kernels[DType::F32 as usize] = float;
        kernels[DType::F16 as usize] = float;
        kernels[DType::BF16 as usize] = float;
        kernels[DType::E4M3_128 as usize] = float;
        kernels[DType::E4M3_32 as usize] = float;
        kernels
    },
};

/// Bytes of the largest block, `Q6_K`.
pub(super) const BLOCK_BYTES_MAX: usize = 210;
/// Elements of the largest block of floats.
const FLOAT_BLOCK_MAX: usize = 128;

/// Quantised weights in any layout.
fn quantized(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    let Some(quantized) = x.quantized() else { return };
    let dtype = weights.dtype();
    let groups_per_block = dtype.block_elements() / GROUP;
    let groups = weights.cols() / GROUP;
    let mut block = [0; BLOCK_BYTES_MAX];
    let block = &mut block[..dtype.block_bytes()];
    for row in rows {
        for column in 0..x.columns() {
            write(out, column, row, 0.0);
        }
        for group in 0..groups {
            if group % groups_per_block == 0 {
                read_block(weights, row, group / groups_per_block, block);
            }
            let decoded = decode_group(dtype, block, group % groups_per_block);
            for column in 0..x.columns() {
                let (quants, scale) = quantized.group(column, group);
                let sum = accumulate(read(out, column, row), &decoded, quants, scale);
                write(out, column, row, sum);
            }
        }
    }
}

pub(super) fn read_block(weights: &MatrixView<'_>, row: usize, index: usize, block: &mut [u8]) {
    match weights.layout() {
        Layout::RowMajor => {
            let start = row * weights.row_bytes() + index * block.len();
            block.copy_from_slice(&weights.bytes()[start..][..block.len()]);
        }
        Layout::Rows16 => unpack_block(weights, row, index, block),
    }
}

/// One step of the accumulation; `mul_add` rounds once, as the FMA of the SIMD kernels does.
fn accumulate(acc: f32, weights: &Group, quants: &[i8], x: &GroupScale) -> f32 {
    let halves: [i32; 2] = std::array::from_fn(|half| {
        let range = half * GROUP / 2..(half + 1) * GROUP / 2;
        let pairs = weights.quants[range.clone()].iter().zip(&quants[range]);
        pairs.map(|(&w, &x)| i32::from(w) * i32::from(x)).sum()
    });
    let acc = match weights.scales {
        Scales::One(scale) => ((halves[0] + halves[1]) as f32).mul_add(scale * x.scale, acc),
        Scales::Halves([low, high]) => {
            let acc = (halves[0] as f32).mul_add(low * x.scale, acc);
            (halves[1] as f32).mul_add(high * x.scale, acc)
        }
    };
    match weights.min {
        Min::None => acc,
        Min::One(min) => min.mul_add(x.scaled_sum, acc),
        Min::Halves { scale, mins } => {
            let [low, high] = x.less_sums.map(i32::from);
            let less = mins[0] * low + mins[1] * high;
            (less as f32).mul_add(-scale * x.scale, acc)
        }
    }
}

/// Float weights: 32 partial sums, then pairs at distance 16, 8, 4, 2, 1.
pub(super) fn float(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    let dtype = weights.dtype();
    // What is decoded at once: a block, or a group of elements that have none.
    let (elements, bytes_at_once) = match dtype.block_elements() {
        1 => (GROUP, GROUP * dtype.block_bytes()),
        elements => (elements, dtype.block_bytes()),
    };
    for row in rows {
        let bytes = &weights.bytes()[row * weights.row_bytes()..][..weights.row_bytes()];
        for column in 0..x.columns() {
            let mut partial = [0.0; GROUP];
            let chunks = bytes.chunks(bytes_at_once).zip(x.column(column).chunks(elements));
            for (bytes, x) in chunks {
                // A short last chunk adds 0·0, like the masked loads of the SIMD kernels.
                let mut chunk = ([0.0; FLOAT_BLOCK_MAX], [0.0; FLOAT_BLOCK_MAX]);
                dequantize_row(dtype, bytes, &mut chunk.0[..x.len()]);
                chunk.1[..x.len()].copy_from_slice(x);
                for element in 0..elements {
                    let partial = &mut partial[element % GROUP];
                    *partial = chunk.0[element].mul_add(chunk.1[element], *partial);
                }
            }
            write(out, column, row, tree_sum(partial));
        }
    }
}

/// Adds pairs at distance 16, 8, 4, 2, 1.
pub(super) fn tree_sum(mut partial: [f32; GROUP]) -> f32 {
    let mut distance = GROUP / 2;
    while distance > 0 {
        for lane in 0..distance {
            partial[lane] += partial[lane + distance];
        }
        distance /= 2;
    }
    partial[0]
}

pub(super) fn read(out: OutputColumns<'_>, column: usize, row: usize) -> f32 {
    // SAFETY: `at` points into the output, and this thread owns the row (see `OutputColumns`).
    unsafe { out.at(column, row).read() }
}

pub(super) fn write(out: OutputColumns<'_>, column: usize, row: usize, value: f32) {
    // SAFETY: `at` points into the output, and this thread owns the row (see `OutputColumns`).
    unsafe { out.at(column, row).write(value) }
}
