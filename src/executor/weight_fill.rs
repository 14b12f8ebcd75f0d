//! Has all workers fill the parts of a matrix in the arena, each worker about those rows that it
//! begins with in products: it touches that memory first, so it lies near where the system is asked
//! for nothing else.

use super::ExecutorError;
use super::cpu_pool::{CpuPool, share};
use super::weight_places::{Matrix, Place};
use crate::placement::NodeTeams;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use tandem_cpu_kernels::Layout;
use tandem_cpu_kernels::repack::ROWS;

/// The rows of a part in groups of 16, which layouts keep together; the last group of a matrix, or
/// of each expert in it, may have fewer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PartGroups {
    pub layout: Layout,
    pub row_bytes: usize,
    /// Experts, 1 where there are none, and rows of each.
    experts: usize,
    rows_each: usize,
    /// Of these, the rows of the part.
    rows: Range<usize>,
}

impl PartGroups {
    /// All rows of a matrix whose rows have so many bytes.
    pub fn whole(layout: Layout, rows: usize, row_bytes: usize) -> Self {
        Self { layout, row_bytes, experts: 1, rows_each: rows, rows: 0..rows }
    }

    fn groups_each(&self) -> usize {
        self.rows.len().div_ceil(ROWS)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.experts * self.groups_each()
    }

    /// The rows of the matrix that are in a group.
    pub fn rows_of(&self, group: usize) -> Range<usize> {
        let (expert, group) = (group / self.groups_each(), group % self.groups_each());
        let first = self.rows.start + group * ROWS;
        let base = expert * self.rows_each;
        base + first..base + self.rows.end.min(first + ROWS)
    }

    /// Where a group begins in the part; of the one after the last, where that ends.
    pub fn offset(&self, group: usize) -> usize {
        match self.layout {
            Layout::Rows16 => group * ROWS * self.row_bytes,
            Layout::RowMajor if group == self.count() => {
                self.experts * self.rows.len() * self.row_bytes
            }
            Layout::RowMajor => {
                let (expert, group) = (group / self.groups_each(), group % self.groups_each());
                (expert * self.rows.len() + group * ROWS) * self.row_bytes
            }
        }
    }

    /// The memory that groups take.
    pub fn bytes(&self, groups: &Range<usize>) -> Range<usize> {
        self.offset(groups.start)..self.offset(groups.end)
    }
}

/// A worker's groups of a part.
type Share = (usize, Range<usize>);

/// What a worker fills: groups of its node's part, or of the only one.
fn share_of(parts: &[PartGroups], teams: &NodeTeams, (worker, all): (usize, usize)) -> Share {
    let part = if parts.len() > 1 { teams.team_of(worker) } else { 0 };
    let workers = if parts.len() > 1 { teams.workers(part, all) } else { 0..all };
    let groups = share(worker - workers.start, workers.len(), parts[part].count(), 1);
    (part, groups)
}

/// The parts of a matrix that lies in the arena; none of another.
pub(super) fn groups_of(matrix: &Matrix) -> Vec<PartGroups> {
    let Place::Arena(parts) = &matrix.place else { return Vec::new() };
    let row_bytes = matrix.dtype.row_bytes(matrix.cols).expect("the matrix was placed");
    // Undivided, experts lie one after the other like the rows of one.
    let (experts, rows_each) = match parts.len() {
        1 => (1, matrix.rows),
        _ => (matrix.experts, matrix.rows_each()),
    };
    let groups = parts.iter().map(|part| PartGroups {
        layout: matrix.layout,
        row_bytes,
        experts,
        rows_each,
        rows: if parts.len() == 1 { 0..matrix.rows } else { part.rows.clone() },
    });
    groups.collect()
}

/// What fills some groups of a part, whose memory is given.
pub(super) type Fill<'a> =
    dyn Fn(&PartGroups, Range<usize>, &mut [u8]) -> Result<(), ExecutorError> + Sync + 'a;

/// Fills `targets`, the memory of `parts`, in pieces of about `piece_bytes` of all workers
/// together. `done` hears, on this thread, how many bytes are ready.
///
/// # Errors
/// What a worker fails with, or its panic.
pub(super) fn fill_parts(
    pool: &mut CpuPool,
    (parts, targets): (&[PartGroups], Vec<&mut [u8]>),
    piece_bytes: usize,
    fill: &Fill<'_>,
    done: &mut dyn FnMut(usize),
) -> Result<(), ExecutorError> {
    let threads = pool.threads();
    let shares: Vec<Share> =
        (0..threads).map(|worker| share_of(parts, pool.nodes(), (worker, threads))).collect();
    let memory = cut(parts, targets, &shares);
    let group_bytes = ROWS * parts.first().map_or(1, |part| part.row_bytes);
    let at_once = (piece_bytes / threads / group_bytes).max(1);
    let longest = shares.iter().map(|(_, groups)| groups.len()).max().unwrap_or(0);
    let failure: Mutex<Option<ExecutorError>> = Mutex::new(None);
    let piece_of = |groups: &Range<usize>, piece: usize| {
        let first = groups.end.min(groups.start + piece * at_once);
        first..groups.end.min(first + at_once)
    };
    for piece in 0..longest.div_ceil(at_once) {
        pool.run(&|worker| {
            let mut own = memory[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
            let (part, groups) = &shares[worker.index];
            let (part, wanted) = (&parts[*part], piece_of(groups, piece));
            if wanted.is_empty() {
                return;
            }
            let (start, bytes) = (part.offset(groups.start), part.bytes(&wanted));
            let target = &mut own[bytes.start - start..bytes.end - start];
            if let Err(error) = fill(part, wanted, target) {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        })?;
        if let Some(error) = failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        let ready = shares.iter().map(|(part, groups)| {
            let ready = groups.start..piece_of(groups, piece).end;
            parts[*part].bytes(&ready).len()
        });
        done(ready.sum());
    }
    Ok(())
}

/// The memory of each worker's share: those of a part are side by side, in the workers' order.
fn cut<'a>(
    parts: &[PartGroups],
    mut targets: Vec<&'a mut [u8]>,
    shares: &[Share],
) -> Vec<Mutex<&'a mut [u8]>> {
    let own = |(part, groups): &Share| {
        let rest = std::mem::take(&mut targets[*part]);
        let (own, others) = rest.split_at_mut(parts[*part].bytes(groups).len());
        targets[*part] = others;
        Mutex::new(own)
    };
    shares.iter().map(own).collect()
}

/// The parts of some memory that ascending ranges, which are apart, name.
pub(super) fn disjoint(
    mut memory: &mut [u8],
    ranges: impl Iterator<Item = Range<usize>>,
) -> Vec<&mut [u8]> {
    let mut offset = 0;
    let cut = |range: Range<usize>| {
        let rest = std::mem::take(&mut memory);
        let (own, others) = rest[range.start - offset..].split_at_mut(range.len());
        (memory, offset) = (others, range.end);
        own
    };
    ranges.map(cut).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::tensor::DType;
    use proptest::prelude::*;
    use tandem_cpu_kernels::packed_bytes;

    /// Groups and memory of an undivided matrix.
    pub fn in_one_part(
        (dtype, layout): (DType, Layout),
        (rows, cols): (usize, usize),
    ) -> ([PartGroups; 1], Vec<u8>) {
        let row_bytes = dtype.row_bytes(cols).expect("whole blocks");
        let groups = PartGroups::whole(layout, rows, row_bytes);
        ([groups], vec![0; packed_bytes(dtype, layout, rows, cols).expect("a layout")])
    }

    fn part(layout: Layout, experts: usize, each: usize, rows: Range<usize>) -> PartGroups {
        PartGroups { layout, row_bytes: 34, experts, rows_each: each, rows }
    }

    proptest! {
        #[test]
        fn parts_of_all_nodes_have_every_row_once(
            sizes in prop::collection::vec(1_usize..6, 2..5),
            (experts, groups) in (1_usize..4, 1_usize..12),
            rest in 0_usize..16,
        ) {
            let nodes: Vec<u32> =
                (0..).zip(&sizes).flat_map(|(node, size)| vec![node; *size]).collect();
            let teams = NodeTeams::of_workers(&nodes);
            // Experts whose rows are no whole groups are not divided.
            let each = groups * ROWS + if experts == 1 { rest } else { 0 };
            for layout in [Layout::Rows16, Layout::RowMajor] {
                let parts: Vec<_> = (0..teams.count())
                    .map(|team| part(layout, experts, each, teams.rows(team, each)))
                    .collect();
                let mut seen = vec![0; experts * each];
                let mut filled = vec![0; parts.len()];
                for worker in 0..nodes.len() {
                    let (at, groups) = share_of(&parts, &teams, (worker, nodes.len()));
                    prop_assert_eq!(at, teams.team_of(worker));
                    prop_assert_eq!(parts[at].offset(groups.start), filled[at]);
                    filled[at] += parts[at].bytes(&groups).len();
                    for group in groups {
                        let bytes = parts[at].bytes(&(group..group + 1)).len();
                        let rows = parts[at].rows_of(group);
                        let stored = if layout == Layout::Rows16 { ROWS } else { rows.len() };
                        prop_assert_eq!(bytes, stored * 34);
                        rows.for_each(|row| seen[row] += 1);
                    }
                }
                prop_assert!(seen.iter().all(|times| *times == 1), "{:?}", seen);
            }
        }
    }

    #[test]
    fn memory_is_cut_where_it_is_asked_to_be() {
        let mut memory: Vec<u8> = (0..20).collect();
        let cut = disjoint(&mut memory, [2..5, 5..5, 9..20].into_iter());
        assert_eq!(cut.iter().map(|part| part.len()).collect::<Vec<_>>(), [3, 0, 11]);
        assert_eq!((cut[0][0], cut[2][0]), (2, 9));
    }
}
