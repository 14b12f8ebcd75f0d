//! The elementwise operations for any vector width.

use crate::lanes::{Lanes, softcap_lanes};

/// See [`super::scalar::add`].
///
/// # Safety
/// The lengths are equal and the CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn add<L: Lanes>(x: &mut [f32], addend: &[f32]) {
    let (pointer, other, n) = (x.as_mut_ptr(), addend.as_ptr(), x.len());
    // SAFETY: offsets stay below the common length.
    unsafe {
        let mut i = 0;
        while i + L::WIDTH <= n {
            L::store(pointer.add(i), L::add(L::load(pointer.add(i)), L::load(other.add(i))));
            i += L::WIDTH;
        }
        if i < n {
            let (rest, at) = (n - i, pointer.add(i));
            let sum = L::add(L::load_head(at, rest), L::load_head(other.add(i), rest));
            L::store_head(at, sum, rest);
        }
    }
}

/// See [`super::scalar::scale`].
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn scale<L: Lanes>(x: &mut [f32], factor: f32) {
    let (pointer, n) = (x.as_mut_ptr(), x.len());
    // SAFETY: offsets stay below the length.
    unsafe {
        let factor = L::splat(factor);
        let mut i = 0;
        while i < n {
            let (at, len) = (pointer.add(i), (n - i).min(L::WIDTH));
            L::store_head(at, L::mul(L::load_head(at, len), factor), len);
            i += L::WIDTH;
        }
    }
}

/// See [`super::scalar::softcap`].
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn softcap<L: Lanes>(x: &mut [f32], cap: f32) {
    let (pointer, n) = (x.as_mut_ptr(), x.len());
    // SAFETY: offsets stay below the length.
    unsafe {
        let (cap, inverse) = (L::splat(cap), L::splat(1.0 / cap));
        let mut i = 0;
        while i < n {
            let (at, len) = (pointer.add(i), (n - i).min(L::WIDTH));
            L::store_head(at, softcap_lanes::<L>(L::load_head(at, len), cap, inverse), len);
            i += L::WIDTH;
        }
    }
}
