//! What the quantised kernels read of a column of activations beside its integers.

use super::lanes::Lanes;
use super::packed::Packed;
use crate::activations::GroupScale;

/// Pointers to a column's groups: integers, and scales with sums.
pub(super) type Column = (*const i8, *const GroupScale);

/// The i16 pair of negated sums of a group, in every lane.
#[inline(always)]
pub(super) unsafe fn less_sums<L: Lanes>(x: Column, group: usize) -> L::Int {
    // SAFETY: `group` is one of the column's.
    unsafe { L::splat((&raw const (*x.1.add(group)).less_sums).cast::<i32>().read_unaligned()) }
}

/// Where the integer sums of a group, or of half `half` of it, start for a column: at minus the
/// zero point times the sum of the activations, so that `Σ q·x` of unsigned quants becomes
/// `Σ (q − zero)·x`.
///
/// # Safety
/// The CPU has the instruction set of `L`; `group` is one of the column's.
#[inline(always)]
pub(super) unsafe fn start<L: Lanes, P: Packed>(half: usize, x: Column, group: usize) -> L::Int {
    let zero = if P::SIGNED { L::SIGNED_EXCESS } else { P::ZERO };
    // SAFETY: passed on.
    unsafe {
        if zero == 0 {
            return L::splat(0);
        }
        if P::HALVES {
            // `vpmaddwd` would do with one instruction, but on a port that the products need.
            let pair = less_sums::<L>(x, group);
            let shift = (zero as usize).ilog2() as usize;
            return match half {
                0 => L::shift_signed(L::shl(pair, 16), 16 - shift),
                _ => L::and(L::shift_signed(pair, 16 - shift), L::splat(-i32::from(zero))),
            };
        }
        let eight = L::splat((*x.1.add(group)).less_eight);
        match zero {
            8 => eight,
            _ => L::shl(eight, (zero as usize / 8).ilog2() as usize),
        }
    }
}
