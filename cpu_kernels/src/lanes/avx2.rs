//! [`Lanes`] of 8 with AVX2, FMA and F16C.

use super::Lanes;
use std::arch::x86_64::*;

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// Sixteen words, so that 8 words from `8 − n` are `n` times −1 and then 0.
static HEAD_MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

macro_rules! operations {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty { $($body:tt)* })*) => {
        $(
            #[inline(always)]
            unsafe fn $name($($arg: $type),*) -> $result {
                // SAFETY: the promises of the trait: instructions present, pointers valid.
                unsafe { $($body)* }
            }
        )*
    };
}

/// The mask of the first `n ≤ 8` lanes.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn head_mask(n: usize) -> __m256i {
    debug_assert!(n <= 8);
    // SAFETY: 8 words from `8 − n` lie inside the 16.
    unsafe { _mm256_loadu_si256(HEAD_MASKS.as_ptr().add(8 - n).cast()) }
}

impl Lanes for Avx2 {
    type V = __m256;
    const WIDTH: usize = 8;

    operations! {
        fn splat(x: f32) -> __m256 { _mm256_set1_ps(x) }
        fn load(p: *const f32) -> __m256 { _mm256_loadu_ps(p) }
        fn store(p: *mut f32, v: __m256) -> () { _mm256_storeu_ps(p, v) }
        fn load_i8(p: *const i8) -> __m256 {
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())))
        }
        fn load_f16(p: *const u16) -> __m256 { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        fn add(a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
        fn sub(a: __m256, b: __m256) -> __m256 { _mm256_sub_ps(a, b) }
        fn mul(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        fn div(a: __m256, b: __m256) -> __m256 { _mm256_div_ps(a, b) }
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
        fn neg_fma(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fnmadd_ps(a, b, c) }
        fn fma_alternating(a: __m256, b: __m256, c: __m256) -> __m256 {
            _mm256_fmaddsub_ps(a, b, c)
        }
        fn min(a: __m256, b: __m256) -> __m256 { _mm256_min_ps(a, b) }
        fn max(a: __m256, b: __m256) -> __m256 { _mm256_max_ps(a, b) }
        fn round(a: __m256) -> __m256 {
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
        }
        fn two_to(a: __m256) -> __m256 {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
        fn if_less(a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
            _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
        }
        fn nan_or_zero(a: __m256) -> __m256 {
            _mm256_and_ps(a, _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a))
        }
        fn sum(a: __m256) -> f32 {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
        fn max_of(a: __m256) -> f32 {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
        fn iota() -> __m256 { _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0) }
        fn swap_pairs(a: __m256) -> __m256 { _mm256_permute_ps::<0b10_11_00_01>(a) }
        fn load_twice(p: *const f32) -> __m256 {
            let four = _mm256_castps128_ps256(_mm_loadu_ps(p));
            _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3))
        }
    }

    #[inline(always)]
    unsafe fn load_head_or(p: *const f32, n: usize, fill: __m256) -> __m256 {
        // SAFETY: a masked load touches only the first `n` elements.
        unsafe {
            if n == Self::WIDTH {
                return Self::load(p);
            }
            let mask = head_mask(n);
            _mm256_blendv_ps(fill, _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask))
        }
    }

    #[inline(always)]
    unsafe fn store_head(p: *mut f32, v: __m256, n: usize) {
        // SAFETY: a masked store touches only the first `n` elements.
        unsafe {
            if n == Self::WIDTH {
                return Self::store(p, v);
            }
            _mm256_maskstore_ps(p, head_mask(n), v);
        }
    }

    #[inline(always)]
    unsafe fn load_f16_head(p: *const u16, n: usize) -> __m256 {
        // SAFETY: `n ≤ 8` elements are copied into a buffer of 8.
        unsafe {
            if n == Self::WIDTH {
                return Self::load_f16(p);
            }
            let mut buffer = [0u16; 8];
            std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
            Self::load_f16(buffer.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn store_f16_head(p: *mut u16, v: __m256, n: usize) {
        // SAFETY: `n ≤ 8` elements are copied from a buffer of 8.
        unsafe {
            let bits = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
            if n == Self::WIDTH {
                return _mm_storeu_si128(p.cast(), bits);
            }
            let mut buffer = [0u16; 8];
            _mm_storeu_si128(buffer.as_mut_ptr().cast(), bits);
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n);
        }
    }
}
