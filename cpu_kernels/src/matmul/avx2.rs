//! 8 rows per vector: AVX2 with `vpmaddubsw` and `vpmaddwd`, or with the `vpdpbusd` of AVX-VNNI.

use super::lanes::{Lanes, lane_ops};
use super::packed::Packed;
use super::{MatmulFn, MatmulTable, MatrixView, OutputColumns, float, interleaved};
use crate::activations::Activations;
use std::arch::x86_64::*;
use std::ops::Range;

/// 256-bit vectors, with or without the int8 dot product.
#[derive(Clone, Copy)]
struct Narrow<const VNNI: bool>;

impl<const VNNI: bool> Lanes for Narrow<VNNI> {
    const LANES: usize = 8;
    const TILE: usize = 4;
    const WIDE_FROM: usize = 16;
    // vpdpbusd wants unsigned weights: flipping the top bit of a signed byte adds 128.
    const SIGNED_EXCESS: i16 = if VNNI { 128 } else { 0 };

    type Int = __m256i;
    type Float = __m256;
    /// VNNI: weights + 128, twice. Otherwise: magnitudes, and the signed bytes.
    type Signed = (__m256i, __m256i);

    lane_ops! {
        fn prefetch(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        fn prefetch_second(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        fn load_words(from: *const u8) -> __m256i { _mm256_loadu_si256(from.cast()) }
        fn load_bytes(from: *const u8) -> __m256i {
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))
        }
        fn load_signed_bytes(from: *const u8) -> __m256i {
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))
        }
        fn load_halves(from: *const u8) -> __m256i {
            _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()))
        }
        fn load_f16(from: *const u8) -> __m256 { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        fn load_f32(from: *const f32) -> __m256 { _mm256_loadu_ps(from) }
        fn store_f32(to: *mut f32, value: __m256) -> () { _mm256_storeu_ps(to, value) }
        fn splat(value: i32) -> __m256i { _mm256_set1_epi32(value) }
        fn splat_f32(value: f32) -> __m256 { _mm256_set1_ps(value) }
        fn and(a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
        fn or(a: __m256i, b: __m256i) -> __m256i { _mm256_or_si256(a, b) }
        fn sub(a: __m256i, b: __m256i) -> __m256i { _mm256_sub_epi32(a, b) }
        fn shl(a: __m256i, count: usize) -> __m256i {
            _mm256_sllv_epi32(a, _mm256_set1_epi32(count as i32))
        }
        fn shr(a: __m256i, count: usize) -> __m256i {
            _mm256_srlv_epi32(a, _mm256_set1_epi32(count as i32))
        }
        fn rotate(a: __m256i, count: usize) -> __m256i {
            let left = _mm256_sllv_epi32(a, _mm256_set1_epi32(count as i32));
            let right = _mm256_srlv_epi32(a, _mm256_set1_epi32(32 - count as i32));
            _mm256_or_si256(left, right)
        }
        fn shift_signed(a: __m256i, count: usize) -> __m256i {
            _mm256_srav_epi32(a, _mm256_set1_epi32(count as i32))
        }
        fn lookup(table: &[i8; 16], index: __m256i) -> __m256i {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, index)
        }
        fn to_f32(a: __m256i) -> __m256 { _mm256_cvtepi32_ps(a) }
        fn mul(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
        fn neg(a: __m256) -> __m256 { _mm256_xor_ps(a, _mm256_set1_ps(-0.0)) }
        fn pair_dot(a: __m256i, b: __m256i) -> __m256i { _mm256_madd_epi16(a, b) }
        fn dot_unsigned(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
            if VNNI { dot_vnni(sum, w, x) } else { dot_bytes(sum, w, x) }
        }
        fn signed(w: __m256i) -> (__m256i, __m256i) {
            if VNNI {
                let excess = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                (excess, excess)
            } else {
                (_mm256_abs_epi8(w), w)
            }
        }
        fn dot_signed(sum: __m256i, w: (__m256i, __m256i), x: __m256i) -> __m256i {
            if VNNI {
                dot_vnni(sum, w.0, x)
            } else {
                dot_bytes(sum, w.0, _mm256_sign_epi8(x, w.1))
            }
        }
    }
}

#[inline(always)]
unsafe fn dot_vnni(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: reached only from kernels that were compiled for, and run with, AVX-VNNI.
    unsafe { _mm256_dpbusd_avx_epi32(sum, w, x) }
}

/// Exact as long as pairs fit i16: `w ≤ 128`, `|x| ≤ 127`.
#[inline(always)]
unsafe fn dot_bytes(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: reached only from kernels that were compiled for, and run with, AVX2.
    unsafe {
        let pairs = _mm256_maddubs_epi16(w, x);
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

/// 32 floats.
struct Floats;

impl float::Vector for Floats {
    const ROWS: usize = 1;
    const COLUMNS: usize = 2;
    type Floats = [__m256; 4];

    lane_ops! {
        fn prefetch(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        fn prefetch_second(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        fn zero() -> [__m256; 4] { [_mm256_setzero_ps(); 4] }
        fn load(from: *const f32) -> [__m256; 4] {
            let part = |index: usize| _mm256_loadu_ps(from.add(8 * index));
            [part(0), part(1), part(2), part(3)]
        }
        fn load_f16(from: *const u8) -> [__m256; 4] {
            let part = |index: usize| _mm256_cvtph_ps(_mm_loadu_si128(from.add(16 * index).cast()));
            [part(0), part(1), part(2), part(3)]
        }
        fn load_bf16(from: *const u8) -> [__m256; 4] {
            let part = |index: usize| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(16 * index).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            };
            [part(0), part(1), part(2), part(3)]
        }
        fn load_e4m3(from: *const u8, scale: f32) -> [__m256; 4] {
            let part = |index: usize| {
                let signed = _mm_cvtepi8_epi16(_mm_loadl_epi64(from.add(8 * index).cast()));
                let placed = _mm_slli_epi16::<7>(signed);
                // Bit 14 is a copy of the sign.
                let halves = _mm_and_si128(placed, _mm_set1_epi16(0xbfff_u16 as i16));
                _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_cvtph_ps(halves))
            };
            [part(0), part(1), part(2), part(3)]
        }
        fn store(to: *mut f32, value: [__m256; 4]) -> () {
            for (index, part) in value.into_iter().enumerate() {
                _mm256_storeu_ps(to.add(8 * index), part);
            }
        }
        fn fma(a: [__m256; 4], b: [__m256; 4], c: [__m256; 4]) -> [__m256; 4] {
            [
                _mm256_fmadd_ps(a[0], b[0], c[0]),
                _mm256_fmadd_ps(a[1], b[1], c[1]),
                _mm256_fmadd_ps(a[2], b[2], c[2]),
                _mm256_fmadd_ps(a[3], b[3], c[3]),
            ]
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantized<P: Packed>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    // SAFETY: the caller checked the CPU and the shapes.
    unsafe { interleaved::matmul::<Narrow<false>, P>(weights, x, rows, out) }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn vnni<P: Packed>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    // SAFETY: the caller checked the CPU and the shapes.
    unsafe { interleaved::matmul::<Narrow<true>, P>(weights, x, rows, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats<W: float::Weight>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    // SAFETY: the caller checked the CPU and the shapes.
    unsafe { float::matmul::<Floats, W>(weights, x, rows, out) }
}

pub(crate) const PLAIN: MatmulTable =
    MatmulTable { kernels: super::packed::table!(float::table!(floats), quantized) };

pub(crate) const VNNI: MatmulTable =
    MatmulTable { kernels: super::packed::table!(float::table!(floats), vnni) };
