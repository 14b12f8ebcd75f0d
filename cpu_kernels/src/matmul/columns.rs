//! What the quantised kernels read of a column of activations beside its integers.

use super::lanes::Lanes;
use super::packed::Packed;
use crate::activations::GroupScale;

/// Pointers to a column's groups: integers, and scales with sums.
pub(super) type Column = (*const i8, *const GroupScale);

/// The i16 pair of sums of a group, in every lane.
#[inline(always)]
pub(super) unsafe fn sums<L: Lanes>(x: Column, group: usize) -> L::Int {
    // SAFETY: `group` is one of the column's.
    unsafe { L::splat((&raw const (*x.1.add(group)).sums).cast::<i32>().read_unaligned()) }
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
            let pair = if half == 0 { [-zero, 0] } else { [0, -zero] };
            let pair = i32::from(pair[0] as u16) | i32::from(pair[1]) << 16;
            return L::pair_dot(L::splat(pair), sums::<L>(x, group));
        }
        let eight = L::splat((*x.1.add(group)).less_eight);
        match zero {
            8 => eight,
            _ => L::shl(eight, (zero as usize / 8).ilog2() as usize),
        }
    }
}
