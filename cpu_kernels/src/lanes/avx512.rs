//! [`Lanes`] of 16 with AVX-512 F, BW, DQ and VL.

use super::Lanes;
use std::arch::x86_64::*;

/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

macro_rules! operations {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty { $($body:tt)* })*) => {
        $(
            #[inline(always)]
            unsafe fn $name($($arg: $type),*) -> $result {
                // SAFETY: the promises of the trait: instructions present, pointers valid; masked
                // loads and stores touch only the first `n` elements.
                unsafe { $($body)* }
            }
        )*
    };
}

/// The mask of the first `n ≤ 16` lanes.
#[inline(always)]
fn head_mask(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n) - 1) as __mmask16
}

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Lanes for Avx512 {
    type V = __m512;
    const WIDTH: usize = 16;

    operations! {
        fn splat(x: f32) -> __m512 { _mm512_set1_ps(x) }
        fn load(p: *const f32) -> __m512 { _mm512_loadu_ps(p) }
        fn store(p: *mut f32, v: __m512) -> () { _mm512_storeu_ps(p, v) }
        fn load_head_or(p: *const f32, n: usize, fill: __m512) -> __m512 {
            _mm512_mask_loadu_ps(fill, head_mask(n), p)
        }
        fn store_head(p: *mut f32, v: __m512, n: usize) -> () {
            _mm512_mask_storeu_ps(p, head_mask(n), v)
        }
        fn load_i8(p: *const i8) -> __m512 {
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))
        }
        fn load_f16(p: *const u16) -> __m512 { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        fn load_f16_head(p: *const u16, n: usize) -> __m512 {
            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(head_mask(n), p.cast()))
        }
        fn store_f16_head(p: *mut u16, v: __m512, n: usize) -> () {
            _mm256_mask_storeu_epi16(p.cast(), head_mask(n), _mm512_cvtps_ph::<NEAREST>(v))
        }
        fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn neg_fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fnmadd_ps(a, b, c) }
        fn fma_alternating(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmaddsub_ps(a, b, c)
        }
        fn min(a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        fn max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn round(a: __m512) -> __m512 { _mm512_roundscale_ps::<NEAREST>(a) }
        fn two_to(a: __m512) -> __m512 { _mm512_scalef_ps(_mm512_set1_ps(1.0), a) }
        fn if_less(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x)
        }
        fn nan_or_zero(a: __m512) -> __m512 {
            _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), a)
        }
        fn sum(a: __m512) -> f32 { _mm512_reduce_add_ps(a) }
        fn max_of(a: __m512) -> f32 { _mm512_reduce_max_ps(a) }
        fn iota() -> __m512 {
            _mm512_setr_ps(
                0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0,
                15.0,
            )
        }
        fn swap_pairs(a: __m512) -> __m512 { _mm512_permute_ps::<0b10_11_00_01>(a) }
        fn load_twice(p: *const f32) -> __m512 {
            let eight = _mm512_castps256_ps512(_mm256_loadu_ps(p));
            let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            _mm512_permutexvar_ps(twice, eight)
        }
    }
}
