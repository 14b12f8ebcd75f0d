//! Interleaves the matrices of a checkpoint into the arena, piece by piece: what has been read of
//! the file is unmapped behind the workers, so that memory holds the weights once.

use super::ExecutorError;
use super::cpu_pool::{CpuPool, share};
use crate::formats::MappedFile;
use crate::tensor::DType;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use tandem_cpu_kernels::repack::ROWS;
use tandem_cpu_kernels::repack_row_group;

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
    pub rows: usize,
    pub cols: usize,
    pub file: &'a MappedFile,
    /// Where it lies in the file, row-major.
    pub bytes: Range<usize>,
}

/// Interleaves a matrix into `target`. Each worker takes an equal share of the groups of 16 rows
/// and touches that part of the arena first: about the one that it begins with in products. `done`
/// hears, on this thread, how many bytes of `target` are ready.
pub(super) fn repack(
    pool: &mut CpuPool,
    matrix: &FileMatrix<'_>,
    target: &mut [u8],
    done: &mut dyn FnMut(usize),
) -> Result<(), ExecutorError> {
    let (groups, threads) = (matrix.rows.div_ceil(ROWS), pool.threads());
    let group_bytes = target.len() / groups;
    let at_once = (PIECE_BYTES / threads / group_bytes).max(1);
    let longest = groups.div_ceil(threads);
    let parts = parts(target, groups, threads);
    for piece in 0..longest.div_ceil(at_once) {
        pool.run(&|worker| {
            let mut own = parts[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
            let share = worker.share(groups, 1);
            let first = share.end.min(share.start + piece * at_once);
            let last = share.end.min(first + at_once);
            let own = &mut own[(first - share.start) * group_bytes..];
            matrix.interleave(first..last, &mut own[..(last - first) * group_bytes]);
        })?;
        done(parts_done(piece, (groups, threads), at_once) * group_bytes);
    }
    Ok(())
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

/// The memory of each worker's share of the groups.
fn parts(mut target: &mut [u8], groups: usize, threads: usize) -> Vec<Mutex<&mut [u8]>> {
    let group_bytes = target.len() / groups;
    let part = |index| {
        let bytes = share(index, threads, groups, 1).len() * group_bytes;
        let (own, others) = std::mem::take(&mut target).split_at_mut(bytes);
        target = others;
        Mutex::new(own)
    };
    (0..threads).map(part).collect()
}

/// Groups that all workers have done after a piece.
fn parts_done(piece: usize, (groups, threads): (usize, usize), at_once: usize) -> usize {
    (0..threads)
        .map(|index| share(index, threads, groups, 1).len().min((piece + 1) * at_once))
        .sum()
}

impl FileMatrix<'_> {
    /// Interleaves some groups of rows and lets go of their pages of the file.
    fn interleave(&self, groups: Range<usize>, packed: &mut [u8]) {
        if groups.is_empty() {
            return;
        }
        let group_bytes = packed.len() / groups.len();
        let unmapped_bytes = (UNMAP_BYTES / group_bytes).max(1) * group_bytes;
        let mut start = groups.start * group_bytes;
        for packed in packed.chunks_mut(unmapped_bytes) {
            let end = self.bytes.len().min(start + packed.len());
            let place = self.bytes.start + start..self.bytes.start + end;
            let source = self.file.bytes()[place.clone()].chunks(group_bytes);
            for (source, packed) in source.zip(packed.chunks_exact_mut(group_bytes)) {
                repack_row_group(self.dtype, self.cols, source, packed);
            }
            self.file.unmap_pages(place);
            start = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::PoolOptions;
    use std::path::Path;

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
            let options = PoolOptions { threads, cores: Vec::new(), spin_us: 0 };
            let mut pool = CpuPool::new(&options).unwrap();
            let matrix = FileMatrix { dtype, rows, cols, file: &file, bytes: bytes.clone() };
            let (mut packed, mut reports) = (vec![0; wanted.len()], vec![0]);
            repack(&mut pool, &matrix, &mut packed, &mut |done| reports.push(done)).unwrap();
            assert!(packed == wanted, "{threads} threads");
            assert!(reports.is_sorted() && reports.len() > 2, "{reports:?}");
            assert_eq!(reports.last(), Some(&wanted.len()));
        }
    }
}
