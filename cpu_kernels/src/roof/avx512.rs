//! The roof loops in 512-bit vectors: `vpdpbusd` per 64 multiply-accumulates, or without VNNI the
//! three instructions of AVX2.

use super::{RoofTable, fold};
use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;

/// Products of each weight vector with each activation vector. Sixteen independent sums: more than
/// two multipliers times a latency of five cycles.
const WEIGHTS: usize = 4;
const COLUMNS: usize = 4;

/// `sum + w · x` of one instruction set, for all pairs, round after round.
macro_rules! rounds {
    ($rounds:ident, $renew:expr, |$sum:ident, $w:ident, $x:ident| $step:expr) => {{
        let mut weights: [__m512i; WEIGHTS] =
            std::array::from_fn(|at| _mm512_set1_epi8(at as i8 + 5));
        let columns: [__m512i; COLUMNS] = std::array::from_fn(|at| _mm512_set1_epi8(at as i8 - 2));
        let mut sums = [[_mm512_setzero_si512(); COLUMNS]; WEIGHTS];
        for _ in 0..$rounds {
            weights = $renew(weights);
            for (sums, $w) in sums.iter_mut().zip(weights) {
                for (sum, $x) in sums.iter_mut().zip(columns) {
                    let $sum = *sum;
                    *sum = $step;
                }
            }
        }
        let all = sums.into_iter().flatten().reduce(|a, b| _mm512_add_epi32(a, b));
        _mm512_reduce_add_epi32(all.unwrap_or(weights[0]))
    }};
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn multiply_vnni(rounds: usize) -> i32 {
    // Every product needs the sum before it, so none can be left out.
    rounds!(rounds, std::convert::identity, |sum, w, x| _mm512_dpbusd_epi32(sum, w, x))
}

#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn multiply_plain(rounds: usize) -> i32 {
    let ones = _mm512_set1_epi16(1);
    // New to the compiler in each round, or it would multiply once.
    rounds!(rounds, black_box, |sum, w, x| {
        _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), ones))
    })
}

#[target_feature(enable = "avx512f")]
unsafe fn read(words: &[u64]) -> u64 {
    let (parts, rest) = words.as_chunks::<64>();
    let mut all = [_mm512_setzero_si512(); 8];
    for part in parts {
        for (at, all) in all.iter_mut().enumerate() {
            // SAFETY: 8 vectors of 8 words are the 64 words of the part.
            let vector = unsafe { _mm512_loadu_si512(part.as_ptr().add(8 * at).cast()) };
            *all = _mm512_xor_si512(*all, vector);
        }
    }
    let mut lanes = [0_u64; 8];
    for vector in all {
        // SAFETY: both are 64 bytes.
        let vector: [u64; 8] = unsafe { std::mem::transmute(vector) };
        lanes.iter_mut().zip(vector).for_each(|(lane, word)| *lane ^= word);
    }
    fold(&lanes) ^ fold(rest)
}

const MACS_PER_ROUND: usize = WEIGHTS * COLUMNS * 64;

pub(crate) const PLAIN: RoofTable =
    RoofTable { numbers: "int8", macs_per_round: MACS_PER_ROUND, multiply: multiply_plain, read };

pub(crate) const VNNI: RoofTable =
    RoofTable { numbers: "int8", macs_per_round: MACS_PER_ROUND, multiply: multiply_vnni, read };

/// Tiles of 16 × 32 bf16: two of columns with two of weights, so that products do not wait for
/// each other. The arithmetic that the tile unit could do if products never left it.
#[target_feature(enable = "avx512f")]
unsafe fn multiply_tiles(rounds: usize) -> i32 {
    /// Palette 1, then 16 widths in bytes from byte 16, then 16 heights from byte 48.
    #[repr(align(64))]
    struct Shapes([u8; 64]);
    let mut shapes = Shapes([0; 64]);
    shapes.0[0] = 1;
    for register in 0..8 {
        (shapes.0[16 + 2 * register], shapes.0[48 + register]) = (64, 16);
    }
    // Ones, of which sums are exact for long, and never infinite.
    let mut tile = [0x3f80_u16; 512];
    // SAFETY: this table is reached only where the system has granted AMX; a tile is 1024 bytes,
    // and registers are given up at the end.
    unsafe {
        asm!(
            "ldtilecfg [{shapes}]",
            "tileloadd tmm4, [{tile} + {line}*1]",
            "tileloadd tmm5, [{tile} + {line}*1]",
            "tileloadd tmm6, [{tile} + {line}*1]",
            "tileloadd tmm7, [{tile} + {line}*1]",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            "tilestored [{tile} + {line}*1], tmm0",
            "tilerelease",
            shapes = in(reg) &raw const shapes,
            tile = in(reg) tile.as_mut_ptr(),
            line = in(reg) 64_usize,
            rounds = inout(reg) rounds.max(1) => _,
            options(nostack),
        );
    }
    i32::from(tile[0])
}

pub(crate) const AMX: RoofTable =
    RoofTable { numbers: "bf16", macs_per_round: 4 * 16 * 16 * 32, multiply: multiply_tiles, read };
