//! Memory of rounded activations: allocated once, viewed with the shape of each step.

use super::{
    ActivationForm, Activations, Bf16, GroupScale, HalfStarts, Line, LinesMut, Quantized, Rounded,
    groups_apart,
};
use crate::blocks::GROUP;
use std::marker::PhantomData;
use std::ops::Range;

/// Owns the rounded form of up to `columns_max · cols_max` activations; allocates nothing later.
pub struct ActivationBuffer {
    form: ActivationForm,
    /// Of bf16, and otherwise empty, like the others for it.
    lines: Vec<Line>,
    quants: Vec<i8>,
    scales: Vec<GroupScale>,
    starts: Vec<HalfStarts>,
}

/// A writable rounded form of `[columns, cols]` that several threads fill in disjoint parts.
///
/// It is a raw view, so that each worker can have a copy of it. Who makes one
/// ([`ActivationBuffer::writer`]) promises that parts written at the same time are disjoint.
#[derive(Clone, Copy)]
pub struct ActivationsMut<'a> {
    columns: usize,
    cols: usize,
    pointers: Pointers,
    lifetime: PhantomData<&'a mut ActivationBuffer>,
}

#[derive(Clone, Copy)]
enum Pointers {
    /// `[columns, groups_apart · 32]`, and twice `[columns, groups_apart]`
    Int8(*mut i8, *mut GroupScale, *mut HalfStarts),
    /// What `lines.rs` says.
    Bf16(*mut Line),
}

/// A stretch of a column, for writing.
pub(super) enum Memory<'a> {
    Int8(&'a mut [i8], &'a mut [GroupScale], &'a mut [HalfStarts]),
    Bf16(LinesMut<'a>),
}

// SAFETY: the promise made at `writer` is exactly that uses on several threads do not conflict.
unsafe impl Send for ActivationsMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for ActivationsMut<'_> {}

impl ActivationBuffer {
    /// A buffer of `form` for every shape with `columns ≤ columns_max` and `cols ≤ cols_max`.
    pub fn new(form: ActivationForm, columns_max: usize, cols_max: usize) -> ActivationBuffer {
        let groups = cols_max.div_ceil(GROUP);
        let (mut lines, mut quants) = (Vec::new(), Vec::new());
        let (mut scales, mut starts) = (Vec::new(), Vec::new());
        match form {
            ActivationForm::Int8 => {
                let groups = columns_max * groups_apart(groups);
                quants = vec![0; groups * GROUP];
                scales = vec![GroupScale::default(); groups];
                starts = vec![HalfStarts::default(); groups];
            }
            ActivationForm::Bf16 => lines = vec![Line::default(); columns_max * groups],
        }
        ActivationBuffer { form, lines, quants, scales, starts }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let of_8_bits = size_of_val(&*self.quants) + size_of_val(&*self.scales);
        size_of_val(&*self.lines) + of_8_bits + size_of_val(&*self.starts)
    }

    /// The memory of the elements, zero as long as nothing was written: for who wants its pages to
    /// exist before they are needed.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self.form {
            ActivationForm::Int8 => bytemuck::cast_slice_mut(&mut self.quants),
            ActivationForm::Bf16 => {
                let bytes = size_of_val(&*self.lines);
                // SAFETY: lines are made of integers, without gaps, and any bytes are integers.
                unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), bytes) }
            }
        }
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
        assert!(cols.is_multiple_of(GROUP), "rounded activations need cols % 32 == 0, got {cols}");
        let (apart, have) = match self.form {
            ActivationForm::Int8 => (groups_apart(cols / GROUP), self.scales.len()),
            ActivationForm::Bf16 => (cols / GROUP, self.lines.len()),
        };
        let need = columns.saturating_mul(apart);
        assert!(need <= have, "activations [{columns}, {cols}] exceed a buffer of {have} groups");
        let pointers = match self.form {
            ActivationForm::Int8 => {
                let (scales, starts) = (self.scales.as_mut_ptr(), self.starts.as_mut_ptr());
                Pointers::Int8(self.quants.as_mut_ptr(), scales, starts)
            }
            ActivationForm::Bf16 => Pointers::Bf16(self.lines.as_mut_ptr()),
        };
        ActivationsMut { columns, cols, pointers, lifetime: PhantomData }
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

    /// How elements are rounded.
    pub fn form(&self) -> ActivationForm {
        match self.pointers {
            Pointers::Int8(..) => ActivationForm::Int8,
            Pointers::Bf16(_) => ActivationForm::Bf16,
        }
    }

    /// The filled activations with their f32 values `[columns, cols]`, for matmuls.
    ///
    /// # Panics
    /// When `values.len()` is not `columns · cols`.
    pub fn view(&self, values: &'a [f32]) -> Activations<'a> {
        let elements = self.columns * self.cols;
        assert_eq!(values.len(), elements, "activations [{}, {}]", self.columns, self.cols);
        // SAFETY: `writer` checked that the buffer holds this shape and borrowed it for 'a; its
        // caller promised that nothing is filled while this view is in use.
        let rounded = unsafe {
            match self.pointers {
                Pointers::Int8(quants, scales, starts) => {
                    let groups_apart = groups_apart(self.cols / GROUP);
                    let groups = self.columns * groups_apart;
                    Rounded::Int8(Quantized {
                        quants: std::slice::from_raw_parts(quants, groups * GROUP),
                        scales: std::slice::from_raw_parts(scales, groups),
                        starts: std::slice::from_raw_parts(starts, groups),
                        groups_apart,
                    })
                }
                Pointers::Bf16(lines) => {
                    let groups = self.cols / GROUP;
                    let lines = std::slice::from_raw_parts(lines, self.columns * groups);
                    Rounded::Bf16(Bf16::new(lines, self.columns, groups))
                }
            }
        };
        Activations { columns: self.columns, cols: self.cols, values, rounded: Some(rounded) }
    }

    /// Copies the rounded form of token `from` of `source` to token `to`.
    ///
    /// # Panics
    /// When `source` has another form or none, or tokens of another length.
    pub fn copy_column(&self, source: &Activations<'_>, from: usize, to: usize) {
        let cols = self.cols;
        assert_eq!(source.cols(), cols, "elements per token");
        match (self.part(to, 0..cols), source.rounded) {
            (Memory::Int8(quants, scales, starts), Some(Rounded::Int8(source))) => {
                let first = from * source.groups_apart;
                quants.copy_from_slice(&source.quants[first * GROUP..][..cols]);
                scales.copy_from_slice(&source.scales[first..][..cols / GROUP]);
                starts.copy_from_slice(&source.starts[first..][..cols / GROUP]);
            }
            (Memory::Bf16(mut lines), Some(Rounded::Bf16(source))) => {
                for (group, line) in lines.iter_mut().enumerate() {
                    *line = *source.line(from, group);
                }
            }
            _ => panic!("{:?} to {:?} activations", source.form(), self.form()),
        }
    }

    /// Elements `range` of one column.
    pub(super) fn part(&self, column: usize, range: Range<usize>) -> Memory<'a> {
        assert!(column < self.columns, "column {column} of {}", self.columns);
        assert!(
            range.start <= range.end
                && range.end <= self.cols
                && range.start.is_multiple_of(GROUP)
                && range.end.is_multiple_of(GROUP),
            "range {range:?} is not made of whole groups of {} columns",
            self.cols
        );
        let (group, groups) = (range.start / GROUP, range.len() / GROUP);
        // SAFETY: the range lies in the buffer (asserted above and in `writer`); the maker of
        // this view promised that no other thread uses the same part now.
        unsafe {
            match self.pointers {
                Pointers::Int8(quants, scales, starts) => {
                    let first = column * groups_apart(self.cols / GROUP) + group;
                    Memory::Int8(
                        std::slice::from_raw_parts_mut(quants.add(first * GROUP), range.len()),
                        std::slice::from_raw_parts_mut(scales.add(first), groups),
                        std::slice::from_raw_parts_mut(starts.add(first), groups),
                    )
                }
                Pointers::Bf16(lines) => {
                    let shape = (self.columns, self.cols / GROUP);
                    Memory::Bf16(LinesMut::new(lines, shape, column, (group, groups)))
                }
            }
        }
    }
}
