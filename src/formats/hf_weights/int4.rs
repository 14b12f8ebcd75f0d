//! AWQ's and GPTQ's 4-bit weights: `scales[g][n] * (q[k][n] - zeros[g][n])` for output n and input
//! k of group g, n being the fastest. Both pack eight quants in an int32:
//!
//! | | qweight | qzeros | scales |
//! |---|---|---|---|
//! | AWQ, `gemm` | `[K, N / 8]` | `[K / group, N / 8]` | `[K / group, N]` f16 |
//! | GPTQ | `[K / 8, N]` | `[K / group, N / 8]` | `[K / group, N]` f16 |
//!
//! Nibble i of AWQ's words is output `8 j + [0, 2, 4, 6, 1, 3, 5, 7][i]`; GPTQ's count up. Version
//! 1 of GPTQ subtracts 0x11111111 from each word of zero points.

use super::recipe::Piece;
use crate::formats::MappedFile;
use crate::tensor::DType;
use std::sync::Arc;
use tandem_cpu_kernels::blocks::GROUP;

/// Which nibble of an AWQ word has output `n % 8`: the inverse of the order above.
const AWQ_NIBBLES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
/// One in each nibble.
const ONES: u32 = 0x1111_1111;

/// Which way eight quants share a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Awq,
    Gptq { zeros_less_one: bool },
}

/// The tensors of a linear layer.
#[derive(Clone, Debug)]
pub(super) struct Int4 {
    pub packing: Packing,
    pub qweight: Piece,
    pub qzeros: Piece,
    pub scales: Piece,
    /// N: rows here.
    pub outputs: usize,
    /// Inputs of a group.
    pub group: usize,
    pub dtype: DType,
}

/// The type that holds groups of this many of `inputs` inputs.
pub(super) fn dtype_of(inputs: usize, group: usize) -> Option<DType> {
    let candidates = [(128, DType::INT4_128), (64, DType::INT4_64), (32, DType::INT4_32)];
    let fits = |(share, dtype): &(usize, DType)| {
        group.is_multiple_of(*share) && inputs.is_multiple_of(dtype.block_elements())
    };
    candidates.into_iter().find(fits).map(|(_, dtype)| dtype)
}

fn word(bytes: &[u8], index: usize) -> u32 {
    let at = 4 * index;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn nibble(word: u32, index: usize) -> u8 {
    (word >> (4 * index) & 15) as u8
}

impl Int4 {
    pub fn pieces(&self) -> [&Piece; 3] {
        [&self.qweight, &self.qzeros, &self.scales]
    }

    /// Writes the blocks of output `row`.
    pub fn read_row(&self, files: &[Arc<MappedFile>], row: usize, out: &mut [u8]) {
        let [qweight, qzeros, scales] = self.pieces().map(|piece| piece.of(files));
        let (outputs, words) = (self.outputs, self.outputs / 8);
        let scale = |input: usize| {
            let at = 2 * (input / self.group * outputs + row);
            [scales[at], scales[at + 1]]
        };
        let zero = |input: usize| {
            let word = word(qzeros, input / self.group * words + row / 8);
            match self.packing {
                Packing::Awq => nibble(word, AWQ_NIBBLES[row % 8]),
                Packing::Gptq { zeros_less_one: false } => nibble(word, row % 8),
                Packing::Gptq { zeros_less_one: true } => nibble(word.wrapping_add(ONES), row % 8),
            }
        };
        let quant = |input: usize| match self.packing {
            Packing::Awq => nibble(word(qweight, input * words + row / 8), AWQ_NIBBLES[row % 8]),
            Packing::Gptq { .. } => nibble(word(qweight, input / 8 * outputs + row), input % 8),
        };
        let (elements, block_bytes) = (self.dtype.block_elements(), self.dtype.block_bytes());
        for (index, block) in out.chunks_exact_mut(block_bytes).enumerate() {
            let first = index * elements;
            let quants = if self.dtype == DType::INT4_32 {
                let second = first + GROUP;
                block[..2].copy_from_slice(&scale(first));
                block[2..4].copy_from_slice(&scale(second));
                block[4] = zero(first) | zero(second) << 4;
                &mut block[5..]
            } else {
                block[..2].copy_from_slice(&scale(first));
                block[2] = zero(first);
                &mut block[3..]
            };
            for (group, quants) in quants.chunks_exact_mut(GROUP / 2).enumerate() {
                let first = first + GROUP * group;
                for (index, byte) in quants.iter_mut().enumerate() {
                    *byte = quant(first + index) | quant(first + GROUP / 2 + index) << 4;
                }
            }
        }
    }
}
