//! The roof loops in 256-bit vectors: `vpmaddubsw`, `vpmaddwd` and an addition per 32
//! multiply-accumulates, or the one of AVX-VNNI.

use super::{RoofTable, fold};
use std::arch::x86_64::*;
use std::hint::black_box;

/// Products of each weight vector with each activation vector: eight sums, and with their operands
/// all sixteen registers are taken.
const WEIGHTS: usize = 2;
const COLUMNS: usize = 4;

#[target_feature(enable = "avx2")]
unsafe fn multiply(rounds: usize) -> i32 {
    let ones = _mm256_set1_epi16(1);
    let mut weights = [_mm256_set1_epi8(5), _mm256_set1_epi8(7)];
    let x: [__m256i; COLUMNS] = std::array::from_fn(|at| _mm256_set1_epi8(at as i8 - 2));
    let mut sums = [[_mm256_setzero_si256(); COLUMNS]; WEIGHTS];
    for _ in 0..rounds {
        // New to the compiler in each round, or it would multiply once.
        weights = black_box(weights);
        for (sums, w) in sums.iter_mut().zip(weights) {
            for (sum, x) in sums.iter_mut().zip(x) {
                let pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones);
                *sum = _mm256_add_epi32(*sum, pairs);
            }
        }
    }
    let all = sums.into_iter().flatten().reduce(|a, b| _mm256_add_epi32(a, b));
    _mm256_extract_epi32::<0>(all.unwrap_or(ones))
}

#[target_feature(enable = "avx2,avxvnni")]
unsafe fn multiply_vnni(rounds: usize) -> i32 {
    let weights = [_mm256_set1_epi8(5), _mm256_set1_epi8(7)];
    let x: [__m256i; COLUMNS] = std::array::from_fn(|at| _mm256_set1_epi8(at as i8 - 2));
    let mut sums = [[_mm256_setzero_si256(); COLUMNS]; WEIGHTS];
    for _ in 0..rounds {
        for (sums, w) in sums.iter_mut().zip(weights) {
            for (sum, x) in sums.iter_mut().zip(x) {
                // Every product needs the sum before it, so none can be left out.
                *sum = _mm256_dpbusd_avx_epi32(*sum, w, x);
            }
        }
    }
    let all = sums.into_iter().flatten().reduce(|a, b| _mm256_add_epi32(a, b));
    _mm256_extract_epi32::<0>(all.unwrap_or(x[0]))
}

#[target_feature(enable = "avx2")]
unsafe fn read(words: &[u64]) -> u64 {
    let (parts, rest) = words.as_chunks::<32>();
    let mut all = [_mm256_setzero_si256(); 8];
    for part in parts {
        for (at, all) in all.iter_mut().enumerate() {
            // SAFETY: 8 vectors of 4 words are the 32 words of the part.
            let vector = unsafe { _mm256_loadu_si256(part.as_ptr().add(4 * at).cast()) };
            *all = _mm256_xor_si256(*all, vector);
        }
    }
    let mut lanes = [0_u64; 4];
    for vector in all {
        // SAFETY: both are 32 bytes.
        let vector: [u64; 4] = unsafe { std::mem::transmute(vector) };
        lanes.iter_mut().zip(vector).for_each(|(lane, word)| *lane ^= word);
    }
    fold(&lanes) ^ fold(rest)
}

const MACS_PER_ROUND: usize = WEIGHTS * COLUMNS * 32;

pub(crate) const PLAIN: RoofTable =
    RoofTable { numbers: "int8", macs_per_round: MACS_PER_ROUND, multiply, read };

pub(crate) const VNNI: RoofTable =
    RoofTable { numbers: "int8", macs_per_round: MACS_PER_ROUND, multiply: multiply_vnni, read };
