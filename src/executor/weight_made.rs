//! Brings matrices into the arena whose rows a checkpoint makes from other tensors: those of AWQ,
//! GPTQ and FP8 layers, and experts that have a tensor each.

use super::ExecutorError;
use super::cpu_pool::CpuPool;
use super::weight_fill::{PartGroups, fill_parts};
use crate::formats::{Checkpoint, FormatError};
use crate::tensor::DType;
use std::ops::Range;
use tandem_cpu_kernels::repack::ROWS;
use tandem_cpu_kernels::{Layout, repack_row_group};

/// Bytes that all workers together make between two reports.
const PIECE_BYTES: usize = 64 << 20;

/// A matrix of a checkpoint.
pub(super) struct MadeMatrix<'a> {
    pub checkpoint: &'a Checkpoint,
    pub name: &'a str,
    pub dtype: DType,
    pub cols: usize,
}

/// Fills the parts of a matrix. `done` hears, on this thread, how many bytes are ready.
pub(super) fn make(
    pool: &mut CpuPool,
    matrix: &MadeMatrix<'_>,
    targets: (&[PartGroups], Vec<&mut [u8]>),
    done: &mut dyn FnMut(usize),
) -> Result<(), ExecutorError> {
    let fill = |part: &PartGroups, groups: Range<usize>, target: &mut [u8]| {
        let start = part.offset(groups.start);
        let mut scratch = vec![0; ROWS * part.row_bytes];
        for group in groups {
            let bytes = part.bytes(&(group..group + 1));
            let target = &mut target[bytes.start - start..bytes.end - start];
            matrix.group((part.layout, part.rows_of(group)), &mut scratch, target)?;
        }
        Ok(())
    };
    fill_parts(pool, targets, PIECE_BYTES, &fill, done)?;
    matrix.unmap()?;
    Ok(())
}

impl MadeMatrix<'_> {
    /// Up to 16 rows in the matrix's layout.
    fn group(
        &self,
        (layout, rows): (Layout, Range<usize>),
        scratch: &mut [u8],
        target: &mut [u8],
    ) -> Result<(), FormatError> {
        match layout {
            Layout::RowMajor => self.checkpoint.read_rows(self.name, rows, target),
            Layout::Rows16 => {
                let row_bytes = target.len() / ROWS;
                let scratch = &mut scratch[..rows.len() * row_bytes];
                self.checkpoint.read_rows(self.name, rows, scratch)?;
                repack_row_group(self.dtype, self.cols, scratch, target);
                Ok(())
            }
        }
    }

    /// Lets go of the pages that the rows were made from: outputs lie across them, so none could go
    /// before the last row.
    fn unmap(&self) -> Result<(), FormatError> {
        for (file, bytes) in self.checkpoint.pieces(self.name)? {
            self.checkpoint.file(file).unmap_pages(bytes);
        }
        Ok(())
    }
}
