//! One table of kernels per instruction set, chosen once at run time.
//!
//! Only the outermost function of a kernel carries `#[target_feature]`, and only these tables
//! hold pointers to such functions. A table can be reached only through [`Kernels::for_isa`],
//! which checks the CPU first: that is why calling through it is sound.

use crate::activations::{self, ActivationTable};
use crate::attention::{self, AttentionTable};
use crate::isa::{Isa, UnsupportedIsa};
use crate::matmul::{self, MatmulTable};
use crate::roof::{self, RoofTable};
use crate::vector::{self, VectorTable};
use std::sync::LazyLock;

/// The kernels of one instruction set, a field per op folder.
pub struct Kernels {
    isa: Isa,
    pub(crate) matmul: MatmulTable,
    pub(crate) activations: ActivationTable,
    pub(crate) vector: VectorTable,
    pub(crate) attention: AttentionTable,
    pub(crate) roof: RoofTable,
}

static SCALAR: Kernels = Kernels {
    isa: Isa::Scalar,
    matmul: matmul::scalar::TABLE,
    activations: activations::scalar::TABLE,
    vector: vector::SCALAR,
    attention: attention::scalar::TABLE,
    roof: roof::scalar::TABLE,
};

/// [`SCALAR`] with the arithmetic of bf16 tiles.
static BF16: Kernels = Kernels {
    isa: Isa::Scalar,
    matmul: matmul::bf16::SPECIFICATION,
    activations: activations::scalar::BF16,
    vector: vector::SCALAR,
    attention: attention::scalar::TABLE,
    roof: roof::scalar::TABLE,
};

#[cfg(target_arch = "x86_64")]
static AVX2: Kernels = Kernels {
    isa: Isa::Avx2,
    matmul: matmul::avx2::PLAIN,
    activations: activations::x86::AVX2,
    vector: vector::avx2::TABLE,
    attention: attention::simd::avx2::TABLE,
    roof: roof::avx2::PLAIN,
};

#[cfg(target_arch = "x86_64")]
static AVX_VNNI: Kernels = Kernels {
    isa: Isa::AvxVnni,
    matmul: matmul::avx2::VNNI,
    activations: activations::x86::AVX2,
    vector: vector::avx2::TABLE,
    attention: attention::simd::avx2::TABLE,
    roof: roof::avx2::VNNI,
};

#[cfg(target_arch = "x86_64")]
static AVX512: Kernels = Kernels {
    isa: Isa::Avx512,
    matmul: matmul::avx512::PLAIN,
    activations: activations::x86::AVX512,
    vector: vector::avx512::TABLE,
    attention: attention::simd::avx512::TABLE,
    roof: roof::avx512::PLAIN,
};

#[cfg(target_arch = "x86_64")]
static AVX512_VNNI: Kernels = Kernels {
    isa: Isa::Avx512Vnni,
    matmul: matmul::avx512::VNNI,
    activations: activations::x86::AVX512,
    vector: vector::avx512::TABLE,
    attention: attention::simd::avx512::TABLE,
    roof: roof::avx512::VNNI,
};

#[cfg(target_arch = "x86_64")]
static AMX: Kernels = Kernels {
    isa: Isa::Amx,
    matmul: matmul::amx::TABLE,
    activations: activations::x86::BF16,
    vector: vector::avx512::TABLE,
    attention: attention::simd::avx512::TABLE,
    roof: roof::avx512::AMX,
};

static BEST: LazyLock<&'static Kernels> = LazyLock::new(|| table(Isa::detect()));

impl Kernels {
    /// The kernels of `isa`.
    ///
    /// # Errors
    /// [`UnsupportedIsa`] when this CPU cannot run them.
    pub fn for_isa(isa: Isa) -> Result<&'static Kernels, UnsupportedIsa> {
        isa.require()?;
        Ok(table(isa))
    }

    /// The scalar kernels whose results those of `isa` have, bit for bit. They run everywhere.
    pub fn specification(isa: Isa) -> &'static Kernels {
        if isa == Isa::Amx { &BF16 } else { &SCALAR }
    }

    /// The kernels of the widest instruction set that this CPU has.
    pub fn best() -> &'static Kernels {
        *BEST
    }

    /// Which instruction set these kernels use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

#[cfg(target_arch = "x86_64")]
fn table(isa: Isa) -> &'static Kernels {
    match isa {
        Isa::Scalar => &SCALAR,
        Isa::Avx2 => &AVX2,
        Isa::AvxVnni => &AVX_VNNI,
        Isa::Avx512 => &AVX512,
        Isa::Avx512Vnni => &AVX512_VNNI,
        Isa::Amx => &AMX,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn table(_isa: Isa) -> &'static Kernels {
    &SCALAR
}
