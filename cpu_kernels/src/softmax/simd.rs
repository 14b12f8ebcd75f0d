//! The parts of softmax for any vector width.

use crate::lanes::{Lanes, exp_lanes};

/// Elements summed in f32 before the sum goes to an f64: 64 additions per lane of 16 lose little.
const BLOCK: usize = 1024;

/// See [`super::scalar::max`].
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn max<L: Lanes>(row: &[f32]) -> f32 {
    let (x, n) = (row.as_ptr(), row.len());
    // SAFETY: offsets stay below the length.
    unsafe {
        let lowest = L::splat(f32::NEG_INFINITY);
        let (mut maxima, mut nan) = ([lowest; 2], L::splat(0.0));
        let mut i = 0;
        while i < n {
            for max in &mut maxima {
                let v = L::load_head_or(x.add(i.min(n)), (n - i).min(L::WIDTH), lowest);
                *max = L::max(*max, v);
                // `v · 0` is NaN for NaN, but also for ±∞, so compare instead: 0 unless v ≠ v.
                nan = L::add(nan, L::nan_or_zero(v));
                i = (i + L::WIDTH).min(n);
            }
        }
        let max = L::max_of(L::max(maxima[0], maxima[1]));
        let nan = L::sum(nan);
        if nan.is_nan() { nan } else { max }
    }
}

/// See [`super::scalar::sum_exp_minus`].
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn sum_exp_minus<L: Lanes>(row: &[f32], shift: f32) -> f64 {
    let mut total = 0.0f64;
    // SAFETY: offsets stay below the length of each block.
    unsafe {
        let shift = L::splat(shift);
        let lowest = L::splat(f32::NEG_INFINITY);
        for block in row.chunks(BLOCK) {
            let (x, n) = (block.as_ptr(), block.len());
            let mut sum = L::splat(0.0);
            let mut i = 0;
            while i < n {
                let v = L::load_head_or(x.add(i), (n - i).min(L::WIDTH), lowest);
                sum = L::add(sum, exp_lanes::<L>(L::sub(v, shift)));
                i += L::WIDTH;
            }
            total += f64::from(L::sum(sum));
        }
    }
    total
}

/// See [`super::scalar::exp_minus`].
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn exp_minus<L: Lanes>(row: &mut [f32], shift: f32) -> f64 {
    let mut total = 0.0f64;
    // SAFETY: offsets stay below the length of each block.
    unsafe {
        let shift = L::splat(shift);
        let lowest = L::splat(f32::NEG_INFINITY);
        for block in row.chunks_mut(BLOCK) {
            let (x, n) = (block.as_mut_ptr(), block.len());
            let mut sum = L::splat(0.0);
            let mut i = 0;
            while i < n {
                let (at, len) = (x.add(i), (n - i).min(L::WIDTH));
                let v = L::load_head_or(at, len, lowest);
                let value = exp_lanes::<L>(L::sub(v, shift));
                sum = L::add(sum, value);
                L::store_head(at, value, len);
                i += L::WIDTH;
            }
            total += f64::from(L::sum(sum));
        }
    }
    total
}
