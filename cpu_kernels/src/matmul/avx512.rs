//! 16 rows per vector: AVX-512 with `vpdpbusd` (VNNI), or with `vpmaddubsw` and `vpmaddwd`.

use super::lanes::{Lanes, lane_ops};
use super::packed::Packed;
use super::{MatmulFn, MatmulTable, MatrixView, OutputColumns, float, interleaved};
use crate::activations::Activations;
use std::arch::x86_64::*;
use std::ops::Range;

/// 512-bit vectors, with or without the int8 dot product.
#[derive(Clone, Copy)]
pub(super) struct Wide<const VNNI: bool>;

impl<const VNNI: bool> Lanes for Wide<VNNI> {
    const LANES: usize = 16;
    const TILE: usize = 8;
    const WIDE_FROM: usize = 16;
    // vpdpbusd wants unsigned weights: flipping the top bit of a signed byte adds 128.
    const SIGNED_EXCESS: i16 = if VNNI { 128 } else { 0 };

    type Int = __m512i;
    type Float = __m512;
    /// VNNI: weights + 128, mask unused. Otherwise: magnitudes, and which are negative.
    type Signed = (__m512i, __mmask64);

    lane_ops! {
        fn prefetch(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        fn prefetch_second(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        fn load_words(from: *const u8) -> __m512i { _mm512_loadu_si512(from.cast()) }
        fn load_bytes(from: *const u8) -> __m512i {
            _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))
        }
        fn load_signed_bytes(from: *const u8) -> __m512i {
            _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))
        }
        fn load_halves(from: *const u8) -> __m512i {
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))
        }
        fn load_f16(from: *const u8) -> __m512 {
            _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))
        }
        fn load_f32(from: *const f32) -> __m512 { _mm512_loadu_ps(from) }
        fn store_f32(to: *mut f32, value: __m512) -> () { _mm512_storeu_ps(to, value) }
        fn splat(value: i32) -> __m512i { _mm512_set1_epi32(value) }
        fn splat_f32(value: f32) -> __m512 { _mm512_set1_ps(value) }
        fn and(a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        fn or(a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        fn sub(a: __m512i, b: __m512i) -> __m512i { _mm512_sub_epi32(a, b) }
        fn shl(a: __m512i, count: usize) -> __m512i {
            _mm512_sllv_epi32(a, _mm512_set1_epi32(count as i32))
        }
        fn shr(a: __m512i, count: usize) -> __m512i {
            _mm512_srlv_epi32(a, _mm512_set1_epi32(count as i32))
        }
        fn rotate(a: __m512i, count: usize) -> __m512i {
            _mm512_rolv_epi32(a, _mm512_set1_epi32(count as i32))
        }
        fn shift_signed(a: __m512i, count: usize) -> __m512i {
            _mm512_srav_epi32(a, _mm512_set1_epi32(count as i32))
        }
        fn lookup(table: &[i8; 16], index: __m512i) -> __m512i {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, index)
        }
        fn to_f32(a: __m512i) -> __m512 { _mm512_cvtepi32_ps(a) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn neg(a: __m512) -> __m512 { _mm512_xor_ps(a, _mm512_set1_ps(-0.0)) }
        fn pair_dot(a: __m512i, b: __m512i) -> __m512i { _mm512_madd_epi16(a, b) }
        fn dot_unsigned(sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
            if VNNI { dot_vnni(sum, w, x) } else { dot_bytes(sum, w, x) }
        }
        fn signed(w: __m512i) -> (__m512i, __mmask64) {
            if VNNI {
                (_mm512_xor_si512(w, _mm512_set1_epi8(-128)), 0)
            } else {
                (_mm512_abs_epi8(w), _mm512_movepi8_mask(w))
            }
        }
        fn dot_signed(sum: __m512i, w: (__m512i, __mmask64), x: __m512i) -> __m512i {
            if VNNI {
                dot_vnni(sum, w.0, x)
            } else {
                // 128·127·2 fits i16, so magnitudes up to 128 do not saturate either.
                let x = _mm512_mask_sub_epi8(x, w.1, _mm512_setzero_si512(), x);
                dot_bytes(sum, w.0, x)
            }
        }
    }
}

#[inline(always)]
unsafe fn dot_vnni(sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
    // SAFETY: reached only from kernels that were compiled for, and run with, VNNI.
    unsafe { _mm512_dpbusd_epi32(sum, w, x) }
}

/// Exact as long as pairs fit i16: `w ≤ 128`, `|x| ≤ 127`.
#[inline(always)]
unsafe fn dot_bytes(sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
    // SAFETY: reached only from kernels that were compiled for, and run with, AVX-512 BW.
    unsafe {
        let pairs = _mm512_maddubs_epi16(w, x);
        _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
    }
}

/// 32 floats.
struct Floats;

impl float::Vector for Floats {
    const ROWS: usize = 2;
    const COLUMNS: usize = 4;
    type Floats = [__m512; 2];

    lane_ops! {
        fn prefetch(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        fn prefetch_second(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        fn zero() -> [__m512; 2] { [_mm512_setzero_ps(); 2] }
        fn load(from: *const f32) -> [__m512; 2] {
            [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))]
        }
        fn load_f16(from: *const u8) -> [__m512; 2] {
            let part = |from: *const u8| _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()));
            [part(from), part(from.add(32))]
        }
        fn load_bf16(from: *const u8) -> [__m512; 2] {
            let part = |from: *const u8| {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            };
            [part(from), part(from.add(32))]
        }
        fn load_e4m3(from: *const u8, scale: f32) -> [__m512; 2] {
            let part = |from: *const u8| {
                let signed = _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast()));
                let placed = _mm256_slli_epi16::<7>(signed);
                // Bit 14 is a copy of the sign.
                let halves = _mm256_and_si256(placed, _mm256_set1_epi16(0xbfff_u16 as i16));
                _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtph_ps(halves))
            };
            [part(from), part(from.add(16))]
        }
        fn store(to: *mut f32, value: [__m512; 2]) -> () {
            _mm512_storeu_ps(to, value[0]);
            _mm512_storeu_ps(to.add(16), value[1]);
        }
        fn fma(a: [__m512; 2], b: [__m512; 2], c: [__m512; 2]) -> [__m512; 2] {
            [_mm512_fmadd_ps(a[0], b[0], c[0]), _mm512_fmadd_ps(a[1], b[1], c[1])]
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn floats<W: float::Weight>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    // SAFETY: the caller checked the CPU and the shapes.
    unsafe { float::matmul::<Floats, W>(weights, x, rows, out) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn vnni<P: Packed>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    // SAFETY: the caller checked the CPU and the shapes.
    unsafe { interleaved::matmul::<Wide<true>, P>(weights, x, rows, out) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn plain<P: Packed>(
    weights: &MatrixView<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    // SAFETY: the caller checked the CPU and the shapes.
    unsafe { interleaved::matmul::<Wide<false>, P>(weights, x, rows, out) }
}

pub(crate) const VNNI: MatmulTable =
    MatmulTable { kernels: super::packed::table!(float::table!(floats), vnni) };

pub(crate) const PLAIN: MatmulTable =
    MatmulTable { kernels: super::packed::table!(float::table!(floats), plain) };
