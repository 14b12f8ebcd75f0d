//! The layout with 16 rows interleaved ([`Layout::Rows16`]).
//!
//! Rows are taken in groups of 16; missing rows of the last group are zero blocks. Within a group
//! the 16 blocks of one block column follow each other as one *packed block* of 16 block sizes,
//! so sizes do not change. Inside it each field of the block is interleaved by its unit: an f16
//! becomes 16 f16, scale bytes become vectors of 16 bytes, and quants go by words of 4 bytes, so
//! that one 64-byte load has 4 elements of each of 16 rows, next to a 4-byte broadcast of the
//! activations. With `u` the unit in bytes, unit `k` of row `r` of a field at offset `o` lies at
//! `16·o + 16·u·k + u·r`.

use crate::blocks::{DType, GROUP};
use crate::dequantize::dequantize_row;
use crate::isa::Isa;
use crate::matmul::{Layout, MatrixView};

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
        DType::F32 | DType::F16 | DType::BF16 => &[],
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
    let packed = packed.chunks_exact_mut(ROWS * dtype.block_bytes());
    for (index, packed) in packed.enumerate() {
        pack_block(dtype, &block_of_rows(dtype, source, row_bytes, index), packed);
    }
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
        match field.unit {
            Unit::Byte => interleave::<1>(&source, packed, |unit| unit),
            Unit::Half => interleave::<2>(&source, packed, |unit| unit),
            Unit::Word => interleave::<4>(&source, packed, |unit| unit),
            Unit::Bits => interleave::<4>(&source, packed, spread_bits),
        }
    }
}

#[inline(always)]
fn interleave<const N: usize>(
    source: &[&[u8]; ROWS],
    packed: &mut [u8],
    change: impl Fn([u8; N]) -> [u8; N],
) {
    let source = source.map(|source| source.as_chunks::<N>().0);
    let length = source.iter().map(|units| units.len()).min().unwrap_or(0);
    let groups = packed.as_chunks_mut::<N>().0.as_chunks_mut::<ROWS>().0;
    for (index, group) in groups.iter_mut().enumerate().take(length) {
        for (packed, source) in group.iter_mut().zip(&source) {
            // SAFETY: `index` is below the length of every source.
            *packed = change(unsafe { *source.get_unchecked(index) });
        }
    }
}

/// Bit `4w + b` to bit `w` of byte `b`: the transposition of an 8×4 bit matrix.
fn spread_bits(unit: [u8; 4]) -> [u8; 4] {
    let mask = u32::from_le_bytes(unit);
    std::array::from_fn(|byte| {
        let every_fourth = mask >> byte & 0x1111_1111;
        let pairs = (every_fourth | every_fourth >> 3) & 0x0303_0303;
        let fours = (pairs | pairs >> 6) & 0x000f_000f;
        (fours | fours >> 12) as u8
    })
}

/// The inverse of [`spread_bits`].
fn gather_bits(unit: [u8; 4]) -> [u8; 4] {
    let mut mask = 0;
    for (byte, bits) in unit.into_iter().enumerate() {
        let fours = (u32::from(bits) | u32::from(bits) << 12) & 0x000f_000f;
        let pairs = (fours | fours << 6) & 0x0303_0303;
        mask |= ((pairs | pairs << 3) & 0x1111_1111) << byte;
    }
    mask.to_le_bytes()
}

/// Copies block `index` of `row` out of a [`Layout::Rows16`] matrix, back in file order.
pub(crate) fn unpack_block(view: &MatrixView<'_>, row: usize, index: usize, block: &mut [u8]) {
    let dtype = view.dtype();
    let group = row / ROWS * ROWS * view.row_bytes();
    let packed = &view.bytes()[group + index * ROWS * dtype.block_bytes()..];
    for field in fields(dtype) {
        let packed = &packed[ROWS * field.offset..][..ROWS * field.bytes];
        let block = &mut block[field.offset..][..field.bytes];
        match field.unit {
            Unit::Byte => gather::<1>(row % ROWS, packed, block, |unit| unit),
            Unit::Half => gather::<2>(row % ROWS, packed, block, |unit| unit),
            Unit::Word => gather::<4>(row % ROWS, packed, block, |unit| unit),
            Unit::Bits => gather::<4>(row % ROWS, packed, block, gather_bits),
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
