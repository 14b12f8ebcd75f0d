//! Which weights a quantised kernel asks for ahead of their use, and when.
//!
//! Where a group's fields lie apart in a block, hardware fetches nothing ahead, so every line is
//! asked for. On Zen 4 it can matter when that happens. Asked for between the products, or in
//! whatever order the compiler finds best, one column of `Q6_K` reads at nine tenths of the
//! memory's rate where that is 35 GB/s, and at three quarters where it is 60. The same lines asked
//! for in one run before the products, a few cycles apart, give all of it both times. Types that
//! decode more slowly, and several columns, gain nothing by it.

use super::lanes::Lanes;
use super::packed::Packed;
use crate::blocks::GROUP;
use crate::repack::ROWS;
use std::arch::asm;

/// How far ahead of its use weights are fetched: hardware prefetchers stop at each page.
const AHEAD_BYTES: usize = 12 << 10;
/// The same into the second-level cache, which has room for more: 8 columns of `Q4_0` then read 23
/// instead of 22 GB/s on Zen 4.
const AHEAD_SECOND_BYTES: usize = 16 << 10;
const LINE_BYTES: usize = 64;

/// When weights are fetched.
pub(super) trait Ahead {
    /// Before each group, what such a group takes.
    const BY_GROUPS: bool = false;
    /// Before each turn of groups, what these take, in one run.
    const IN_RUNS: bool = false;
}

/// Hardware does it alone.
pub(super) struct Never;
pub(super) struct ByGroups;
pub(super) struct InRuns;

impl Ahead for Never {}

impl Ahead for ByGroups {
    const BY_GROUPS: bool = true;
}

impl Ahead for InRuns {
    const IN_RUNS: bool = true;
}

/// Whether weights are fetched into the second-level cache: with several columns, and where fields
/// lie apart.
const fn into_second<P: Packed, const T: usize>() -> bool {
    T > 1 || P::APART
}

/// How many blocks of some rows ahead of its use one is fetched.
pub(super) const fn blocks_ahead<P: Packed, const T: usize>() -> usize {
    let bytes = if into_second::<P, T>() { AHEAD_SECOND_BYTES } else { AHEAD_BYTES };
    bytes.div_ceil(ROWS * P::DTYPE.block_bytes())
}

/// Asks for what lies ahead of a group, in each of some groups of rows.
#[inline(always)]
pub(super) unsafe fn fetch_group<L: Lanes, P: Packed, const R: usize, const T: usize>(
    fetched: [*const u8; R],
    group: usize,
) {
    let lines = const { stream_lines::<P>() };
    for line in 0..lines {
        for fetched in fetched {
            let at = fetched.wrapping_add(LINE_BYTES * (group * lines + line));
            match const { into_second::<P, T>() } {
                true => fetch_second(at),
                // SAFETY: a prefetch of any address is harmless.
                false => unsafe { L::prefetch(at) },
            }
        }
    }
}

/// Asks for a line into the second-level cache, before what follows in the program. Compilers
/// gather such requests: 16 columns of `Q4_0` had 325 GMAC/s on two threads of a Zen 4, not 343.
#[inline(always)]
fn fetch_second(at: *const u8) {
    // SAFETY: a prefetch of any address is harmless.
    unsafe {
        asm!("prefetcht1 [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags))
    }
}

/// Asks for some bytes into the second-level cache: here, one line after the other, with
/// instructions between them that do nothing.
#[inline(always)]
pub(super) fn fetch_run(from: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(LINE_BYTES) {
        let at = from.wrapping_add(LINE_BYTES * line);
        // SAFETY: a prefetch of any address is harmless. That it might touch memory keeps loads of
        // weights behind it.
        unsafe {
            asm!(
                "prefetcht1 [{at}]",
                ".rept 12",
                "nop",
                ".endr",
                at = in(reg) at,
                options(nostack, preserves_flags),
            );
        }
    }
}

/// What a group takes of the stream of one group of rows, in whole cache lines.
pub(super) const fn stream_lines<P: Packed>() -> usize {
    (ROWS * P::DTYPE.block_bytes() * GROUP).div_ceil(LINE_BYTES * P::DTYPE.block_elements())
}
