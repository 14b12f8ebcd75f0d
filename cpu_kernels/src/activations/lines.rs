//! Where bf16 activations lie. A tile of up to 16 columns is what AMX loads at once, so it lies in
//! memory as one stretch: all groups of 16 columns follow each other, `[tile][group][column]`, and
//! whoever reads a tile's groups in order reads memory in order, which caches fetch ahead. The last
//! tile has the columns that are left, without gaps.

use crate::blocks::GROUP;
use std::marker::PhantomData;
use std::ops::Range;

/// Columns of a tile.
pub(crate) const TILE_COLUMNS: usize = 16;

/// A group of 32 elements of a column in bf16, in the order of [`super::BF16_ORDER`].
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [u16; GROUP]);

/// The bf16 form of `[columns, cols]` activations, or of some columns of such.
#[derive(Clone, Copy)]
pub(crate) struct Bf16<'a> {
    /// Those of all columns.
    lines: &'a [Line],
    /// All columns.
    all: usize,
    /// Groups of a column.
    groups: usize,
    /// The first column of this part.
    first: usize,
}

/// Columns of a tile.
#[derive(Clone, Copy)]
pub(crate) struct ColumnTile {
    /// Group 0 of the first of them; the others follow it.
    pub lines: *const Line,
    /// Lines from one group to the next.
    pub apart: usize,
    /// How many they are.
    pub columns: usize,
}

/// The groups of a column, for writing.
pub(crate) struct LinesMut<'a> {
    first: *mut Line,
    apart: usize,
    count: usize,
    lifetime: PhantomData<&'a mut Line>,
}

/// The line of group 0 of `column`, and lines from group to group.
fn place(all: usize, groups: usize, column: usize) -> (usize, usize) {
    let in_tile = column % TILE_COLUMNS;
    let first = column - in_tile;
    (first * groups + in_tile, TILE_COLUMNS.min(all - first))
}

impl<'a> Bf16<'a> {
    /// Views the lines of `all` columns of `groups` groups.
    pub fn new(lines: &'a [Line], all: usize, groups: usize) -> Bf16<'a> {
        assert_eq!(lines.len(), all * groups, "lines of {all} columns of {groups} groups");
        Bf16 { lines, all, groups, first: 0 }
    }

    /// Some of these columns.
    pub fn slice(self, columns: Range<usize>) -> Bf16<'a> {
        assert!(columns.end <= self.all - self.first, "columns {columns:?} of {}", self.all);
        Bf16 { first: self.first + columns.start, ..self }
    }

    /// A group of a column.
    pub fn line(&self, column: usize, group: usize) -> &'a Line {
        let (first, apart) = place(self.all, self.groups, self.first + column);
        &self.lines[first + group * apart]
    }

    /// Columns from `column` on that one tile has: at most `count`.
    pub fn tile(&self, column: usize, count: usize) -> ColumnTile {
        let column = self.first + column;
        let (first, apart) = place(self.all, self.groups, column);
        let columns = count.min(apart - column % TILE_COLUMNS);
        ColumnTile { lines: &raw const self.lines[first], apart, columns }
    }
}

impl LinesMut<'_> {
    /// `count` groups of `column` from `group` on, of `all` columns of `groups` groups at `lines`.
    ///
    /// # Safety
    /// The lines exist, and nobody else uses these during the lifetime of the result.
    pub unsafe fn new(
        lines: *mut Line,
        (all, groups): (usize, usize),
        column: usize,
        (group, count): (usize, usize),
    ) -> Self {
        let (first, apart) = place(all, groups, column);
        let first = lines.wrapping_add(first + group * apart);
        LinesMut { first, apart, count, lifetime: PhantomData }
    }

    /// The groups in order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Line> {
        // SAFETY: the lines exist and are ours, says the caller of `new`; each is named once.
        (0..self.count).map(|at| unsafe { &mut *self.first.wrapping_add(at * self.apart) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_one_place_and_tiles_are_contiguous() {
        for all in [1, 2, 15, 16, 17, 33, 48] {
            let groups = 3;
            let mut lines = vec![Line::default(); all * groups];
            for column in 0..all {
                // SAFETY: nobody else has the lines.
                let mut own = unsafe {
                    LinesMut::new(lines.as_mut_ptr(), (all, groups), column, (0, groups))
                };
                for (group, line) in own.iter_mut().enumerate() {
                    assert_eq!(line.0[0], 0, "written twice");
                    line.0[0] = (1 + column * groups + group) as u16;
                }
            }
            let from = all / 3;
            let part = Bf16::new(&lines, all, groups).slice(from..all);
            for column in 0..all - from {
                let tile = part.tile(column, all - from - column);
                assert!(tile.columns >= 1 && from + column + tile.columns <= all);
                for group in 0..groups {
                    let number = (1 + (from + column) * groups + group) as u16;
                    assert_eq!(part.line(column, group).0[0], number);
                    let line = tile.lines.wrapping_add(group * tile.apart);
                    assert!(std::ptr::eq(line, part.line(column, group)));
                    let last = line.wrapping_add(tile.columns - 1);
                    assert!(std::ptr::eq(last, part.line(column + tile.columns - 1, group)));
                }
            }
        }
    }
}
