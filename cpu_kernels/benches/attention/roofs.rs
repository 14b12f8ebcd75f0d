//! What the machine can do: bytes read per second, f32 operations per second.

use crate::{best_seconds, on_threads};
use std::arch::x86_64::*;
use std::hint::black_box;
use tandem_cpu_kernels::Isa;

/// Words of one thread's part of the memory that is read.
const WORDS: usize = 32 << 20;
const FMA_ROUNDS: usize = 2_000_000;

/// Bytes per second of reading 256 MiB per thread in order.
pub fn read_bytes_per_s(threads: usize) -> f64 {
    let data = vec![1u64; WORDS];
    let seconds = best_seconds(8, || {
        on_threads(threads, &|thread| {
            let own = &data[WORDS * thread / threads..WORDS * (thread + 1) / threads];
            black_box(own.chunks_exact(8).fold([0u64; 8], |mut sums, chunk| {
                sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum ^= x);
                sums
            }));
        });
    });
    (WORDS * 8) as f64 / seconds
}

/// f32 operations per second of independent fused multiply-adds in registers.
pub fn fma_flops(threads: usize, isa: Isa) -> f64 {
    let lanes = if isa >= Isa::Avx512 { 16 } else { 8 };
    let seconds = best_seconds(3, || {
        // SAFETY: the benchmark runs only instruction sets that this CPU has.
        on_threads(threads, &|_| unsafe {
            match isa {
                Isa::Scalar => {}
                Isa::Avx2 => fma_avx2(),
                _ => fma_avx512(),
            }
        });
    });
    (threads * FMA_ROUNDS * 12 * lanes * 2) as f64 / seconds
}

/// # Safety
/// The CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn fma_avx2() {
    let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(1.0)));
    let mut sums = [b; 12];
    for _ in 0..FMA_ROUNDS {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(a, *sum, b);
        }
    }
    black_box(sums);
}

/// # Safety
/// The CPU has AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn fma_avx512() {
    let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(1.0)));
    let mut sums = [b; 12];
    for _ in 0..FMA_ROUNDS {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(a, *sum, b);
        }
    }
    black_box(sums);
}
