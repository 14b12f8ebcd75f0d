//! The tile unit. The standard library's intrinsics are not stable, so the instructions are written
//! out. Registers: sums of 16 columns × 16 rows in tmm0 to tmm3, columns in tmm4 and tmm5, weights
//! in tmm6, one group of rows after the other:
//!
//! | | weights of the first rows | of the second |
//! |---|---|---|
//! | **columns tmm4** | tmm0 | tmm1 |
//! | **tmm5** | tmm2 | tmm3 |
//!
//! A product takes 16 cycles, and its sums can be added to 52 cycles after it began: up to four
//! that do not wait for each other are in flight. `A` is the number of tiles of columns, `R` that
//! of groups of rows. tmm7 stays out of use: what is short where two threads share a core are
//! registers that loads and products ahead can be renamed to, and with an eighth for the second
//! weights a prompt's products took up to a seventh longer (docs/performance.md).

use crate::activations::{Line, TILE_COLUMNS};
use crate::repack::ROWS;
use std::arch::asm;

/// Bytes of a row of any tile: a cache line.
const LINE: usize = 64;

/// 16 rows × 32 elements of weights: in line `i` the elements 2i and 2i + 1 of each row, by the
/// order of activations.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Weights(pub [[u16; 2 * ROWS]; 16]);

/// Sums, `[columns][rows]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub [[f32; ROWS]; TILE_COLUMNS]);

/// What `ldtilecfg` reads: shapes of the tile registers, palette 1.
#[repr(C, align(64))]
struct TileShapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Prepares the registers for two tiles of up to 16 columns, or for one and none. Sums are zero
/// after it.
///
/// # Safety
/// The system has granted AMX.
pub(super) unsafe fn configure([first, second]: [usize; 2]) {
    debug_assert!((1..=TILE_COLUMNS).contains(&first) && second <= TILE_COLUMNS);
    // A register without rows is invalid; nobody uses the second of none.
    let (first, second) = (first as u8, second.max(1) as u8);
    let mut shapes = TileShapes {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    shapes.rows[..7].copy_from_slice(&[first, first, second, second, first, second, 16]);
    shapes.row_bytes[..7].fill(LINE as u16);
    // SAFETY: granted, says the caller; the shapes are within palette 1 (16 × 64 bytes).
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
}

/// Gives the registers up, so that the system needs not save them.
///
/// # Safety
/// The system has granted AMX.
pub(super) unsafe fn release() {
    // SAFETY: granted, says the caller.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// Sets all sums to zero.
///
/// # Safety
/// Registers are configured.
#[inline(always)]
pub(super) unsafe fn clear() {
    // SAFETY: configured, says the caller.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nostack, nomem, preserves_flags),
        );
    }
}

/// Instructions that [`multiply`] is made of, those that `A` and `R` leave out included.
pub(super) const INSTRUCTIONS: usize = 8;

/// Adds the products of a group of 32 elements: `x` has the group's lines of `A` tiles of columns.
///
/// # Safety
/// Registers are configured for columns that exist.
#[inline(always)]
pub(super) unsafe fn multiply<const A: usize, const R: usize>(
    x: [*const Line; A],
    weights: [*const Weights; R],
) {
    // SAFETY: passed on.
    unsafe {
        instruction::<A, R>(0, x, weights);
        instruction::<A, R>(1, x, weights);
        instruction::<A, R>(2, x, weights);
        instruction::<A, R>(3, x, weights);
        instruction::<A, R>(4, x, weights);
        instruction::<A, R>(5, x, weights);
        instruction::<A, R>(6, x, weights);
        instruction::<A, R>(7, x, weights);
    }
}

/// The text of requests for eight lines from `{$at}` on, the first of them at `$offset`, and so on.
macro_rules! requests {
    ($at:literal, $($offset:literal)*) => {
        concat!($("prefetcht0 [{", $at, "} + ", $offset, "]\n"),*)
    };
}
macro_rules! first_half {
    ($at:literal) => {
        requests!($at, 0 64 128 192 256 320 384 448)
    };
}
macro_rules! second_half {
    ($at:literal) => {
        requests!($at, 512 576 640 704 768 832 896 960)
    };
}

/// [`multiply`] of whole squares for who has nothing else to do between its instructions: each is
/// followed by asking for half a tile of the group that comes next, whose columns begin at `next`
/// and whose weights follow these, into the first-level cache, and for one of the eight lines
/// `ahead` into the second.
///
/// What is in the first-level cache keeps the register of a load for a short time only; and in the
/// half of a core that another thread or guest leaves, these requests keep loads of later groups
/// away, which otherwise come so early that they are in the way of the products before them.
/// Instructions that do nothing serve for that nearly as well. All in one, because what a compiler
/// puts between them (three instructions for each of these) took a seventh of the time.
///
/// # Safety
/// As for [`multiply`]; what is asked for need not exist.
#[inline(always)]
pub(super) unsafe fn multiply_square(
    (x, weights): ([*const Line; 2], [*const Weights; 2]),
    next: [*const Line; 2],
    ahead: *const Line,
) {
    // SAFETY: configured, says the caller, and all that is loaded exists.
    unsafe {
        asm!(
            "tileloadd tmm6, [{w0} + {line}*1]", first_half!("n0"), "prefetcht1 [{ahead}]",
            "tileloadd tmm4, [{x0} + {line}*1]", second_half!("n0"), "prefetcht1 [{ahead} + 64]",
            "tileloadd tmm5, [{x1} + {line}*1]", first_half!("n1"), "prefetcht1 [{ahead} + 128]",
            "tdpbf16ps tmm0, tmm4, tmm6", second_half!("n1"), "prefetcht1 [{ahead} + 192]",
            "tdpbf16ps tmm2, tmm5, tmm6", first_half!("v0"), "prefetcht1 [{ahead} + 256]",
            "tileloadd tmm6, [{w1} + {line}*1]", second_half!("v0"), "prefetcht1 [{ahead} + 320]",
            "tdpbf16ps tmm1, tmm4, tmm6", first_half!("v1"), "prefetcht1 [{ahead} + 384]",
            "tdpbf16ps tmm3, tmm5, tmm6", second_half!("v1"), "prefetcht1 [{ahead} + 448]",
            x0 = in(reg) x[0],
            x1 = in(reg) x[1],
            w0 = in(reg) weights[0],
            w1 = in(reg) weights[1],
            n0 = in(reg) next[0],
            n1 = in(reg) next[1],
            v0 = in(reg) weights[0].wrapping_add(1),
            v1 = in(reg) weights[1].wrapping_add(1),
            ahead = in(reg) ahead,
            line = in(reg) LINE,
            options(nostack, readonly, preserves_flags),
        );
    }
}

/// Instruction `index` of [`multiply`], for who has something else to do between them. Loads come
/// early: in the half of a core that another thread leaves, they then run beside the products
/// before, as long as what else there is keeps later groups away.
///
/// # Safety
/// As for [`multiply`], and no other instruction of the unit comes between those of one product.
#[inline(always)]
pub(super) unsafe fn instruction<const A: usize, const R: usize>(
    index: usize,
    x: [*const Line; A],
    weights: [*const Weights; R],
) {
    macro_rules! load {
        ($register:literal, $from:expr) => {
            asm!(concat!("tileloadd ", $register, ", [{from} + {line}*1]"), from = in(reg) $from,
                line = in(reg) LINE, options(nostack, readonly, preserves_flags))
        };
    }
    macro_rules! add {
        ($operands:literal) => {
            asm!(concat!("tdpbf16ps ", $operands), options(nostack, nomem, preserves_flags))
        };
    }
    // SAFETY: configured, says the caller, and all that is loaded exists.
    unsafe {
        match index {
            0 => load!("tmm6", weights[0]),
            1 => load!("tmm4", x[0]),
            2 if A == 2 => load!("tmm5", x[A - 1]),
            3 => add!("tmm0, tmm4, tmm6"),
            4 if A == 2 => add!("tmm2, tmm5, tmm6"),
            5 if R == 2 => load!("tmm6", weights[R - 1]),
            6 if R == 2 => add!("tmm1, tmm4, tmm6"),
            7 if A == 2 && R == 2 => add!("tmm3, tmm5, tmm6"),
            _ => {}
        }
    }
}

/// The instruction that moves sums between a register and memory.
macro_rules! move_sums {
    ($before:literal, $after:literal, $at:expr) => {
        asm!(concat!($before, "[{at} + {line}*1]", $after), at = in(reg) $at,
            line = in(reg) LINE, options(nostack, preserves_flags))
    };
}

/// Reads sums back that [`store`] has written.
///
/// # Safety
/// Registers are configured; the sums were written with the same shapes.
#[inline(always)]
pub(super) unsafe fn load<const A: usize, const R: usize>(sums: [[*const Sums; R]; A]) {
    // SAFETY: the caller's promises; tiles are no longer than `Sums`.
    unsafe {
        move_sums!("tileloadd tmm0, ", "", sums[0][0]);
        if R == 2 {
            move_sums!("tileloadd tmm1, ", "", sums[0][R - 1]);
        }
        if A == 2 {
            move_sums!("tileloadd tmm2, ", "", sums[A - 1][0]);
        }
        if A == 2 && R == 2 {
            move_sums!("tileloadd tmm3, ", "", sums[A - 1][R - 1]);
        }
    }
}

/// Writes the sums of the columns that exist.
///
/// # Safety
/// Registers are configured; the sums may be written.
#[inline(always)]
pub(super) unsafe fn store<const A: usize, const R: usize>(sums: [[*mut Sums; R]; A]) {
    // SAFETY: the caller's promises; tiles are no longer than `Sums`.
    unsafe {
        move_sums!("tilestored ", ", tmm0", sums[0][0]);
        if R == 2 {
            move_sums!("tilestored ", ", tmm1", sums[0][R - 1]);
        }
        if A == 2 {
            move_sums!("tilestored ", ", tmm2", sums[A - 1][0]);
        }
        if A == 2 && R == 2 {
            move_sums!("tilestored ", ", tmm3", sums[A - 1][R - 1]);
        }
    }
}
