//! The instruction sets that the kernels are written for, and which of them this CPU has.

use std::fmt;
use std::str::FromStr;

/// An instruction set with its own kernels, ordered from the most portable to the widest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust: the specification of every kernel, available everywhere.
    Scalar,
    /// AVX2 with FMA and F16C (Haswell, Zen and later).
    Avx2,
    /// [`Isa::Avx2`] and the 256-bit int8 dot product of AVX-VNNI (Alder Lake and later, and their
    /// successors without AVX-512).
    AvxVnni,
    /// AVX-512 F, BW, DQ and VL (Skylake-X).
    Avx512,
    /// [`Isa::Avx512`] and the int8 dot product `vpdpbusd` (Cascade Lake, Zen 4 and later).
    Avx512Vnni,
    /// [`Isa::Avx512Vnni`], VBMI, FP16 and BF16, and the bf16 tiles of AMX (Sapphire Rapids and
    /// later), which the operating system must grant.
    Amx,
}

/// A kernel table was asked for an instruction set that this CPU lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this CPU has no {wanted}; the best it has is {best}")]
pub struct UnsupportedIsa {
    /// The instruction set asked for.
    pub wanted: Isa,
    /// The fastest one that would work here.
    pub best: Isa,
}

/// A name that is none of `scalar`, `avx2`, `avxvnni`, `avx512`, `avx512vnni`, `amx`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown instruction set {name:?}: want scalar, avx2, avxvnni, avx512, avx512vnni or amx")]
pub struct UnknownIsa {
    /// The name as given.
    pub name: String,
}

/// Threads from which on AMX is taken: half of those of the machine where it was measured.
const AMX_WORKERS_MIN: usize = 8;

impl Isa {
    /// Every instruction set, in ascending order.
    pub const ALL: [Isa; 6] =
        [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Avx512Vnni, Isa::Amx];

    /// The fastest instruction set for few threads of this CPU that the operating system also saves
    /// on a context switch (the standard library's detection reads XCR0). Never [`Isa::Amx`], which
    /// is for many ([`Isa::for_workers`]).
    pub fn detect() -> Isa {
        let fastest_first = Isa::ALL.into_iter().rev().filter(|isa| *isa != Isa::Amx);
        fastest_first.into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)
    }

    /// The best instruction set for so many threads that share this CPU's memory. With many of them
    /// memory gives each so little that decoding weights to bf16 keeps up with it, and [`Isa::Amx`]
    /// costs one stream a tenth and doubles the speed of wide steps; with few, one stream would
    /// lose a third (docs/performance.md).
    pub fn for_workers(workers: usize) -> Isa {
        match workers >= AMX_WORKERS_MIN && Isa::Amx.is_available() {
            true => Isa::Amx,
            false => Isa::detect(),
        }
    }

    /// The instruction sets that this CPU can run, in ascending order.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Whether this CPU and its operating system can run these kernels.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            Isa::Avx2 => has_avx2(),
            Isa::AvxVnni => has_avx2() && has_avx_vnni(),
            Isa::Avx512 => has_avx2() && has_avx512(),
            Isa::Avx512Vnni => has_avx2() && has_avx512() && has_vnni(),
            Isa::Amx => {
                Isa::Avx512Vnni.is_available()
                    && has_half_floats()
                    && crate::amx_permission::granted()
            }
        }
    }

    /// `Ok` when the kernels of this instruction set may be called.
    ///
    /// # Errors
    /// [`UnsupportedIsa`] when the CPU or the operating system lacks it.
    pub fn require(self) -> Result<(), UnsupportedIsa> {
        if self.is_available() {
            return Ok(());
        }
        Err(UnsupportedIsa { wanted: self, best: Isa::detect() })
    }

    /// The name in configuration and logs.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Amx => "amx",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Isa, UnknownIsa> {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| UnknownIsa { name: name.to_owned() })
    }
}

/// Whether this processor reads one stream of weights faster without being asked for what lies
/// ahead: a Zen 4 reads 98 to 105 % of what reading alone reaches, 87 to 95 % if it is asked. On
/// Intel such a loop fell to 60 %. Not known of others, which are asked. What else was found on a
/// Zen 4 alone is done where this is true, too.
#[cfg(target_arch = "x86_64")]
pub(crate) fn follows_streams() -> bool {
    use std::arch::x86_64::__cpuid;
    static FOLLOWS: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let (vendor, version) = (__cpuid(0), __cpuid(1).eax);
        let family = (version >> 8 & 15) + (version >> 20 & 255);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        // Its family is that of Zen 3 as well, which has no AVX-512.
        let is_zen4 = family == 0x19 && is_x86_feature_detected!("avx512f");
        name.as_flattened() == b"AuthenticAMD" && is_zen4
    });
    *FOLLOWS
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx_vnni() -> bool {
    is_x86_feature_detected!("avxvnni")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni")
}

#[cfg(target_arch = "x86_64")]
fn has_half_floats() -> bool {
    is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512fp16")
        && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx_vnni() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_vnni() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_half_floats() -> bool {
    false
}
