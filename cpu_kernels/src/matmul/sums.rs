//! Sums of a vector of rows on their way from and to the output, of which some rows may be another
//! thread's.

use super::OutputColumns;
use super::lanes::Lanes;
use crate::repack::ROWS;
use std::ops::Range;

/// First covered row, and which lanes of the vector that starts at row `base` are covered.
#[inline(always)]
pub(super) fn row_lanes<L: Lanes>(rows: &Range<usize>, base: usize) -> (usize, Range<usize>) {
    let start = rows.start.max(base).min(base + L::LANES);
    let end = rows.end.max(base).min(base + L::LANES);
    (start, start - base..end - base)
}

/// Reads the sums of `columns` columns back for the covered lanes.
///
/// # Safety
/// The CPU has the instruction set of `L`; the columns and rows are the output's and this thread's.
#[inline(always)]
pub(super) unsafe fn load_sums<L: Lanes, const T: usize>(
    acc: &mut [L::Float; T],
    (first, columns): (usize, usize),
    (row, lanes): (usize, Range<usize>),
    out: OutputColumns<'_>,
) {
    if lanes.is_empty() {
        return;
    }
    for (index, acc) in acc.iter_mut().enumerate().take(columns) {
        let mut values = [0.0; ROWS];
        let source = out.at(first + index, row);
        // SAFETY: rows `row .. row + lanes.len()` are in the output and this thread's.
        unsafe {
            for (offset, value) in values[lanes.clone()].iter_mut().enumerate() {
                *value = source.add(offset).read();
            }
            *acc = L::load_f32(values.as_ptr());
        }
    }
}

/// Writes the sums of `columns` columns for the covered lanes.
///
/// # Safety
/// As [`load_sums`].
#[inline(always)]
pub(super) unsafe fn store_sums<L: Lanes, const T: usize>(
    acc: &[L::Float; T],
    (first, columns): (usize, usize),
    (row, lanes): (usize, Range<usize>),
    out: OutputColumns<'_>,
) {
    if lanes.is_empty() {
        return;
    }
    for (index, acc) in acc.iter().enumerate().take(columns) {
        let target = out.at(first + index, row);
        // SAFETY: rows `row .. row + lanes.len()` are in the output and this thread's.
        unsafe {
            if lanes.len() == L::LANES {
                L::store_f32(target, *acc);
                continue;
            }
            let mut values = [0.0; ROWS];
            L::store_f32(values.as_mut_ptr(), *acc);
            for (offset, value) in values[lanes.clone()].iter().enumerate() {
                target.add(offset).write(*value);
            }
        }
    }
}
