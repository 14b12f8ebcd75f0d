//! Weights in e4m3 with scales beside them: one of the tensor, one per row, or one per block of
//! rows and columns. DeepSeek's `weight_scale_inv` multiplies too, for all its name.

use super::recipe::{Piece, float_at};
use crate::formats::MappedFile;
use crate::tensor::DType;
use std::sync::Arc;

/// What the type's block has is this many times the scale.
const STORED_FACTOR: f32 = 256.0;

/// The tensors of a linear layer.
#[derive(Clone, Debug)]
pub(super) struct Fp8 {
    /// `[rows, cols]`
    pub weight: Piece,
    /// `[rows / block rows, cols / block columns]`, each rounded up.
    pub scales: Piece,
    pub scales_dtype: DType,
    pub cols: usize,
    /// Rows and columns that share a scale.
    pub block: [usize; 2],
    pub dtype: DType,
}

/// The type for rows of `cols` elements whose scales change every `block_cols`.
pub(super) fn dtype_of(cols: usize, block_cols: usize) -> Option<DType> {
    let fits = |dtype: &DType| {
        let elements = dtype.block_elements();
        cols.is_multiple_of(elements) && (block_cols >= cols || block_cols.is_multiple_of(elements))
    };
    [DType::E4M3_128, DType::E4M3_32].into_iter().find(fits)
}

impl Fp8 {
    pub fn pieces(&self) -> [&Piece; 2] {
        [&self.weight, &self.scales]
    }

    /// Writes the blocks of a row; refuses what is no number.
    pub fn read_row(
        &self,
        files: &[Arc<MappedFile>],
        row: usize,
        out: &mut [u8],
    ) -> Result<(), String> {
        let [weight, scales] = self.pieces().map(|piece| piece.of(files));
        let codes = &weight[row * self.cols..][..self.cols];
        if let Some(col) = codes.iter().position(|code| code & 0x7f == 0x7f) {
            return Err(format!("row {row}, column {col} is no number (NaN)"));
        }
        let [block_rows, block_cols] = self.block;
        let first_scale = row / block_rows * self.cols.div_ceil(block_cols);
        let elements = self.dtype.block_elements();
        let blocks = out.chunks_exact_mut(self.dtype.block_bytes());
        for (index, (codes, out)) in codes.chunks_exact(elements).zip(blocks).enumerate() {
            let at = first_scale + index * elements / block_cols;
            let scale = STORED_FACTOR * float_at(self.scales_dtype, scales, at);
            if !scale.is_finite() {
                return Err(format!("the scale of row {row} is {}", scale / STORED_FACTOR));
            }
            let (stored, quants) = out.split_at_mut(size_of::<f32>());
            stored.copy_from_slice(&scale.to_le_bytes());
            quants.copy_from_slice(codes);
        }
        Ok(())
    }
}
