//! 4-bit weights of AWQ, GPTQ and compressed-tensors (`pack-quantized`): `scales[g][n] * (q[k][n] -
//! zeros[g][n])` for output n and input k of group g. All pack eight numbers in an int32:
//!
//! | | quants | zero points | scales |
//! |---|---|---|---|
//! | AWQ, `gemm` | `[K, N / 8]` | `[K / group, N / 8]` | `[K / group, N]` |
//! | GPTQ | `[K / 8, N]` | `[K / group, N / 8]` | `[K / group, N]` |
//! | compressed-tensors | `[N, K / 8]` | `[N / 8, K / group]`, or 8 | `[N, K / group]` |
//!
//! Scales are f16, bf16 or f32, and f16 in our blocks: bf16 is that exactly from 2^-17 to 65504 and
//! else, as f32, rounded to the nearest; what is no finite f16 is refused.
//!
//! Nibble i of AWQ's words is output `8 j + [0, 2, 4, 6, 1, 3, 5, 7][i]`; the others' count up.
//! Version 1 of GPTQ subtracts 0x11111111 from each word of zero points. The quants and zero points
//! of compressed-tensors are signed ones plus 8, so their difference is that of what is stored.

use super::recipe::{Piece, float_at};
use crate::formats::MappedFile;
use crate::tensor::DType;
use half::f16;
use std::ops::Range;
use std::sync::Arc;
use tandem_cpu_kernels::blocks::GROUP;

/// Which nibble of an AWQ word has output `n % 8`: the inverse of the order above.
const AWQ_NIBBLES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
/// What is subtracted where there are no zero points.
const SYMMETRIC_ZERO: u8 = 8;
/// Outputs whose zero points, or AWQ's quants, share a word.
const OUTPUTS: usize = 8;
const LOW_NIBBLES: u32 = 0x0f0f_0f0f;
/// One in each nibble.
const ONES: u32 = 0x1111_1111;

/// Which way eight quants share a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Awq,
    Gptq { zeros_less_one: bool },
    CompressedTensors,
}

/// The tensors of a linear layer.
#[derive(Clone, Debug)]
pub(super) struct Int4 {
    pub packing: Packing,
    pub qweight: Piece,
    /// `None` where all are 8.
    pub qzeros: Option<Piece>,
    pub scales: Piece,
    pub scales_dtype: DType,
    /// N: rows here.
    pub outputs: usize,
    /// K: elements of a row.
    pub inputs: usize,
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
    pub fn pieces(&self) -> impl Iterator<Item = &Piece> {
        [&self.qweight, &self.scales].into_iter().chain(&self.qzeros)
    }

    /// Writes the blocks of some outputs, eight at a time where they share words. The error says
    /// what is wrong with them.
    pub fn read_rows(
        &self,
        files: &[Arc<MappedFile>],
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), String> {
        let row_bytes = out.len() / rows.len().max(1);
        let (mut row, mut rest) = (rows.start, out);
        while row < rows.end {
            let shares_words = self.packing == Packing::Awq;
            let is_whole = row.is_multiple_of(OUTPUTS) && rows.end - row >= OUTPUTS;
            let count = if shares_words && is_whole { OUTPUTS } else { 1 };
            let (own, others) = rest.split_at_mut(count * row_bytes);
            for (row, out) in (row..row + count).zip(own.chunks_exact_mut(row_bytes)) {
                self.write_scales(files, row, out)?;
            }
            match (shares_words, is_whole) {
                (true, true) => self.write_eight(files, row, own),
                (true, false) => self.write_one_of_eight(files, row, own),
                (false, _) => self.write_row(files, row, own),
            }
            (row, rest) = (row + count, others);
        }
        Ok(())
    }

    /// Bytes of a block before its quants.
    fn head_bytes(&self) -> usize {
        if self.dtype == DType::INT4_32 { 5 } else { 3 }
    }

    /// Writes scales and zero points of the blocks of an output.
    fn write_scales(
        &self,
        files: &[Arc<MappedFile>],
        row: usize,
        out: &mut [u8],
    ) -> Result<(), String> {
        let scales = self.scales.of(files);
        let (outputs, groups) = (self.outputs, self.inputs / self.group);
        let scale = |input: usize| {
            let at = match self.packing {
                Packing::CompressedTensors => row * groups + input / self.group,
                _ => input / self.group * outputs + row,
            };
            let value = float_at(self.scales_dtype, scales, at);
            let stored = f16::from_f32(value);
            if !stored.is_finite() {
                return Err(format!("the scale of output {row} is {value}, wanted: an f16"));
            }
            Ok(stored.to_le_bytes())
        };
        let zero = |input: usize| {
            let Some(qzeros) = &self.qzeros else { return SYMMETRIC_ZERO };
            let (words, group) = (qzeros.of(files), input / self.group);
            let word = |index| word(words, index);
            match self.packing {
                Packing::Awq => {
                    nibble(word(group * outputs / OUTPUTS + row / OUTPUTS), AWQ_NIBBLES[row % 8])
                }
                Packing::Gptq { zeros_less_one } => {
                    let word = word(group * outputs / OUTPUTS + row / OUTPUTS);
                    nibble(if zeros_less_one { word.wrapping_add(ONES) } else { word }, row % 8)
                }
                Packing::CompressedTensors => nibble(word(row / OUTPUTS * groups + group), row % 8),
            }
        };
        let (elements, block_bytes) = (self.dtype.block_elements(), self.dtype.block_bytes());
        for (index, block) in out.chunks_exact_mut(block_bytes).enumerate() {
            let first = index * elements;
            block[..2].copy_from_slice(&scale(first)?);
            if self.dtype == DType::INT4_32 {
                let second = first + GROUP;
                block[2..4].copy_from_slice(&scale(second)?);
                block[4] = zero(first) | zero(second) << 4;
            } else {
                block[2] = zero(first);
            }
        }
        Ok(())
    }

    /// Writes the quants of one of eight outputs that share words.
    fn write_one_of_eight(&self, files: &[Arc<MappedFile>], row: usize, out: &mut [u8]) {
        let (qweight, words) = (self.qweight.of(files), self.outputs / OUTPUTS);
        let quant = |input: usize| {
            nibble(word(qweight, input * words + row / OUTPUTS), AWQ_NIBBLES[row % OUTPUTS])
        };
        for (first, at) in self.halves() {
            for (index, byte) in out[at..at + GROUP / 2].iter_mut().enumerate() {
                *byte = quant(first + index) | quant(first + GROUP / 2 + index) << 4;
            }
        }
    }

    /// The first input of each group of 32, and where the bytes of its quants are in a row.
    fn halves(&self) -> impl Iterator<Item = (usize, usize)> {
        let (elements, block_bytes) = (self.dtype.block_elements(), self.dtype.block_bytes());
        let (inputs, head) = (self.inputs, self.head_bytes());
        (0..inputs).step_by(GROUP).map(move |first| {
            let (block, within) = (first / elements, first % elements);
            (first, block * block_bytes + head + within / 2)
        })
    }

    /// Writes the quants of eight outputs, which share words: of an input and the one 16 after it
    /// every second nibble at once.
    fn write_eight(&self, files: &[Arc<MappedFile>], row: usize, out: &mut [u8]) {
        let (qweight, words) = (self.qweight.of(files), self.outputs / OUTPUTS);
        let row_bytes = out.len() / OUTPUTS;
        let of = |input: usize| word(qweight, input * words + row / OUTPUTS);
        for (first, at) in self.halves() {
            for index in 0..GROUP / 2 {
                let pair = paired(of(first + index), of(first + GROUP / 2 + index));
                for (output, nibble) in AWQ_NIBBLES.into_iter().enumerate() {
                    out[output * row_bytes + at + index] = pair[nibble % 2][nibble / 2];
                }
            }
        }
    }

    /// Writes the quants of an output of whose inputs eight share a word.
    fn write_row(&self, files: &[Arc<MappedFile>], row: usize, out: &mut [u8]) {
        let qweight = self.qweight.of(files);
        let of = |input: usize| {
            let index = match self.packing {
                Packing::CompressedTensors => row * self.inputs / 8 + input / 8,
                _ => input / 8 * self.outputs + row,
            };
            word(qweight, index)
        };
        for (first, at) in self.halves() {
            for index in [0, 8] {
                let [even, odd] = paired(of(first + index), of(first + GROUP / 2 + index));
                let bytes = out[at + index..at + index + 8].as_chunks_mut::<2>().0;
                let pairs = even.into_iter().zip(odd);
                bytes.iter_mut().zip(pairs).for_each(|(to, (even, odd))| *to = [even, odd]);
            }
        }
    }
}

/// Bytes whose low nibble is of one word and whose high one of another: nibbles 0, 2, 4 and 6, and
/// 1, 3, 5 and 7.
fn paired(low: u32, high: u32) -> [[u8; 4]; 2] {
    let even = low & LOW_NIBBLES | (high & LOW_NIBBLES) << 4;
    let odd = low >> 4 & LOW_NIBBLES | high & !LOW_NIBBLES;
    [even.to_le_bytes(), odd.to_le_bytes()]
}
