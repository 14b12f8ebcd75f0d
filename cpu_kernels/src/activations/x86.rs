//! Rounded activations with AVX2 and AVX-512: each operation of the scalar code on 8 elements or on
//! 16, so the bits cannot differ. Groups do not depend on each other, and the processor works on
//! several at a time: what counts is how many instructions a group takes.

use super::{AMAX_MIN, ActivationTable, BF16_EXPONENT, GroupScale, HalfStarts, LinesMut, scalar};
use crate::blocks::GROUP;
use crate::lanes::Lanes;
use crate::lanes::avx2::Avx2;
use crate::lanes::avx512::Avx512;
use std::arch::x86_64::*;

pub(crate) const AVX2: ActivationTable =
    ActivationTable::Int8 { quantize: avx2, residual: residual_avx2 };
pub(crate) const AVX512: ActivationTable =
    ActivationTable::Int8 { quantize: avx512, residual: residual_avx512 };
pub(crate) const BF16: ActivationTable = ActivationTable::Bf16 { round };

/// All bits of a float but the sign.
const MAGNITUDE: i32 = 0x7fff_ffff;

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn residual_avx2(
    values: &[f32],
    quants: &[i8],
    scales: &[GroupScale],
    residual: &mut [f32],
) {
    // SAFETY: the instructions of the lanes are enabled here.
    unsafe { residual_with::<Avx2>(values, quants, scales, residual) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn residual_avx512(
    values: &[f32],
    quants: &[i8],
    scales: &[GroupScale],
    residual: &mut [f32],
) {
    // SAFETY: the instructions of the lanes are enabled here.
    unsafe { residual_with::<Avx512>(values, quants, scales, residual) }
}

/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
unsafe fn residual_with<L: Lanes>(
    values: &[f32],
    quants: &[i8],
    scales: &[GroupScale],
    residual: &mut [f32],
) {
    let groups = quants.as_chunks::<GROUP>().0.iter().zip(scales);
    let values = values.as_chunks::<GROUP>().0.iter().zip(residual.as_chunks_mut::<GROUP>().0);
    for ((quants, scale), (values, residual)) in groups.zip(values) {
        for start in (0..GROUP).step_by(L::WIDTH) {
            // SAFETY: a group is made of whole vectors; the caller has the instructions.
            unsafe {
                let values = L::load(values.as_ptr().add(start));
                let product = L::mul(L::splat(scale.scale), L::load_i8(quants.as_ptr().add(start)));
                L::store(residual.as_mut_ptr().add(start), L::sub(values, product));
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2(
    values: &[f32],
    quants: &mut [i8],
    (scales, starts): (&mut [GroupScale], &mut [HalfStarts]),
) {
    let groups = values.as_chunks::<GROUP>().0.iter().zip(quants.as_chunks_mut::<GROUP>().0);
    for ((values, quants), at) in groups.zip(scales.iter_mut().zip(starts)) {
        let from = values.as_ptr();
        // SAFETY: four vectors are a group.
        let x = [0, 8, 16, 24].map(|start| unsafe { _mm256_loadu_ps(from.add(start)) });
        let magnitudes =
            x.map(|x| _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(MAGNITUDE)));
        let low = _mm256_max_epi32(magnitudes[0], magnitudes[1]);
        let largest = _mm256_max_epi32(low, _mm256_max_epi32(magnitudes[2], magnitudes[3]));
        let amax =
            largest_of(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
        let Some(inverse) = inverse_step(amax) else {
            write(scalar::group_without_integers(amax, quants), at);
            continue;
        };
        let inverse = _mm256_set1_ps(inverse);
        // Rounds to the nearest, ties to even: Rust never changes the processor's mode.
        let q = x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
        let packed =
            _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        // Packing works on halves of vectors; this brings the fours of elements into order.
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let packed = _mm256_permutevar8x32_epi32(packed, order);
        // SAFETY: 32 bytes are a group.
        unsafe { _mm256_storeu_si256(quants.as_mut_ptr().cast(), packed) }
        write(group_scale(amax, packed), at);
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn avx512(
    values: &[f32],
    quants: &mut [i8],
    (scales, starts): (&mut [GroupScale], &mut [HalfStarts]),
) {
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    let groups = values.as_chunks::<GROUP>().0.iter().zip(quants.as_chunks_mut::<GROUP>().0);
    for ((values, quants), at) in groups.zip(scales.iter_mut().zip(starts)) {
        let from = values.as_ptr();
        // SAFETY: two vectors are a group.
        let x = [0, 16].map(|start| unsafe { _mm512_loadu_ps(from.add(start)) });
        let magnitudes =
            x.map(|x| _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(MAGNITUDE)));
        let largest = _mm512_max_epi32(magnitudes[0], magnitudes[1]);
        let largest = _mm256_max_epi32(
            _mm512_castsi512_si256(largest),
            _mm512_extracti64x4_epi64::<1>(largest),
        );
        let amax =
            largest_of(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
        let Some(inverse) = inverse_step(amax) else {
            write(scalar::group_without_integers(amax, quants), at);
            continue;
        };
        let inverse = _mm512_set1_ps(inverse);
        let q = x.map(|x| _mm512_cvt_roundps_epi32::<NEAREST>(_mm512_mul_ps(x, inverse)));
        let packed = _mm256_set_m128i(_mm512_cvtepi32_epi8(q[1]), _mm512_cvtepi32_epi8(q[0]));
        // SAFETY: 32 bytes are a group.
        unsafe { _mm256_storeu_si256(quants.as_mut_ptr().cast(), packed) }
        write(group_scale(amax, packed), at);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn round(values: &[f32], mut lines: LinesMut<'_>) {
    const { assert!(BF16_EXPONENT > 0 && BF16_EXPONENT < 127) };
    let factor = _mm512_set1_ps(f32::from_bits((127 + BF16_EXPONENT as u32) << 23));
    for (values, line) in values.as_chunks::<GROUP>().0.iter().zip(lines.iter_mut()) {
        // SAFETY: two vectors are a group, and one is a line.
        unsafe {
            let [low, high] =
                [0, 16].map(|at| _mm512_mul_ps(_mm512_loadu_ps(values.as_ptr().add(at)), factor));
            let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            // Elements 0, 2, 1, 3 of each four.
            let swapped = _mm512_shufflelo_epi16::<0b11_01_10_00>(rounded);
            let swapped = _mm512_shufflehi_epi16::<0b11_01_10_00>(swapped);
            _mm512_store_si512(line.0.as_mut_ptr().cast(), swapped);
        }
    }
}

/// The largest of eight magnitudes. As integers they order like the numbers themselves, with
/// infinity and NaN on top.
#[target_feature(enable = "avx2")]
#[inline]
fn largest_of(low: __m128i, high: __m128i) -> f32 {
    let four = _mm_max_epi32(low, high);
    let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    let one = _mm_max_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two));
    f32::from_bits(_mm_cvtsi128_si32(one) as u32)
}

/// `127 / amax`; `None` for a group that has no integers.
#[inline(always)]
fn inverse_step(amax: f32) -> Option<f32> {
    (amax.is_finite() && amax >= AMAX_MIN).then(|| 127.0 / amax)
}

#[inline(always)]
fn write(made: GroupScale, (scale, starts): (&mut GroupScale, &mut HalfStarts)) {
    *starts = made.half_starts();
    *scale = made;
}

/// Scale and sums of a group's 32 integers.
#[target_feature(enable = "avx2")]
#[inline]
fn group_scale(amax: f32, quants: __m256i) -> GroupScale {
    let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), quants);
    let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    let eights = _mm256_add_epi32(fours, _mm256_shuffle_epi32::<0b01_00_11_10>(fours));
    let halves = _mm256_add_epi32(eights, _mm256_shuffle_epi32::<0b10_11_00_01>(eights));
    let low = _mm_cvtsi128_si32(_mm256_castsi256_si128(halves));
    let high = _mm_cvtsi128_si32(_mm256_extracti128_si256::<1>(halves));
    GroupScale::new(amax / 127.0, [low, high])
}
