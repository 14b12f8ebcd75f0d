//! Brings matrices into the arena whose rows a checkpoint makes from other tensors: those of AWQ,
//! GPTQ and FP8 layers, and experts that have a tensor each.

use super::ExecutorError;
use super::cpu_pool::CpuPool;
use crate::formats::{Checkpoint, FormatError};
use crate::memory::DisjointChunks;
use crate::tensor::DType;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use tandem_cpu_kernels::repack::ROWS;
use tandem_cpu_kernels::{Layout, repack_row_group};

/// Bytes that all workers together make between two reports.
const PIECE_BYTES: usize = 64 << 20;

/// A matrix of a checkpoint.
pub(super) struct MadeMatrix<'a> {
    pub checkpoint: &'a Checkpoint,
    pub name: &'a str,
    pub dtype: DType,
    pub layout: Layout,
    pub rows: usize,
    pub cols: usize,
}

/// Fills `target`, shared out by groups of 16 rows; each worker touches its part first. `done`
/// hears, on this thread, how many bytes are ready.
pub(super) fn make(
    pool: &mut CpuPool,
    matrix: &MadeMatrix<'_>,
    target: &mut [u8],
    done: &mut dyn FnMut(usize),
) -> Result<(), ExecutorError> {
    let row_bytes = matrix.dtype.row_bytes(matrix.cols).expect("the matrix was placed");
    let group_bytes = ROWS * row_bytes;
    let piece_groups = (PIECE_BYTES / group_bytes).max(1);
    let refused: Mutex<Option<FormatError>> = Mutex::new(None);
    for (piece, target) in target.chunks_mut(piece_groups * group_bytes).enumerate() {
        let bytes = target.len();
        let groups = DisjointChunks::new(target, group_bytes);
        pool.run(&|worker| {
            let mut rows = vec![0; group_bytes];
            for index in worker.share(groups.count(), 1) {
                let Some(target) = groups.claim(index) else { continue };
                let first = (piece * piece_groups + index) * ROWS;
                let made = matrix.group(first..matrix.rows.min(first + ROWS), &mut rows, target);
                if let Err(error) = made {
                    *refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return;
                }
            }
        })?;
        if let Some(error) = refused.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error.into());
        }
        done(piece * piece_groups * group_bytes + bytes);
    }
    matrix.unmap()?;
    Ok(())
}

impl MadeMatrix<'_> {
    /// Up to 16 rows in the matrix's layout.
    fn group(
        &self,
        rows: Range<usize>,
        scratch: &mut [u8],
        target: &mut [u8],
    ) -> Result<(), FormatError> {
        match self.layout {
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
