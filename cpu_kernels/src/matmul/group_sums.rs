//! The sums of one group of 32 elements, weights straight from the packed layout: what
//! `interleaved.rs` does for each group of each tile.

use super::columns::{Column, less_sums, start};
use super::lanes::Lanes;
use super::packed::{Block, MinKind, Packed};
use crate::blocks::GROUP;
use std::arch::asm;

/// `$call` for each group of some, with the group known at compile time.
macro_rules! for_each_group {
    ($groups:expr, |$group:ident| $call:expr) => {
        for_each_group!($groups, $group, $call, 0 1 2 3 4 5 6 7)
    };
    ($groups:expr, $group:ident, $call:expr, $($number:literal)*) => {
        $(if $number < $groups {
            let $group: usize = $number;
            $call;
        })*
    };
}
pub(super) use for_each_group;

/// Keeps loads of a group behind those of the group before it. Compilers otherwise load all fields
/// that groups share at once, more than there are registers, and park them in memory: one column
/// of `Q6_K` took a quarter longer.
#[inline(always)]
pub(super) fn keep_order<P: Packed>() {
    if const { P::DTYPE.block_elements() > GROUP } {
        // SAFETY: no instruction; the compiler is only told that memory may be read or written.
        unsafe { asm!("", options(nostack, preserves_flags)) }
    }
}

/// One step of the accumulation for `T` columns; the twin of `scalar::accumulate`.
#[inline(always)]
pub(super) unsafe fn sum_group<L: Lanes, P: Packed, const R: usize, const T: usize>(
    blocks: &[Block; R],
    group: usize,
    x_group: usize,
    x: &[Column; T],
    acc: &mut [[L::Float; T]; R],
) {
    // SAFETY: `group` is one of the blocks', and `x_group` one of the column's.
    unsafe {
        if P::HALVES {
            for half in 0..2 {
                sum_part::<L, P, R, T>(blocks, (group, half), x_group, x, acc);
            }
        } else {
            sum_part::<L, P, R, T>(blocks, (group, 0), x_group, x, acc);
        }
        add_min::<L, P, R, T>(blocks, group, x_group, x, acc);
    }
}

/// `N` groups that lie in the same bytes, word by word, so that what they share is loaded once; for
/// few columns, since each has sums for all of them. A sum meets what [`sum_group`] does to it.
#[inline(always)]
pub(super) unsafe fn sum_together<
    L: Lanes,
    P: Packed,
    const R: usize,
    const T: usize,
    const N: usize,
>(
    blocks: &[Block; R],
    first: usize,
    x_first: usize,
    x: &[Column; T],
    acc: &mut [[L::Float; T]; R],
) {
    let parts = const { if P::HALVES { 2 } else { 1 } };
    // SAFETY: the groups are the blocks' and the columns'.
    unsafe {
        let mut isum = [[[[L::splat(0); T]; R]; 2]; N];
        for (n, isum) in isum.iter_mut().enumerate() {
            for (half, isum) in isum.iter_mut().enumerate().take(parts) {
                start_sums::<L, P, R, T>(half, x, x_first + n, isum);
            }
        }
        for_each_group!(8, |word| {
            for (n, isum) in isum.iter_mut().enumerate() {
                let isum = &mut isum[word * parts / 8];
                dot_word::<L, P, R, T>((blocks, first + n, word), x_first + n, x, isum);
            }
        });
        for (n, isum) in isum.iter().enumerate() {
            for (half, isum) in isum.iter().enumerate().take(parts) {
                let at = (blocks, first + n, half);
                add_part::<L, P, R, T>(at, x_first + n, x, isum, acc);
            }
            add_min::<L, P, R, T>(blocks, first + n, x_first + n, x, acc);
        }
    }
}

/// The offsets of a group.
#[inline(always)]
unsafe fn add_min<L: Lanes, P: Packed, const R: usize, const T: usize>(
    blocks: &[Block; R],
    group: usize,
    x_group: usize,
    x: &[Column; T],
    acc: &mut [[L::Float; T]; R],
) {
    // SAFETY: passed on.
    unsafe {
        match P::MIN {
            MinKind::None => {}
            MinKind::One => {
                let mut mins = [L::splat_f32(0.0); R];
                for r in 0..R {
                    mins[r] = P::min::<L>(blocks[r], group);
                }
                for c in 0..T {
                    let sum = L::splat_f32((*x[c].scales.add(x_group)).scaled_sum);
                    for r in 0..R {
                        acc[r][c] = L::fma(mins[r], sum, acc[r][c]);
                    }
                }
            }
            MinKind::Pair => {
                let mut pairs = [(L::splat(0), L::splat_f32(0.0)); R];
                for r in 0..R {
                    let (pair, scale) = P::min_pair::<L>(blocks[r], group);
                    pairs[r] = (pair, L::neg(scale));
                }
                for c in 0..T {
                    let x_scale = L::splat_f32((*x[c].scales.add(x_group)).scale);
                    for r in 0..R {
                        let sums = L::pair_dot(pairs[r].0, less_sums::<L>(x[c], x_group));
                        let scale = L::mul(pairs[r].1, x_scale);
                        acc[r][c] = L::fma(L::to_f32(sums), scale, acc[r][c]);
                    }
                }
            }
        }
    }
}

/// The products of a group that share a scale.
#[inline(always)]
unsafe fn sum_part<L: Lanes, P: Packed, const R: usize, const T: usize>(
    blocks: &[Block; R],
    (group, half): (usize, usize),
    x_group: usize,
    x: &[Column; T],
    acc: &mut [[L::Float; T]; R],
) {
    // SAFETY: passed on.
    unsafe {
        let mut isum = [[L::splat(0); T]; R];
        start_sums::<L, P, R, T>(half, x, x_group, &mut isum);
        let words = const { if P::HALVES { 4 } else { 8 } };
        for_each_group!(words, |word| {
            let word = half * words + word;
            dot_word::<L, P, R, T>((blocks, group, word), x_group, x, &mut isum)
        });
        add_part::<L, P, R, T>((blocks, group, half), x_group, x, &isum, acc);
    }
}

/// Where integer sums start.
#[inline(always)]
unsafe fn start_sums<L: Lanes, P: Packed, const R: usize, const T: usize>(
    half: usize,
    x: &[Column; T],
    x_group: usize,
    isum: &mut [[L::Int; T]; R],
) {
    for c in 0..T {
        // SAFETY: passed on.
        let start = unsafe { start::<L, P>(half, x[c], x_group) };
        isum.iter_mut().for_each(|isum| isum[c] = start);
    }
}

/// Adds integer sums that share a scale.
#[inline(always)]
unsafe fn add_part<L: Lanes, P: Packed, const R: usize, const T: usize>(
    (blocks, group, half): (&[Block; R], usize, usize),
    x_group: usize,
    x: &[Column; T],
    isum: &[[L::Int; T]; R],
    acc: &mut [[L::Float; T]; R],
) {
    // SAFETY: passed on.
    unsafe {
        let mut scales = [L::splat_f32(0.0); R];
        for r in 0..R {
            scales[r] = P::scale::<L>(blocks[r], group, half);
        }
        for c in 0..T {
            let x_scale = L::splat_f32((*x[c].scales.add(x_group)).scale);
            for r in 0..R {
                let scale = L::mul(scales[r], x_scale);
                acc[r][c] = L::fma(L::to_f32(isum[r][c]), scale, acc[r][c]);
            }
        }
    }
}

/// Four elements of each row times the same four of each column.
#[inline(always)]
unsafe fn dot_word<L: Lanes, P: Packed, const R: usize, const T: usize>(
    (blocks, group, word): (&[Block; R], usize, usize),
    x_group: usize,
    x: &[Column; T],
    isum: &mut [[L::Int; T]; R],
) {
    // SAFETY: group and word exist in the blocks, `x_group` in the column.
    unsafe {
        let mut words = [P::quants::<L>(blocks[0], group, word); R];
        let mut signed = [L::signed(words[0]); R];
        for r in 1..R {
            words[r] = P::quants::<L>(blocks[r], group, word);
            signed[r] = L::signed(words[r]);
        }
        for c in 0..T {
            let at = x[c].quants.add(x_group * GROUP + 4 * word).cast::<i32>();
            let x = L::splat(at.read_unaligned());
            for r in 0..R {
                isum[r][c] = if P::SIGNED {
                    L::dot_signed(isum[r][c], signed[r], x)
                } else {
                    L::dot_unsigned(isum[r][c], words[r], x)
                };
            }
        }
    }
}
