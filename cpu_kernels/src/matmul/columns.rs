//! What the quantised kernels read of a column of activations beside its integers.

use super::lanes::Lanes;
use super::packed::Packed;
use crate::activations::{GroupScale, HalfStarts, Quantized};
use crate::blocks::GROUP;

/// Pointers to a column's groups.
#[derive(Clone, Copy)]
pub(super) struct Column {
    /// The integers.
    pub quants: *const i8,
    /// Scales, and sums.
    pub scales: *const GroupScale,
    /// Sums that only types with a scale per half read.
    pub starts: *const HalfStarts,
}

impl Column {
    /// What a tile has before its columns are known. A loop then fills it: made by
    /// `std::array::from_fn`, eight columns of `Q4_0` had three more stores a group, and were 3 %
    /// slower.
    pub const NONE: Column = {
        let (quants, scales) = (std::ptr::null(), std::ptr::null());
        Column { quants, scales, starts: std::ptr::null() }
    };

    /// Group `group` of column `column` and those that follow it.
    #[inline(always)]
    pub fn new(x: &Quantized<'_>, column: usize, group: usize) -> Column {
        let first = column * x.groups_apart + group;
        Column {
            quants: x.quants[first * GROUP..].as_ptr(),
            scales: x.scales[first..].as_ptr(),
            starts: x.starts[first..].as_ptr(),
        }
    }
}

/// The i16 pair of negated sums of a group, in every lane.
#[inline(always)]
pub(super) unsafe fn less_sums<L: Lanes>(x: Column, group: usize) -> L::Int {
    // SAFETY: `group` is one of the column's.
    unsafe {
        L::splat((&raw const (*x.scales.add(group)).less_sums).cast::<i32>().read_unaligned())
    }
}

/// Where the integer sums of a group, or of half `half` of it, start for a column: at minus the
/// zero point times the sum of the activations, so that `Σ q·x` of unsigned quants becomes
/// `Σ (q − zero)·x`.
///
/// # Safety
/// The CPU has the instruction set of `L`; `group` is one of the column's.
#[inline(always)]
pub(super) unsafe fn start<L: Lanes, P: Packed>(half: usize, x: Column, group: usize) -> L::Int {
    const { assert!(!P::HALVES || (!P::SIGNED && P::ZERO <= 32)) };
    let zero = if P::SIGNED { L::SIGNED_EXCESS } else { P::ZERO };
    // SAFETY: passed on.
    unsafe {
        if zero == 0 {
            return L::splat(0);
        }
        if P::HALVES {
            let start = L::splat((*x.starts.add(group))[half]);
            return match zero {
                32 => start,
                _ => L::shift_signed(start, 5 - zero.ilog2() as usize),
            };
        }
        let eight = L::splat((*x.scales.add(group)).less_eight);
        match zero {
            8 => eight,
            _ => L::shl(eight, (zero as usize / 8).ilog2() as usize),
        }
    }
}
