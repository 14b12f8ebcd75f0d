//! Interleaving with 16-byte vectors. SSE2, which every x86-64 has, is enough: a packed block costs
//! about a cycle per 8 bytes, several times less than reading and writing it in DRAM.

use super::{ROWS, Unit};
use std::arch::x86_64::*;

/// Interleaves one field of 16 blocks.
///
/// # Safety
/// `row(r)` for `r` below 16 is valid for reads of `bytes` bytes, `packed` for writes of 16 times
/// as many, and they do not overlap. `bytes` is a multiple of 16 for words, of 4 for bits, of 2 for
/// halves.
#[inline(always)]
pub(super) unsafe fn interleave(
    unit: Unit,
    row: impl Fn(usize) -> *const u8,
    bytes: usize,
    packed: *mut u8,
) {
    // SAFETY: offsets stay below `bytes` in a row and below `16 · bytes` in `packed`.
    unsafe {
        match unit {
            Unit::Word => {
                for start in (0..bytes).step_by(16) {
                    words(|at| row(at).add(start), packed.add(ROWS * start));
                }
            }
            Unit::Byte => {
                let whole = bytes / 4 * 4;
                for start in (0..whole).step_by(4) {
                    let fours = one_word(|at| row(at).add(start));
                    store(packed.add(ROWS * start), bytes_apart(fours));
                }
                for start in whole..bytes {
                    for at in 0..ROWS {
                        packed.add(ROWS * start + at).write(row(at).add(start).read());
                    }
                }
            }
            Unit::Bits => {
                for start in (0..bytes).step_by(4) {
                    let masks = one_word(|at| row(at).add(start));
                    store(packed.add(ROWS * start), masks.map(spread_bits));
                }
            }
            Unit::Half => {
                for start in (0..bytes).step_by(2) {
                    let packed = packed.add(ROWS * start).cast::<u16>();
                    for at in 0..ROWS {
                        let half = row(at).add(start).cast::<u16>().read_unaligned();
                        packed.add(at).write_unaligned(half);
                    }
                }
            }
        }
    }
}

/// Four words of each row: transposes 4×4 words, four times.
#[inline(always)]
unsafe fn words(row: impl Fn(usize) -> *const u8, packed: *mut u8) {
    for first in (0..ROWS).step_by(4) {
        // SAFETY: rows hold 16 bytes and `packed` 256, says the caller.
        unsafe {
            let load = |at: usize| _mm_loadu_si128(row(first + at).cast());
            let (a, b, c, d) = (load(0), load(1), load(2), load(3));
            let (ab_low, cd_low) = (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
            let columns = [
                _mm_unpacklo_epi64(ab_low, cd_low),
                _mm_unpackhi_epi64(ab_low, cd_low),
                _mm_unpacklo_epi64(ab_high, cd_high),
                _mm_unpackhi_epi64(ab_high, cd_high),
            ];
            for (word, column) in columns.into_iter().enumerate() {
                _mm_storeu_si128(packed.add(4 * (ROWS * word + first)).cast(), column);
            }
        }
    }
}

/// The first word of each row: rows 0 to 3, 4 to 7 and so on.
#[inline(always)]
unsafe fn one_word(row: impl Fn(usize) -> *const u8) -> [__m128i; 4] {
    std::array::from_fn(|four| {
        // SAFETY: rows hold 4 bytes, says the caller.
        unsafe {
            let word = |at: usize| row(4 * four + at).cast::<i32>().read_unaligned();
            _mm_set_epi32(word(3), word(2), word(1), word(0))
        }
    })
}

#[inline(always)]
unsafe fn store(packed: *mut u8, vectors: [__m128i; 4]) {
    for (index, vector) in vectors.into_iter().enumerate() {
        // SAFETY: `packed` holds 64 bytes, says the caller.
        unsafe { _mm_storeu_si128(packed.add(16 * index).cast(), vector) };
    }
}

/// 16 rows of 4 bytes to 4 vectors of 16 rows. Interleaving the halves of 64 bytes moves the top
/// bit of every byte's address to the bottom: four times turns `[row, byte]` into `[byte, row]`.
#[inline(always)]
fn bytes_apart(mut all: [__m128i; 4]) -> [__m128i; 4] {
    for _ in 0..4 {
        let [a, b, c, d] = all;
        // SAFETY: every x86-64 has SSE2.
        all = unsafe {
            [
                _mm_unpacklo_epi8(a, c),
                _mm_unpackhi_epi8(a, c),
                _mm_unpacklo_epi8(b, d),
                _mm_unpackhi_epi8(b, d),
            ]
        };
    }
    all
}

/// `scalar::spread_bits` of four words. A bit's place has the bits `w2 w1 w0 b1 b0`, to become
/// `b1 b0 w2 w1 w0`: four exchanges of two bits of the place.
#[inline(always)]
fn spread_bits(words: __m128i) -> __m128i {
    let words = exchange::<4, 1, { 16 - 2 }>(words);
    let words = exchange::<3, 0, { 8 - 1 }>(words);
    let words = exchange::<2, 1, { 4 - 2 }>(words);
    exchange::<1, 0, { 2 - 1 }>(words)
}

/// Exchanges bits `HIGH` and `LOW` of every bit's place in its word; `SHIFT` is
/// `2^HIGH − 2^LOW`, how far bits move (Warren, Hacker's Delight, 7-1).
#[inline(always)]
fn exchange<const HIGH: u32, const LOW: u32, const SHIFT: i32>(words: __m128i) -> __m128i {
    // Places that are to grow: bit `LOW` set, bit `HIGH` not.
    let grow = const {
        let (mut mask, mut place) = (0_u32, 0);
        while place < 32 {
            if place >> LOW & 1 == 1 && place >> HIGH & 1 == 0 {
                mask |= 1 << place;
            }
            place += 1;
        }
        mask as i32
    };
    // SAFETY: every x86-64 has SSE2.
    unsafe {
        let differ = _mm_xor_si128(words, _mm_srli_epi32::<SHIFT>(words));
        let differ = _mm_and_si128(differ, _mm_set1_epi32(grow));
        _mm_xor_si128(_mm_xor_si128(words, differ), _mm_slli_epi32::<SHIFT>(differ))
    }
}
