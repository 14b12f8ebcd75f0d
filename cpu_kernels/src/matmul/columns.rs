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

/// What the sums of a group's activations (as an i16 pair) are multiplied with to start the
/// integer sums: minus the zero point, which makes `Σ q·x` of unsigned quants `Σ (q − zero)·x`.
pub(super) fn zero_pair<L: Lanes, P: Packed>(half: usize) -> i32 {
    let zero = if P::SIGNED { L::SIGNED_EXCESS } else { P::ZERO };
    let pair = match (P::HALVES, half) {
        (false, _) => [-zero, -zero],
        (true, 0) => [-zero, 0],
        (true, _) => [0, -zero],
    };
    i32::from(pair[0] as u16) | i32::from(pair[1]) << 16
}

/// Start of the integer sums of `T` columns.
///
/// # Safety
/// The CPU has the instruction set of `L`; `group` is one of the columns'.
#[inline(always)]
pub(super) unsafe fn zero_points<L: Lanes, P: Packed, const T: usize>(
    half: usize,
    group: usize,
    x: &[Column; T],
) -> [L::Int; T] {
    let pair = zero_pair::<L, P>(half);
    // SAFETY: `group` is one of the column's.
    unsafe {
        let mut start = [L::splat(0); T];
        if pair != 0 {
            for c in 0..T {
                start[c] = L::pair_dot(L::splat(pair), sums::<L>(x[c], group));
            }
        }
        start
    }
}
