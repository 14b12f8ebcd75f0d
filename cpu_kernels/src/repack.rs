//! The layout with 16 rows interleaved ([`Layout::Rows16`]).
//!
//! Rows are taken in groups of 16; missing rows of the last group are zero blocks. Within a group
//! the 16 blocks of one block column follow each other as one *packed block* of 16 block sizes,
//! so sizes do not change. Inside it each field of the block is interleaved by its unit: an f16
//! becomes 16 f16, scale bytes become vectors of 16 bytes, and quants go by words of 4 bytes, so
//! that one 64-byte load has 4 elements of each of 16 rows, next to a 4-byte broadcast of the
//! activations. With `u` the unit in bytes, unit `k` of row `r` of a field at offset `o` lies at
//! `16·o + 16·u·k + u·r`.

mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::blocks::{DType, GROUP};
use crate::dequantize::dequantize_row;
use crate::isa::Isa;
use crate::matmul::{Layout, MatrixView};
use std::ops::Range;

/// Rows that are interleaved.
pub const ROWS: usize = 16;

/// How a field of a block is interleaved.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// Single bytes: scales.
    Byte,
    /// Two bytes: f16.
    Half,
    /// Four bytes: four elements.
    Word,
    /// One 32-bit mask whose bit `4w + b` becomes bit `w` of byte `b`: each byte then has the bits
    /// of its own elements, like the bytes of a word have.
    Bits,
}

struct Field {
    offset: usize,
    bytes: usize,
    unit: Unit,
}

const fn field(offset: usize, bytes: usize, unit: Unit) -> Field {
    Field { offset, bytes, unit }
}

/// The fields of a block in file order; they cover the block without gaps.
const fn fields(dtype: DType) -> &'static [Field] {
    use Unit::{Bits, Byte, Half, Word};
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::E4M3_128 | DType::E4M3_32 => &[],
        DType::Q4_0 | DType::IQ4_NL => &const { [field(0, 2, Half), field(2, 16, Word)] },
        DType::Q4_1 => &const { [field(0, 4, Half), field(4, 16, Word)] },
        DType::Q5_0 => &const { [field(0, 2, Half), field(2, 4, Bits), field(6, 16, Word)] },
        DType::Q5_1 => &const { [field(0, 4, Half), field(4, 4, Bits), field(8, 16, Word)] },
        DType::Q8_0 => &const { [field(0, 2, Half), field(2, 32, Word)] },
        DType::Q2_K => &const { [field(0, 16, Byte), field(16, 64, Word), field(80, 4, Half)] },
        DType::Q3_K => &const { [field(0, 96, Word), field(96, 12, Byte), field(108, 2, Half)] },
        DType::Q4_K => &const { [field(0, 4, Half), field(4, 12, Byte), field(16, 128, Word)] },
        DType::Q5_K => &const { [field(0, 4, Half), field(4, 12, Byte), field(16, 160, Word)] },
        DType::Q6_K => &const { [field(0, 192, Word), field(192, 16, Byte), field(208, 2, Half)] },
        DType::IQ4_XS => &const { [field(0, 4, Half), field(4, 4, Byte), field(8, 128, Word)] },
        DType::INT4_128 => &const { [field(0, 2, Half), field(2, 1, Byte), field(3, 64, Word)] },
        DType::INT4_64 => &const { [field(0, 2, Half), field(2, 1, Byte), field(3, 32, Word)] },
        DType::INT4_32 => &const { [field(0, 4, Half), field(4, 1, Byte), field(5, 32, Word)] },
    }
}

/// The layout in which the kernels of `isa` read weights of `dtype` fastest.
pub fn layout_for(dtype: DType, isa: Isa) -> Layout {
    if dtype.is_quantized() && isa > Isa::Scalar { Layout::Rows16 } else { Layout::RowMajor }
}

/// Bytes of `[rows, cols]` weights in `layout`; `None` when `cols` is no whole number of blocks,
/// when a float type is to be interleaved, or on overflow.
pub fn packed_bytes(dtype: DType, layout: Layout, rows: usize, cols: usize) -> Option<usize> {
    let row_bytes = dtype.row_bytes(cols)?;
    match layout {
        Layout::RowMajor => rows.checked_mul(row_bytes),
        Layout::Rows16 if dtype.is_quantized() => {
            rows.checked_next_multiple_of(ROWS)?.checked_mul(row_bytes)
        }
        Layout::Rows16 => None,
    }
}

/// Interleaves one group of up to 16 rows.
///
/// `source` has the rows in file order (a whole number, at most 16); `packed` is the group's part
/// of a [`Layout::Rows16`] matrix: 16 rows, of which the missing ones are zeroed. Groups are
/// independent, so a caller repacks them in parallel.
///
/// # Panics
/// When the lengths are not those of `cols` columns, or `dtype` is a float type.
pub fn repack_row_group(dtype: DType, cols: usize, source: &[u8], packed: &mut [u8]) {
    assert!(dtype.is_quantized(), "{dtype} has no Rows16 layout");
    let row_bytes = dtype.row_bytes(cols).unwrap_or(0);
    assert!(row_bytes > 0, "{cols} columns of {dtype}");
    assert_eq!(packed.len(), ROWS * row_bytes, "packed bytes of 16 rows of {cols} {dtype}");
    assert!(source.len().is_multiple_of(row_bytes) && source.len() <= packed.len());
    let block_bytes = dtype.block_bytes();
    let whole = source.len() == packed.len();
    for (index, packed) in packed.chunks_exact_mut(ROWS * block_bytes).enumerate() {
        if whole {
            prefetch_next_group(source, index * packed.len()..(index + 1) * packed.len());
            pack_whole_block(dtype, &source[index * block_bytes..], row_bytes, packed);
        } else {
            pack_block(dtype, &block_of_rows(dtype, source, row_bytes, index), packed);
        }
    }
}

/// Asks for bytes `range` behind `source`: groups follow each other, and what one block column
/// takes from 16 places is too short for the processor to see that they are streams.
fn prefetch_next_group(source: &[u8], range: Range<usize>) {
    #[cfg(target_arch = "x86_64")]
    for at in range.step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let next = source.as_ptr().wrapping_add(source.len() + at);
        // SAFETY: a prefetch reads nothing, and no address makes it fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(next.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (source, range);
}

/// Interleaves the blocks at the start of 16 rows that lie `row_bytes` apart.
#[cfg(target_arch = "x86_64")]
fn pack_whole_block(dtype: DType, source: &[u8], row_bytes: usize, packed: &mut [u8]) {
    assert!(source.len() >= (ROWS - 1) * row_bytes + dtype.block_bytes());
    assert_eq!(packed.len(), ROWS * dtype.block_bytes(), "bytes of 16 blocks of {dtype}");
    for field in fields(dtype) {
        // SAFETY: the lengths are asserted; fields lie inside the block, and `packed` is borrowed
        // exclusively. Their lengths are whole numbers of what is moved at once.
        unsafe {
            let row = |at: usize| source.as_ptr().add(at * row_bytes + field.offset);
            let packed = packed.as_mut_ptr().add(ROWS * field.offset);
            x86::interleave(field.unit, row, field.bytes, packed);
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn pack_whole_block(dtype: DType, source: &[u8], row_bytes: usize, packed: &mut [u8]) {
    let blocks = std::array::from_fn(|row| &source[row * row_bytes..][..dtype.block_bytes()]);
    pack_block(dtype, &blocks, packed);
}

/// Block `index` of each row of `source`, in file order; zeros stand for missing rows.
pub(crate) fn block_of_rows(
    dtype: DType,
    source: &[u8],
    row_bytes: usize,
    index: usize,
) -> [&[u8]; ROWS] {
    const ZEROS: &[u8] = &[0; 256];
    let block_bytes = dtype.block_bytes();
    std::array::from_fn(|row| {
        let start = row * row_bytes + index * block_bytes;
        source.get(start..start + block_bytes).unwrap_or(&ZEROS[..block_bytes])
    })
}

/// Interleaves 16 blocks of one block column into `packed`, 16 blocks long.
pub(crate) fn pack_block(dtype: DType, blocks: &[&[u8]; ROWS], packed: &mut [u8]) {
    for field in fields(dtype) {
        let packed = &mut packed[ROWS * field.offset..][..ROWS * field.bytes];
        let source = blocks.map(|block| &block[field.offset..][..field.bytes]);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: each row and `packed` have just been cut to the field's length, and its lengths
        // are whole numbers of what is moved at once.
        unsafe {
            let row = |at: usize| source[at].as_ptr();
            x86::interleave(field.unit, row, field.bytes, packed.as_mut_ptr());
        }
        #[cfg(not(target_arch = "x86_64"))]
        scalar::interleave(field.unit, &source, packed);
    }
}

/// Copies block `index` of `row` out of a [`Layout::Rows16`] matrix, back in file order.
pub(crate) fn unpack_block(view: &MatrixView<'_>, row: usize, index: usize, block: &mut [u8]) {
    let dtype = view.dtype();
    let group = row / ROWS * ROWS * view.row_bytes();
    unpack_row(dtype, &view.bytes()[group + index * ROWS * dtype.block_bytes()..], row, block);
}

/// Copies the block of row `row` out of a packed one, back in file order.
pub(crate) fn unpack_row(dtype: DType, packed: &[u8], row: usize, block: &mut [u8]) {
    for field in fields(dtype) {
        let packed = &packed[ROWS * field.offset..][..ROWS * field.bytes];
        let block = &mut block[field.offset..][..field.bytes];
        match field.unit {
            Unit::Byte => gather::<1>(row % ROWS, packed, block, |unit| unit),
            Unit::Half => gather::<2>(row % ROWS, packed, block, |unit| unit),
            Unit::Word => gather::<4>(row % ROWS, packed, block, |unit| unit),
            Unit::Bits => gather::<4>(row % ROWS, packed, block, scalar::gather_bits),
        }
    }
}

fn gather<const N: usize>(
    row: usize,
    packed: &[u8],
    block: &mut [u8],
    change: impl Fn([u8; N]) -> [u8; N],
) {
    let units = block.as_chunks_mut::<N>().0.iter_mut();
    for (unit, packed) in units.zip(packed.chunks_exact(ROWS * N)) {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&packed[row * N..][..N]);
        *unit = change(bytes);
    }
}

/// Writes the f32 values of one row in any layout: the embedding lookup, also where the embedding
/// is tied to a repacked output matrix.
///
/// # Panics
/// When `row` or `out` do not fit the view.
pub fn dequantize_packed_row(view: &MatrixView<'_>, row: usize, out: &mut [f32]) {
    assert!(row < view.rows(), "row {row} of {}", view.rows());
    assert_eq!(out.len(), view.cols(), "columns of the row");
    let dtype = view.dtype();
    match view.layout() {
        Layout::RowMajor => {
            dequantize_row(dtype, &view.bytes()[row * view.row_bytes()..][..view.row_bytes()], out);
        }
        Layout::Rows16 => {
            let mut block = [0; 16 * GROUP];
            let block = &mut block[..dtype.block_bytes()];
            for (index, out) in out.chunks_exact_mut(dtype.block_elements()).enumerate() {
                unpack_block(view, row, index, block);
                dequantize_row(dtype, block, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that follow from a seed (Marsaglia's xorshift).
    fn bytes(seed: u64, count: usize) -> Vec<u8> {
        let mut state = seed;
        let next = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        };
        (0..count).map(next).collect()
    }

    /// The specification of [`repack_row_group`].
    fn specified(dtype: DType, row_bytes: usize, source: &[u8]) -> Vec<u8> {
        let mut packed = vec![0; ROWS * row_bytes];
        let blocks = packed.chunks_exact_mut(ROWS * dtype.block_bytes());
        for (index, packed) in blocks.enumerate() {
            let blocks = block_of_rows(dtype, source, row_bytes, index);
            for field in fields(dtype) {
                let packed = &mut packed[ROWS * field.offset..][..ROWS * field.bytes];
                let source = blocks.map(|block| &block[field.offset..][..field.bytes]);
                scalar::interleave(field.unit, &source, packed);
            }
        }
        packed
    }

    #[test]
    fn vectors_interleave_as_specified_for_every_type_and_number_of_rows() {
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
            for (rows, blocks) in (1..=ROWS).flat_map(|rows| [(rows, 1), (rows, 3)]) {
                let cols = blocks * dtype.block_elements();
                let row_bytes = blocks * dtype.block_bytes();
                let seed = 0x9e37_79b9 + (rows * 7 + blocks) as u64;
                let source = bytes(seed, rows * row_bytes);
                let mut packed = vec![0xa5; ROWS * row_bytes];
                repack_row_group(dtype, cols, &source, &mut packed);
                let wanted = specified(dtype, row_bytes, &source);
                assert_eq!(packed, wanted, "{dtype}, {rows} rows of {blocks} blocks, seed {seed}");
            }
        }
    }

    #[test]
    fn fields_cover_their_block_in_lengths_that_vectors_move() {
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
            let mut end = 0;
            for field in fields(dtype) {
                let step = match field.unit {
                    Unit::Word => 16,
                    Unit::Bits => 4,
                    Unit::Half => 2,
                    Unit::Byte => 1,
                };
                assert_eq!((field.offset, field.bytes % step), (end, 0), "{dtype}");
                end += field.bytes;
            }
            assert_eq!(end, dtype.block_bytes(), "{dtype}");
        }
    }

    #[test]
    fn spread_bits_are_gathered_again() {
        for seed in 1..100 {
            let word: [u8; 4] = bytes(seed, 4).try_into().unwrap();
            assert_eq!(scalar::gather_bits(scalar::spread_bits(word)), word);
        }
    }
}
