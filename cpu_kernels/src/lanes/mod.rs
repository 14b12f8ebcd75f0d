//! Owns the vocabulary that vector operations are written in once for every instruction set: a
//! vector of f32 and what can be done to it. It must not know any operation of a model. Called by
//! the `simd` files, whose functions are inlined into one outermost `#[target_feature]` function
//! per instruction set (`vector::avx2` and its like).

pub(crate) mod avx2;
pub(crate) mod avx512;

/// A vector of `WIDTH` f32 and its instructions.
///
/// # Safety of every method
/// The CPU has the instructions of the implementing type. Pointers are valid for the `WIDTH` (or
/// `n ≤ WIDTH`) elements that the method reads or writes; no alignment is needed. All methods are
/// inlined, so that they take the target features of the function that they end up in.
pub(crate) trait Lanes: Copy {
    /// The register.
    type V: Copy;
    /// f32 per register.
    const WIDTH: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// The first `n` elements; the others are those of `fill`.
    unsafe fn load_head_or(p: *const f32, n: usize, fill: Self::V) -> Self::V;
    unsafe fn store_head(p: *mut f32, v: Self::V, n: usize);
    /// 8-bit numbers, converted exactly.
    unsafe fn load_i8(p: *const i8) -> Self::V;
    /// f16 bits, widened exactly.
    unsafe fn load_f16(p: *const u16) -> Self::V;
    /// The first `n` elements widened; the others are 0.
    unsafe fn load_f16_head(p: *const u16, n: usize) -> Self::V;
    /// f16 bits of the first `n` elements, rounded to nearest even.
    unsafe fn store_f16_head(p: *mut u16, v: Self::V, n: usize);

    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a·b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c − a·b`, rounded once.
    unsafe fn neg_fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Even elements `a·b − c`, odd elements `a·b + c`.
    unsafe fn fma_alternating(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The smaller of each pair; `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The larger of each pair; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Nearest whole number, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `2^a` for whole `a` in `−126..=127`.
    unsafe fn two_to(a: Self::V) -> Self::V;
    /// `x` where `a < b`, else `y`; `y` where either is NaN.
    unsafe fn if_less(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// NaN where `a` is NaN, else 0.
    unsafe fn nan_or_zero(a: Self::V) -> Self::V;
    /// Sum of all elements, in a fixed tree.
    unsafe fn sum(a: Self::V) -> f32;
    /// Largest of all elements, none of which is NaN.
    unsafe fn max_of(a: Self::V) -> f32;
    /// `0, 1, …, WIDTH − 1`.
    unsafe fn iota() -> Self::V;
    /// Elements `2i` and `2i + 1` change places.
    unsafe fn swap_pairs(a: Self::V) -> Self::V;
    /// The `WIDTH / 2` elements at `p`, each twice.
    unsafe fn load_twice(p: *const f32) -> Self::V;

    /// The first `n` elements; the others are 0.
    #[inline(always)]
    unsafe fn load_head(p: *const f32, n: usize) -> Self::V {
        // SAFETY: the caller's promise is that of both methods.
        unsafe { Self::load_head_or(p, n, Self::splat(0.0)) }
    }
}

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts: the first has 15 significant bits, so `n·LN_2_HIGH` is exact for |n| < 2^9.
const LN_2_HIGH: f32 = 0.693_145_75;
const LN_2_LOW: f32 = 1.428_606_8e-6;
/// Below this, [`exp_lanes`] answers 0: so nothing computed from it is ever denormal (slow on some
/// CPUs), and what is lost is less than 2·10⁻³⁵.
const EXP_LOWEST: f32 = -80.0;
/// Above this, [`exp_lanes`] answers e^88, which is still finite.
const EXP_HIGHEST: f32 = 88.0;

/// `q(r) = (e^r − 1 − r) / r²` for |r| ≤ ln 2 / 2: the Taylor series up to r⁵/7!. The first term
/// left out of e^r is r⁸/8! < 5.2·10⁻⁹, a twelfth of half a unit in the last place.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
unsafe fn exp_tail<L: Lanes>(r: L::V) -> L::V {
    // SAFETY: arithmetic on values only.
    unsafe {
        let mut q = L::splat(1.0 / 5040.0);
        q = L::fma(q, r, L::splat(1.0 / 720.0));
        q = L::fma(q, r, L::splat(1.0 / 120.0));
        q = L::fma(q, r, L::splat(1.0 / 24.0));
        q = L::fma(q, r, L::splat(1.0 / 6.0));
        L::fma(q, r, L::splat(0.5))
    }
}

/// `(n, r)` with `x = n·ln 2 + r` and |r| ≤ ln 2 / 2.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
unsafe fn reduce<L: Lanes>(x: L::V) -> (L::V, L::V) {
    // SAFETY: arithmetic on values only.
    unsafe {
        let n = L::round(L::mul(x, L::splat(LOG2_E)));
        let r = L::neg_fma(n, L::splat(LN_2_HIGH), x);
        (n, L::neg_fma(n, L::splat(LN_2_LOW), r))
    }
}

/// `e^x` within 1 unit in the last place for `x` in −80..=88; 0 below, e^88 above, NaN for NaN.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn exp_lanes<L: Lanes>(x: L::V) -> L::V {
    // SAFETY: arithmetic on values only. `min` and `max` keep a NaN in their second argument.
    unsafe {
        let (lowest, highest) = (L::splat(EXP_LOWEST), L::splat(EXP_HIGHEST));
        let (n, r) = reduce::<L>(L::max(lowest, L::min(highest, x)));
        let one_plus = L::fma(L::mul(r, r), exp_tail::<L>(r), r);
        let exp = L::mul(L::add(L::splat(1.0), one_plus), L::two_to(n));
        L::if_less(x, lowest, L::splat(0.0), exp)
    }
}

/// `tanh x = m / (m + 2)` with `m = e^2x − 1`, which loses nothing around 0.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn tanh_lanes<L: Lanes>(x: L::V) -> L::V {
    // SAFETY: arithmetic on values only. Beyond ±10 the answer rounds to ±1.
    unsafe {
        let x = L::max(L::splat(-10.0), L::min(L::splat(10.0), x));
        let (n, r) = reduce::<L>(L::add(x, x));
        let small = L::fma(L::mul(r, r), exp_tail::<L>(r), r);
        let power = L::two_to(n);
        let m = L::fma(small, power, L::sub(power, L::splat(1.0)));
        L::div(m, L::add(m, L::splat(2.0)))
    }
}

/// `cap · tanh(x / cap)`, given `cap` and `1 / cap`.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn softcap_lanes<L: Lanes>(x: L::V, cap: L::V, inverse: L::V) -> L::V {
    // SAFETY: arithmetic on values only.
    unsafe { L::mul(cap, tanh_lanes::<L>(L::mul(x, inverse))) }
}
