//! The gated activations for any vector width.

use super::scalar::{GELU_CUBIC, GELU_SLOPE};
use crate::lanes::{Lanes, exp_lanes};

/// See [`super::scalar::swiglu`].
///
/// # Safety
/// The lengths are equal and the CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn swiglu<L: Lanes>(gate: &mut [f32], up: &[f32]) {
    let (gate, up, n) = (gate.as_mut_ptr(), up.as_ptr(), up.len());
    // SAFETY: offsets stay below the common length.
    unsafe {
        let mut i = 0;
        while i < n {
            let (at, len) = (gate.add(i), (n - i).min(L::WIDTH));
            let x = L::load_head(at, len);
            let value = L::mul(logistic_times::<L>(x, x), L::load_head(up.add(i), len));
            L::store_head(at, value, len);
            i += L::WIDTH;
        }
    }
}

/// See [`super::scalar::geglu`].
///
/// # Safety
/// The lengths are equal and the CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn geglu<L: Lanes>(gate: &mut [f32], up: &[f32]) {
    let (gate, up, n) = (gate.as_mut_ptr(), up.as_ptr(), up.len());
    // SAFETY: offsets stay below the common length.
    unsafe {
        let (slope, cubic) = (L::splat(GELU_SLOPE), L::splat(GELU_CUBIC));
        let mut i = 0;
        while i < n {
            let (at, len) = (gate.add(i), (n - i).min(L::WIDTH));
            let x = L::load_head(at, len);
            let cube = L::mul(L::mul(L::mul(cubic, x), x), x);
            let twice_u = L::mul(slope, L::add(x, cube));
            let value = L::mul(logistic_times::<L>(x, twice_u), L::load_head(up.add(i), len));
            L::store_head(at, value, len);
            i += L::WIDTH;
        }
    }
}

/// `x / (1 + e^−u)`.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
unsafe fn logistic_times<L: Lanes>(x: L::V, u: L::V) -> L::V {
    // SAFETY: arithmetic on values only.
    unsafe {
        let exp = exp_lanes::<L>(L::sub(L::splat(0.0), u));
        L::div(x, L::add(L::splat(1.0), exp))
    }
}
