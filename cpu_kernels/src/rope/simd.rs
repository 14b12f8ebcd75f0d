//! The rotation for any vector width.

use super::{RopeRow, scalar};
use crate::lanes::Lanes;

/// See [`scalar::rope_interleaved`].
///
/// # Safety
/// As the scalar version; the CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn rope_interleaved<L: Lanes>(head: &mut [f32], row: RopeRow<'_>) {
    let (x, pairs, step) = (head.as_mut_ptr(), row.cos.len(), L::WIDTH / 2);
    let mut i = 0;
    // SAFETY: `step` pairs from `i` are within the row and within `cos` and `sin`; the rest goes
    // through the scalar version with what is left of all three.
    unsafe {
        while i + step <= pairs {
            let (cos, sin) = (row.cos.as_ptr().add(i), row.sin.as_ptr().add(i));
            let v = L::load(x.add(2 * i));
            let crossed = L::mul(L::swap_pairs(v), L::load_twice(sin));
            L::store(x.add(2 * i), L::fma_alternating(v, L::load_twice(cos), crossed));
            i += step;
        }
        let rest = RopeRow { cos: &row.cos[i..], sin: &row.sin[i..] };
        scalar::rope_interleaved(&mut head[2 * i..], rest);
    }
}

/// See [`scalar::rope_half_split`].
///
/// # Safety
/// As the scalar version; the CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn rope_half_split<L: Lanes>(head: &mut [f32], row: RopeRow<'_>) {
    let (x, pairs) = (head.as_mut_ptr(), row.cos.len());
    // SAFETY: offsets stay below `pairs`, and `pairs + i` below `2 · pairs`, within the row.
    unsafe {
        let mut i = 0;
        while i < pairs {
            let len = (pairs - i).min(L::WIDTH);
            let (first, second) = (x.add(i), x.add(pairs + i));
            let cos = L::load_head(row.cos.as_ptr().add(i), len);
            let sin = L::load_head(row.sin.as_ptr().add(i), len);
            let (a, b) = (L::load_head(first, len), L::load_head(second, len));
            L::store_head(first, L::neg_fma(b, sin, L::mul(a, cos)), len);
            L::store_head(second, L::fma(a, sin, L::mul(b, cos)), len);
            i += L::WIDTH;
        }
    }
}
