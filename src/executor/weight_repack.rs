//! Interleaves the matrices of a checkpoint into the arena, piece by piece: what has been read of
//! the file is unmapped behind the workers, so that memory holds the weights once.

use super::ExecutorError;
use super::cpu_pool::CpuPool;
use super::weight_fill::{PartGroups, fill_parts};
use crate::formats::MappedFile;
use crate::tensor::DType;
use std::ops::Range;
use tandem_cpu_kernels::{Layout, repack_row_group};

/// File bytes that all workers together interleave between two reports: tens of milliseconds,
/// against which the workers' meeting does not count.
const PIECE_BYTES: usize = 64 << 20;
/// File bytes after which a worker lets go of their pages: what is in memory twice meanwhile.
const UNMAP_BYTES: usize = 2 << 20;
/// Bytes of weights that stay in the file which are read between two reports.
const IN_PLACE_BYTES: usize = 64 << 20;
/// The smallest page.
const PAGE_BYTES: usize = 4096;

/// A matrix in a file.
pub(super) struct FileMatrix<'a> {
    pub dtype: DType,
    pub cols: usize,
    pub file: &'a MappedFile,
    /// Where it lies in the file, row-major.
    pub bytes: Range<usize>,
}

/// Interleaves a matrix into its parts of the arena, or copies it where they are row-major. `done`
/// hears, on this thread, how many bytes are ready.
pub(super) fn repack(
    pool: &mut CpuPool,
    matrix: &FileMatrix<'_>,
    targets: (&[PartGroups], Vec<&mut [u8]>),
    done: &mut dyn FnMut(usize),
) -> Result<(), ExecutorError> {
    let fill = |part: &PartGroups, groups: Range<usize>, target: &mut [u8]| {
        matrix.interleave(part, groups, target);
        Ok(())
    };
    fill_parts(pool, targets, PIECE_BYTES, &fill, done)
}

/// Reads one byte of every page of `bytes`, so that the first tokens do not wait for the disk.
pub(super) fn read_in_place(
    pool: &mut CpuPool,
    bytes: &[u8],
    done: &mut dyn FnMut(usize),
) -> Result<(), ExecutorError> {
    for (piece, part) in bytes.chunks(IN_PLACE_BYTES).enumerate() {
        pool.run(&|worker| {
            for at in worker.share(part.len(), PAGE_BYTES).step_by(PAGE_BYTES) {
                std::hint::black_box(part[at]);
            }
        })?;
        done(piece * IN_PLACE_BYTES + part.len());
    }
    Ok(())
}

impl FileMatrix<'_> {
    /// Brings some groups of rows to where they belong, and lets go of their pages of the file.
    fn interleave(&self, part: &PartGroups, groups: Range<usize>, target: &mut [u8]) {
        let start = part.offset(groups.start);
        let mut pending = 0..0;
        for group in groups {
            let rows = part.rows_of(group);
            let source = rows.start * part.row_bytes..rows.end * part.row_bytes;
            let bytes = part.bytes(&(group..group + 1));
            let target = &mut target[bytes.start - start..bytes.end - start];
            if source.start != pending.end || pending.len() >= UNMAP_BYTES {
                self.unmap(pending);
                pending = source.start..source.start;
            }
            pending.end = source.end;
            let place = self.bytes.start + source.start..self.bytes.start + source.end;
            let source = &self.file.bytes()[place];
            match part.layout {
                Layout::Rows16 => repack_row_group(self.dtype, self.cols, source, target),
                Layout::RowMajor => target.copy_from_slice(source),
            }
        }
        self.unmap(pending);
    }

    /// Lets go of the pages of some bytes of the matrix.
    fn unmap(&self, bytes: Range<usize>) {
        if !bytes.is_empty() {
            self.file.unmap_pages(self.bytes.start + bytes.start..self.bytes.start + bytes.end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::PoolOptions;
    use crate::executor::weight_fill::tests::in_one_part;
    use std::path::Path;
    use tandem_cpu_kernels::repack::ROWS;

    /// 35011 rows make pieces of several groups, unequal shares and a last group of 3 rows.
    #[test]
    fn pieces_of_any_number_of_workers_are_the_whole_matrix() {
        let (dtype, rows, cols) = (DType::Q8_0, 35_011, 2048);
        let row_bytes = dtype.row_bytes(cols).unwrap();
        let source: Vec<u8> = (0..rows * row_bytes).map(|at| ((at * at) >> 7) as u8).collect();
        let mut file = vec![1; 24];
        file.extend_from_slice(&source);
        let file = MappedFile::from_bytes(Path::new("memory"), &file);
        let bytes = 24..24 + source.len();
        let mut wanted = vec![0; rows.div_ceil(ROWS) * ROWS * row_bytes];
        let groups = source.chunks(ROWS * row_bytes);
        for (source, packed) in groups.zip(wanted.chunks_exact_mut(ROWS * row_bytes)) {
            repack_row_group(dtype, cols, source, packed);
        }
        for threads in [1, 3] {
            let options =
                PoolOptions { threads, cores: Vec::new(), nodes: Default::default(), spin_us: 0 };
            let mut pool = CpuPool::new(&options).unwrap();
            let matrix = FileMatrix { dtype, cols, file: &file, bytes: bytes.clone() };
            let (groups, mut packed) = in_one_part((dtype, Layout::Rows16), (rows, cols));
            let (targets, mut reports) = ((&groups[..], vec![&mut packed[..]]), vec![0]);
            repack(&mut pool, &matrix, targets, &mut |done| reports.push(done)).unwrap();
            assert!(packed == wanted, "{threads} threads");
            assert!(reports.is_sorted() && reports.len() > 2, "{reports:?}");
            assert_eq!(reports.last(), Some(&wanted.len()));
        }
    }
}
