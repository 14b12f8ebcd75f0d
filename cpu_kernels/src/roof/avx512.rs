//! The roof loops in 512-bit vectors: `vpdpbusd` per 64 multiply-accumulates, or without VNNI the
//! three instructions of AVX2.

use super::{RoofTable, fold};
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
    RoofTable { macs_per_round: MACS_PER_ROUND, multiply: multiply_plain, read };

pub(crate) const VNNI: RoofTable =
    RoofTable { macs_per_round: MACS_PER_ROUND, multiply: multiply_vnni, read };
