//! Owns the rounded form of activations that all quantised weights are multiplied with: 8 bits, or
//! bf16 where the CPU has tiles for it ([`ActivationForm`]).
//! It must not know weight types, threads or models: buffers and ranges come from the caller.
//! Called by the executor before each group of matmuls; read by `matmul`.
//!
//! **8 bits.** Per group of 32: `scale = amax / 127`, `q = round_half_even(x · (127 / amax))`, so
//! `|x − scale·q| ≤ amax/254 + rounding`. Scales stay f32, and groups stay at 32 elements for
//! every weight type (llama.cpp: f16 scales, and groups of 256 for K types).
//! A group with a NaN or infinity gets `scale = NaN`, `q = 0`, so that it poisons its outputs;
//! one whose amax is below [`AMAX_MIN`] becomes zero.
//!
//! **bf16.** Each element is `bf16(x · 2⁶⁴)`, rounded to even; `matmul/bf16.rs` says what the power
//! of two is for. Elements of 2⁶³ and more become infinite; NaN and infinity stay what they are.
//! Within each four elements the order is 0, 2, 1, 3, which makes weights cheap to decode.

mod buffer;
mod lines;
pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

use crate::blocks::GROUP;
use crate::dispatch::Kernels;
use buffer::Memory;
pub use buffer::{ActivationBuffer, ActivationsMut};
pub(crate) use lines::{Bf16, ColumnTile, Line, LinesMut, TILE_COLUMNS};
use std::ops::Range;

/// Smallest group maximum that is represented: below it `127 / amax` overflows.
pub const AMAX_MIN: f32 = 127.0 * f32::MIN_POSITIVE;

/// What a group of 32 activations has besides its 32 integers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct GroupScale {
    /// Value of one integer step.
    pub scale: f32,
    /// `scale` times the sum of the integers: the group's sum, for weight types with offsets.
    pub scaled_sum: f32,
    /// Minus the sums of the integers of elements 0..16 and 16..32; each within ±2032.
    pub less_sums: [i16; 2],
    /// `−8` times the sum of the integers: where `Σ (q − 8)·x` starts when `q` is unsigned.
    pub less_eight: i32,
}

impl GroupScale {
    /// What a group with this scale has whose halves sum up to `sums`.
    #[inline(always)]
    pub(crate) fn new(scale: f32, sums: [i32; 2]) -> GroupScale {
        let sum = sums[0] + sums[1];
        // Each half is within ±2032.
        let less_sums = sums.map(|sum| -sum as i16);
        GroupScale { scale, scaled_sum: scale * sum as f32, less_sums, less_eight: -8 * sum }
    }

    /// Made beside the scale: reading the sums back from memory, where they had just been written
    /// in smaller pieces, was a quarter of rounding's time.
    #[inline(always)]
    fn half_starts(&self) -> HalfStarts {
        self.less_sums.map(|less| 32 * i32::from(less))
    }
}

/// Where integer sums of the halves of a group start for weights with a zero point of 32 and a
/// scale per half: at −32 times the sum of the integers, so that `Σ q·x` becomes `Σ (q − 32)·x`.
/// Apart from [`GroupScale`], since types with one scale per group lost 3 to 5 % to longer groups.
pub(crate) type HalfStarts = [i32; 2];

/// Quantises whole groups: `(values, quants, (scales, starts))` of `n·32`, `n·32` and `n` elements.
pub(crate) type QuantizeFn = unsafe fn(&[f32], &mut [i8], (&mut [GroupScale], &mut [HalfStarts]));

/// `values − scale·quant` of whole groups: `(values, quants, scales, residual)`.
pub(crate) type ResidualFn = unsafe fn(&[f32], &[i8], &[GroupScale], &mut [f32]);

/// Rounds whole groups to bf16: `(values, lines)` of `n·32` and `n` elements.
pub(crate) type RoundFn = unsafe fn(&[f32], LinesMut<'_>);

/// The activation kernels of one instruction set, by what its matmuls read.
pub(crate) enum ActivationTable {
    Int8 { quantize: QuantizeFn, residual: ResidualFn },
    Bf16 { round: RoundFn },
}

/// How activations are rounded for quantised weights; a matter of the instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationForm {
    /// 8 bits, and a scale per 32 elements.
    Int8,
    /// bf16.
    Bf16,
}

/// Power of two that activations are multiplied with before they become bf16.
pub(crate) const BF16_EXPONENT: i32 = 64;

/// Which element of four lies at each place of them.
pub(crate) const BF16_ORDER: [usize; 4] = [0, 2, 1, 3];

/// Activations of a step, `[columns, cols]`: one column per token.
#[derive(Clone, Copy)]
pub struct Activations<'a> {
    columns: usize,
    cols: usize,
    /// `[columns, cols]` f32, row-major.
    values: &'a [f32],
    /// Absent where only float weights follow.
    rounded: Option<Rounded<'a>>,
}

/// The form that quantised weights meet.
#[derive(Clone, Copy)]
enum Rounded<'a> {
    Int8(Quantized<'a>),
    Bf16(Bf16<'a>),
}

/// The 8-bit form of `[columns, cols]` activations.
#[derive(Clone, Copy)]
pub(crate) struct Quantized<'a> {
    /// `[columns, groups_apart · 32]` i8, row-major; beyond a column's groups lies nothing of use.
    pub quants: &'a [i8],
    /// `[columns, groups_apart]`, row-major.
    pub scales: &'a [GroupScale],
    /// `[columns, groups_apart]`, row-major.
    pub starts: &'a [HalfStarts],
    /// Groups from one column to the next.
    pub groups_apart: usize,
}

/// Groups from one 8-bit column to the next: an odd number of cache lines, so that the same group
/// of many columns lies in different sets of a cache (16 columns 4,096 bytes apart share one
/// set of the first level, which has room for 8 or 12).
pub(crate) fn groups_apart(groups: usize) -> usize {
    const PER_LINE: usize = 64 / GROUP;
    (groups.div_ceil(PER_LINE) | 1) * PER_LINE
}

impl<'a> Activations<'a> {
    /// Activations for float weights only: `values` is `[columns, cols]`.
    ///
    /// Any alignment is right; columns that start on cache lines (64 bytes) are fastest.
    ///
    /// # Panics
    /// When `values.len()` is not `columns · cols`.
    pub fn float(values: &'a [f32], columns: usize, cols: usize) -> Activations<'a> {
        assert_eq!(values.len(), columns * cols, "activations [{columns}, {cols}]");
        Activations { columns, cols, values, rounded: None }
    }

    /// The activations of tokens `columns` alone.
    ///
    /// # Panics
    /// When there are no such tokens.
    pub fn slice(&self, columns: Range<usize>) -> Activations<'a> {
        let cols = self.cols;
        let rounded = self.rounded.map(|all| match all {
            Rounded::Int8(all) => {
                let groups = columns.start * all.groups_apart..columns.end * all.groups_apart;
                Rounded::Int8(Quantized {
                    quants: &all.quants[groups.start * GROUP..groups.end * GROUP],
                    scales: &all.scales[groups.clone()],
                    starts: &all.starts[groups],
                    ..all
                })
            }
            Rounded::Bf16(all) => Rounded::Bf16(all.slice(columns.clone())),
        });
        let values = &self.values[columns.start * cols..columns.end * cols];
        Activations { columns: columns.len(), cols, values, rounded }
    }

    /// Number of tokens.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Elements per token: the inner dimension of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// f32 values of one token, `[cols]`.
    pub(crate) fn column(&self, column: usize) -> &'a [f32] {
        &self.values[column * self.cols..][..self.cols]
    }

    /// What quantised weights can meet: one form, or none.
    pub fn form(&self) -> Option<ActivationForm> {
        self.rounded.map(|rounded| match rounded {
            Rounded::Int8(_) => ActivationForm::Int8,
            Rounded::Bf16(_) => ActivationForm::Bf16,
        })
    }

    pub(crate) fn quantized(&self) -> Option<Quantized<'a>> {
        match self.rounded {
            Some(Rounded::Int8(quantized)) => Some(quantized),
            _ => None,
        }
    }

    pub(crate) fn bf16(&self) -> Option<Bf16<'a>> {
        match self.rounded {
            Some(Rounded::Bf16(bf16)) => Some(bf16),
            _ => None,
        }
    }
}

impl Quantized<'_> {
    /// Integers and scale of one group of one column.
    pub fn group(&self, column: usize, group: usize) -> (&[i8], &GroupScale) {
        let index = column * self.groups_apart + group;
        (&self.quants[index * GROUP..][..GROUP], &self.scales[index])
    }
}

impl Kernels {
    /// What the matmuls of these kernels read beside quantised weights.
    pub fn activation_form(&self) -> ActivationForm {
        match self.activations {
            ActivationTable::Int8 { .. } => ActivationForm::Int8,
            ActivationTable::Bf16 { .. } => ActivationForm::Bf16,
        }
    }

    /// Fills the rounded form of elements `range` of token `column` from `values[column]`'s slice
    /// `values` (`range.len()` elements). The result does not depend on how a column is split.
    ///
    /// # Panics
    /// When `range` is not made of whole groups of 32, or does not fit `target` or `values`, or
    /// `target` has the form of other kernels.
    pub fn quantize_activations(
        &self,
        values: &[f32],
        target: ActivationsMut<'_>,
        column: usize,
        range: Range<usize>,
    ) {
        assert_eq!(values.len(), range.len(), "values of range {range:?}");
        // SAFETY: this table was reached through `for_isa`, so the CPU can run its functions.
        unsafe {
            match (&self.activations, target.part(column, range)) {
                (ActivationTable::Int8 { quantize, .. }, Memory::Int8(quants, scales, starts)) => {
                    quantize(values, quants, (scales, starts));
                }
                (ActivationTable::Bf16 { round }, Memory::Bf16(lines)) => round(values, lines),
                _ => panic!("a buffer of another form than {:?}", self.activation_form()),
            }
        }
    }

    /// What the 8-bit form of elements `range` of token `column` misses of `values`:
    /// `residual = values − scale·quant`. Quantised again, as a token of its own, it makes the
    /// product of both with a matrix as good as one with 16-bit activations.
    ///
    /// # Panics
    /// When `range` is not made of whole groups of 32, the lengths differ, or the form is not
    /// [`ActivationForm::Int8`].
    pub fn activation_residual(
        &self,
        values: &[f32],
        (target, column): (ActivationsMut<'_>, usize),
        range: Range<usize>,
        residual: &mut [f32],
    ) {
        assert_eq!((values.len(), residual.len()), (range.len(), range.len()), "lengths");
        let parts = (&self.activations, target.part(column, range));
        let (ActivationTable::Int8 { residual: kernel, .. }, Memory::Int8(quants, scales, _)) =
            parts
        else {
            panic!("{:?} activations have no second row", self.activation_form());
        };
        // SAFETY: this table was reached through `for_isa`, so the CPU can run its functions.
        unsafe { kernel(values, quants, scales, residual) }
    }
}
