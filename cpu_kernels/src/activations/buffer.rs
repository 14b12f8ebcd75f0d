//! Memory of 8-bit activations: allocated once, viewed with the shape of each step.

use super::{Activations, GroupScale, Quantized, groups_apart};
use crate::blocks::GROUP;
use std::marker::PhantomData;
use std::ops::Range;

/// Owns the 8-bit form of up to `columns_max · cols_max` activations; allocates nothing later.
pub struct ActivationBuffer {
    quants: Vec<i8>,
    scales: Vec<GroupScale>,
}

/// A writable 8-bit form of `[columns, cols]` that several threads fill in disjoint parts.
///
/// It is a raw view, so that each worker can have a copy of it. Who makes one
/// ([`ActivationBuffer::writer`]) promises that parts written at the same time are disjoint.
#[derive(Clone, Copy)]
pub struct ActivationsMut<'a> {
    columns: usize,
    cols: usize,
    /// `[columns, groups_apart · 32]`
    quants: *mut i8,
    /// `[columns, groups_apart]`
    scales: *mut GroupScale,
    lifetime: PhantomData<&'a mut ActivationBuffer>,
}

// SAFETY: the promise made at `writer` is exactly that uses on several threads do not conflict.
unsafe impl Send for ActivationsMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for ActivationsMut<'_> {}

impl ActivationBuffer {
    /// A buffer for every shape with `columns ≤ columns_max` and `cols ≤ cols_max`.
    pub fn new(columns_max: usize, cols_max: usize) -> ActivationBuffer {
        let groups = columns_max * groups_apart(cols_max.div_ceil(GROUP));
        ActivationBuffer {
            quants: vec![0; groups * GROUP],
            scales: vec![GroupScale::default(); groups],
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.quants.len() + self.scales.len() * size_of::<GroupScale>()
    }

    /// The memory of the integers, zero as long as nothing was written: for who wants its pages to
    /// exist before they are needed.
    pub fn quants_mut(&mut self) -> &mut [i8] {
        &mut self.quants
    }

    /// A target of shape `[columns, cols]`. A later call reuses the memory.
    ///
    /// # Safety
    /// While copies of the result live: no two threads may fill overlapping ranges of one column
    /// at the same time, and no part may be filled while a view made by
    /// [`ActivationsMut::view`] is in use.
    ///
    /// # Panics
    /// When the shape exceeds the buffer or `cols` is no multiple of 32.
    pub unsafe fn writer(&mut self, columns: usize, cols: usize) -> ActivationsMut<'_> {
        assert!(cols.is_multiple_of(GROUP), "8-bit activations need cols % 32 == 0, got {cols}");
        let need = columns.saturating_mul(groups_apart(cols / GROUP) * GROUP);
        let have = self.quants.len();
        assert!(need <= have, "activations [{columns}, {cols}] exceed a buffer of {have}");
        ActivationsMut {
            columns,
            cols,
            quants: self.quants.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            lifetime: PhantomData,
        }
    }
}

impl<'a> ActivationsMut<'a> {
    /// Tokens in this shape.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Elements per token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The filled activations with their f32 values `[columns, cols]`, for matmuls.
    ///
    /// # Panics
    /// When `values.len()` is not `columns · cols`.
    pub fn view(&self, values: &'a [f32]) -> Activations<'a> {
        let elements = self.columns * self.cols;
        assert_eq!(values.len(), elements, "activations [{}, {}]", self.columns, self.cols);
        let groups_apart = groups_apart(self.cols / GROUP);
        let groups = self.columns * groups_apart;
        // SAFETY: `writer` checked that the buffer holds this shape and borrowed it for 'a; its
        // caller promised that nothing is filled while this view is in use.
        let quantized = unsafe {
            Quantized {
                quants: std::slice::from_raw_parts(self.quants, groups * GROUP),
                scales: std::slice::from_raw_parts(self.scales, groups),
                groups_apart,
            }
        };
        Activations { columns: self.columns, cols: self.cols, values, quantized: Some(quantized) }
    }

    /// Copies the 8-bit form of token `from` of `source` to token `to`.
    ///
    /// # Panics
    /// When `source` has none, or tokens of another length.
    pub fn copy_column(&self, source: &Activations<'_>, from: usize, to: usize) {
        let cols = self.cols;
        assert_eq!(source.cols(), cols, "elements per token");
        let source = source.quantized().expect("activations with an 8-bit form");
        let (quants, scales) = self.groups_mut(to, 0..cols);
        let first = from * source.groups_apart;
        quants.copy_from_slice(&source.quants[first * GROUP..][..cols]);
        scales.copy_from_slice(&source.scales[first..][..cols / GROUP]);
    }

    /// The integers and scales of elements `range` of one column.
    pub(super) fn groups_mut(
        &self,
        column: usize,
        range: Range<usize>,
    ) -> (&'a mut [i8], &'a mut [GroupScale]) {
        assert!(column < self.columns, "column {column} of {}", self.columns);
        assert!(
            range.start <= range.end
                && range.end <= self.cols
                && range.start.is_multiple_of(GROUP)
                && range.end.is_multiple_of(GROUP),
            "range {range:?} is not made of whole groups of {} columns",
            self.cols
        );
        let first = column * groups_apart(self.cols / GROUP) + range.start / GROUP;
        // SAFETY: the range lies in the buffer (asserted above and in `writer`); the maker of
        // this view promised that no other thread uses the same part now.
        unsafe {
            (
                std::slice::from_raw_parts_mut(self.quants.add(first * GROUP), range.len()),
                std::slice::from_raw_parts_mut(self.scales.add(first), range.len() / GROUP),
            )
        }
    }
}
