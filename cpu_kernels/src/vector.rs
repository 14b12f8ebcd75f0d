//! The table of row-wise operations: norms, rotations, activations, softmax.
//!
//! Each op folder holds its specification (`scalar`) and one version for all vector widths
//! (`simd`). Here they meet the instruction sets: the functions below are the outermost ones, which
//! carry `#[target_feature]`, and everything generic is inlined into them.

use crate::rope::RopeRow;
use crate::{elementwise, gated, norm, rope, softmax};

/// Row-wise operations of one instruction set. Lengths are checked by the callers in the op
/// folders.
pub(crate) struct VectorTable {
    /// `(input, weight, eps, output)`.
    pub rms_norm: unsafe fn(*const f32, &[f32], f32, *mut f32),
    pub add: unsafe fn(&mut [f32], &[f32]),
    pub scale: unsafe fn(&mut [f32], f32),
    pub softcap: unsafe fn(&mut [f32], f32),
    pub swiglu: unsafe fn(&mut [f32], &[f32]),
    pub geglu: unsafe fn(&mut [f32], &[f32]),
    pub rope_interleaved: unsafe fn(&mut [f32], RopeRow<'_>),
    pub rope_half_split: unsafe fn(&mut [f32], RopeRow<'_>),
    pub max: unsafe fn(&[f32]) -> f32,
    pub sum_exp_minus: unsafe fn(&[f32], f32) -> f64,
    pub exp_minus: unsafe fn(&mut [f32], f32) -> f64,
    pub largest_finite: unsafe fn(&[f32]) -> f32,
    pub sum_exp_below: unsafe fn(&[f32], f32) -> f64,
}

/// The specifications.
pub(crate) const SCALAR: VectorTable = VectorTable {
    rms_norm: norm::scalar::rms_norm,
    add: elementwise::scalar::add,
    scale: elementwise::scalar::scale,
    softcap: elementwise::scalar::softcap,
    swiglu: gated::scalar::swiglu,
    geglu: gated::scalar::geglu,
    rope_interleaved: rope::scalar::rope_interleaved,
    rope_half_split: rope::scalar::rope_half_split,
    max: softmax::scalar::max,
    sum_exp_minus: softmax::scalar::sum_exp_minus,
    exp_minus: softmax::scalar::exp_minus,
    largest_finite: softmax::weights::scalar::largest_finite,
    sum_exp_below: softmax::weights::scalar::sum_exp_below,
};

/// The outermost functions of one instruction set, and their table.
#[cfg(target_arch = "x86_64")]
macro_rules! vector_table {
    (
        $module:ident, $lanes:ty, $features:tt,
        $(fn $name:ident = $path:path, ($($arg:ident: $type:ty),*) -> $result:ty;)*
    ) => {
        pub(crate) mod $module {
            use super::*;

            $(
                /// # Safety
                /// The CPU has these features; otherwise as the generic function.
                #[target_feature(enable = $features)]
                unsafe fn $name($($arg: $type),*) -> $result {
                    use $path as inner;
                    // SAFETY: the caller keeps the promises of the generic function.
                    unsafe { inner::<$lanes>($($arg),*) }
                }
            )*

            pub(crate) const TABLE: VectorTable = VectorTable { $($name),* };
        }
    };
}

#[cfg(target_arch = "x86_64")]
macro_rules! vector_tables {
    ($($module:ident, $lanes:ty, $features:tt;)*) => { $(
        vector_table! {
            $module, $lanes, $features,
            fn rms_norm = norm::simd::rms_norm,
                (x: *const f32, weight: &[f32], eps: f32, out: *mut f32) -> ();
            fn add = elementwise::simd::add, (x: &mut [f32], addend: &[f32]) -> ();
            fn scale = elementwise::simd::scale, (x: &mut [f32], factor: f32) -> ();
            fn softcap = elementwise::simd::softcap, (x: &mut [f32], cap: f32) -> ();
            fn swiglu = gated::simd::swiglu, (gate: &mut [f32], up: &[f32]) -> ();
            fn geglu = gated::simd::geglu, (gate: &mut [f32], up: &[f32]) -> ();
            fn rope_interleaved = rope::simd::rope_interleaved,
                (head: &mut [f32], row: RopeRow<'_>) -> ();
            fn rope_half_split = rope::simd::rope_half_split,
                (head: &mut [f32], row: RopeRow<'_>) -> ();
            fn max = softmax::simd::max, (row: &[f32]) -> f32;
            fn sum_exp_minus = softmax::simd::sum_exp_minus, (row: &[f32], shift: f32) -> f64;
            fn exp_minus = softmax::simd::exp_minus, (row: &mut [f32], shift: f32) -> f64;
            fn largest_finite = softmax::weights::simd::largest_finite, (row: &[f32]) -> f32;
            fn sum_exp_below = softmax::weights::simd::sum_exp_below,
                (row: &[f32], largest: f32) -> f64;
        }
    )* };
}

#[cfg(target_arch = "x86_64")]
vector_tables! {
    avx2, crate::lanes::avx2::Avx2, "avx2,fma,f16c";
    avx512, crate::lanes::avx512::Avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl";
}
