//! How rows of a tensor are made from what a folder's files hold, when they are wanted.

use super::fp8::Fp8;
use super::int4::Int4;
use crate::formats::MappedFile;
use crate::tensor::DType;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a file.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub file: usize,
    pub bytes: Range<usize>,
}

impl Piece {
    pub fn of<'a>(&self, files: &'a [Arc<MappedFile>]) -> &'a [u8] {
        &files[self.file].bytes()[self.bytes.clone()]
    }
}

/// What some rows are made from.
#[derive(Clone, Debug)]
pub(super) enum Part {
    /// Rows as they are.
    Plain(Piece),
    /// A vector of this float type in f32, with 1 added to each element (Gemma's norms).
    OnePlus(Piece, DType),
    /// A vector that no file holds.
    Values(Vec<f32>),
    Fp8(Fp8),
    Int4(Int4),
}

/// A tensor whose rows are dealt evenly to its parts, in order.
#[derive(Clone, Debug)]
pub(in crate::formats) struct Recipe {
    pub(super) parts: Vec<Part>,
    /// Rows of each part.
    pub(super) rows: usize,
    pub(super) row_bytes: usize,
}

impl Recipe {
    /// Writes rows in file order of the tensor's type; the error says what is wrong with them.
    pub fn read_rows(
        &self,
        files: &[Arc<MappedFile>],
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), String> {
        assert_eq!(out.len(), rows.len() * self.row_bytes, "bytes of rows {rows:?}");
        let (mut row, mut rest) = (rows.start, out);
        while row < rows.end {
            let (part, first) = (&self.parts[row / self.rows], row % self.rows);
            let end = self.rows.min(first + rows.end - row);
            let (own, others) = rest.split_at_mut((end - first) * self.row_bytes);
            self.read_part(files, (part, first..end), own)?;
            (row, rest) = (row + end - first, others);
        }
        Ok(())
    }

    /// Writes rows of a part.
    fn read_part(
        &self,
        files: &[Arc<MappedFile>],
        (part, rows): (&Part, Range<usize>),
        out: &mut [u8],
    ) -> Result<(), String> {
        if let Part::Int4(int4) = part {
            return int4.read_rows(files, rows, out);
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(self.row_bytes)) {
            match part {
                Part::Plain(piece) => {
                    out.copy_from_slice(&piece.of(files)[row * self.row_bytes..][..out.len()]);
                }
                Part::OnePlus(piece, dtype) => one_plus(*dtype, piece.of(files), out),
                Part::Values(values) => {
                    out.copy_from_slice(bytemuck::cast_slice::<f32, u8>(values));
                }
                Part::Fp8(fp8) => fp8.read_row(files, row, out)?,
                Part::Int4(_) => unreachable!("read above"),
            }
        }
        Ok(())
    }

    /// The bytes of files that rows are made from.
    pub fn pieces(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let pieces = self.parts.iter().flat_map(|part| match part {
            Part::Plain(piece) | Part::OnePlus(piece, _) => vec![piece],
            Part::Values(_) => Vec::new(),
            Part::Fp8(fp8) => fp8.pieces().to_vec(),
            Part::Int4(int4) => int4.pieces().collect(),
        });
        pieces.map(|piece| (piece.file, piece.bytes.clone()))
    }
}

/// Element `index` of floats.
pub(super) fn float_at(dtype: DType, bytes: &[u8], index: usize) -> f32 {
    let at = index * dtype.block_bytes();
    match dtype {
        DType::F16 => f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
        DType::BF16 => bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
        _ => f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]),
    }
}

fn one_plus(dtype: DType, bytes: &[u8], out: &mut [u8]) {
    for (index, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *out = (1.0 + float_at(dtype, bytes, index)).to_le_bytes();
    }
}
