//! The scalar code compiled for wider vectors: it has no branches inside a group, so the compiler
//! vectorises it as it stands, and the bits cannot differ.

use super::{ActivationTable, GroupScale, scalar};

pub(crate) const AVX2: ActivationTable = ActivationTable { quantize: avx2 };
pub(crate) const AVX512: ActivationTable = ActivationTable { quantize: avx512 };

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2(values: &[f32], quants: &mut [i8], scales: &mut [GroupScale]) {
    scalar::quantize(values, quants, scales);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn avx512(values: &[f32], quants: &mut [i8], scales: &mut [GroupScale]) {
    scalar::quantize(values, quants, scales);
}
