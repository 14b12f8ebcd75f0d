//! The norm for any vector width.

use super::scalar::inverse_root;
use crate::lanes::Lanes;

/// See [`super::scalar::rms_norm`].
///
/// # Safety
/// As the scalar version; the CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn rms_norm<L: Lanes>(x: *const f32, weight: &[f32], eps: f32, out: *mut f32) {
    let n = weight.len();
    // SAFETY: all offsets stay below `n`; the tail uses the masked forms.
    unsafe {
        let scale = L::splat(inverse_root(squares::<L>(x, n), n, eps));
        let w = weight.as_ptr();
        let mut i = 0;
        while i + L::WIDTH <= n {
            let value = L::mul(L::mul(L::load(x.add(i)), scale), L::load(w.add(i)));
            L::store(out.add(i), value);
            i += L::WIDTH;
        }
        if i < n {
            let rest = n - i;
            let weight = L::load_head(w.add(i), rest);
            let value = L::mul(L::mul(L::load_head(x.add(i), rest), scale), weight);
            L::store_head(out.add(i), value, rest);
        }
    }
}

/// Sum of squares: four f32 vectors of partial sums, a tail vector, and one f64 total.
///
/// # Safety
/// `x` is valid for `n` elements; the CPU has the instructions of `L`.
#[inline(always)]
unsafe fn squares<L: Lanes>(x: *const f32, n: usize) -> f64 {
    // SAFETY: all offsets stay below `n`.
    unsafe {
        let mut sums = [L::splat(0.0); 4];
        let mut i = 0;
        while i + 4 * L::WIDTH <= n {
            for (k, sum) in sums.iter_mut().enumerate() {
                let v = L::load(x.add(i + k * L::WIDTH));
                *sum = L::fma(v, v, *sum);
            }
            i += 4 * L::WIDTH;
        }
        while i < n {
            let v = L::load_head(x.add(i), (n - i).min(L::WIDTH));
            sums[0] = L::fma(v, v, sums[0]);
            i += L::WIDTH;
        }
        let pairs = L::add(L::add(sums[0], sums[1]), L::add(sums[2], sums[3]));
        f64::from(L::sum(pairs))
    }
}
