//! Element types of weights: ids, block sizes, and block layouts: those published by ggml, and our
//! own for what checkpoints of servers hold.

use std::fmt;
use std::str::FromStr;

/// Elements that share one activation scale, and the unit in which all kernels work.
pub const GROUP: usize = 32;

/// The element type of a stored tensor.
///
/// Quantised types come in blocks of 32 elements (`Q4_0` …, `IQ4_NL`) or 256 elements (the K
/// types, `IQ4_XS`); a row is a whole number of blocks. `d` and `m` below are little-endian f16.
///
/// | type | bytes | block | value of element *j* |
/// |---|---|---|---|
/// | `Q4_0` | 18 | d, 16 × two nibbles | d·(q − 8) |
/// | `Q4_1` | 20 | d, m, nibbles | d·q + m |
/// | `Q5_0` | 22 | d, 32 fifth bits, nibbles | d·(q − 16) |
/// | `Q5_1` | 24 | d, m, 32 fifth bits, nibbles | d·q + m |
/// | `Q8_0` | 34 | d, 32 × i8 | d·q |
/// | `Q2_K` | 84 | 16 × (4-bit scale s, 4-bit min t), 2-bit q, d, m | d·s·q − m·t |
/// | `Q3_K` | 110 | third bits, 2-bit q, 16 × 6-bit scale, d | d·(s − 32)·(q − 4) |
/// | `Q4_K` | 144 | d, m, 8 × (6-bit s, 6-bit t), nibbles | d·s·q − m·t |
/// | `Q5_K` | 176 | d, m, 8 × (6-bit s, 6-bit t), fifth bits, nibbles | d·s·q − m·t |
/// | `Q6_K` | 210 | nibbles, 2-bit highs, 16 × i8 scale, d | d·s·(q − 32) |
/// | `IQ4_NL` | 18 | d, nibbles | d·codebook\[q\] |
/// | `IQ4_XS` | 136 | d, 8 × 6-bit scale, nibbles | d·(s − 32)·codebook\[q\] |
///
/// The types below are no file's: AWQ, GPTQ and FP8 checkpoints have their scales apart from their
/// quants and become these on loading. Not a bit is lost, and `INT4` keeps their size within 1 %.
///
/// | type | elements | bytes | block | value of element *j* |
/// |---|---|---|---|---|
/// | `INT4_128` | 128 | 67 | d, u8 zero z, nibbles of 4 groups | d·q − d·z |
/// | `INT4_64` | 64 | 35 | d, u8 zero z, nibbles of 2 groups | d·q − d·z |
/// | `INT4_32` | 64 | 37 | 2 × d, nibbles z, nibbles of 2 groups | d·q − d·z, d and z per group |
/// | `E4M3_128` | 128 | 132 | f32 s, 128 × e4m3 | s·h(q) |
/// | `E4M3_32` | 32 | 36 | f32 s, 32 × e4m3 | s·h(q) |
///
/// Groups have 32 elements in 16 bytes, as `Q4_0` has them; `d·q` and `d·z` are exact in f32, and
/// so is their difference. h(q) is the f16 with q's sign, exponent and mantissa bits in their
/// places, which is q's value divided by 256: s is 256 times the checkpoint's scale. (The two bit
/// patterns that e4m3 calls NaN count as ±480 here; loading refuses them.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)]
pub enum DType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    INT4_128,
    INT4_64,
    INT4_32,
    E4M3_128,
    E4M3_32,
}

/// Facts of one type, in the order of the columns of [`FACTS`].
struct Facts {
    dtype: DType,
    name: &'static str,
    gguf_id: u32,
    block_elements: usize,
    block_bytes: usize,
}

const fn facts(
    dtype: DType,
    name: &'static str,
    gguf_id: u32,
    block_elements: usize,
    block_bytes: usize,
) -> Facts {
    Facts { dtype, name, gguf_id, block_elements, block_bytes }
}

/// Ids of types that GGUF has not: far from ggml's, which count up from 0. Nothing but tests writes
/// them.
const OWN_IDS: u32 = 0x5444_0000;

/// Indexed by `DType as usize`.
const FACTS: [Facts; 20] = [
    facts(DType::F32, "F32", 0, 1, 4),
    facts(DType::F16, "F16", 1, 1, 2),
    facts(DType::BF16, "BF16", 30, 1, 2),
    facts(DType::Q4_0, "Q4_0", 2, 32, 18),
    facts(DType::Q4_1, "Q4_1", 3, 32, 20),
    facts(DType::Q5_0, "Q5_0", 6, 32, 22),
    facts(DType::Q5_1, "Q5_1", 7, 32, 24),
    facts(DType::Q8_0, "Q8_0", 8, 32, 34),
    facts(DType::Q2_K, "Q2_K", 10, 256, 84),
    facts(DType::Q3_K, "Q3_K", 11, 256, 110),
    facts(DType::Q4_K, "Q4_K", 12, 256, 144),
    facts(DType::Q5_K, "Q5_K", 13, 256, 176),
    facts(DType::Q6_K, "Q6_K", 14, 256, 210),
    facts(DType::IQ4_NL, "IQ4_NL", 20, 32, 18),
    facts(DType::IQ4_XS, "IQ4_XS", 23, 256, 136),
    facts(DType::INT4_128, "INT4_128", OWN_IDS, 128, 67),
    facts(DType::INT4_64, "INT4_64", OWN_IDS + 1, 64, 35),
    facts(DType::INT4_32, "INT4_32", OWN_IDS + 2, 64, 37),
    facts(DType::E4M3_128, "E4M3_128", OWN_IDS + 3, 128, 132),
    facts(DType::E4M3_32, "E4M3_32", OWN_IDS + 4, 32, 36),
];

/// A name that is no supported element type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown element type {name:?}")]
pub struct UnknownDType {
    /// The name as given.
    pub name: String,
}

impl DType {
    /// Number of types, one more than the largest `DType as usize`.
    pub const COUNT: usize = FACTS.len();

    /// Every supported type.
    pub const ALL: [DType; Self::COUNT] = {
        let mut all = [DType::F32; Self::COUNT];
        let mut index = 0;
        while index < all.len() {
            assert!(FACTS[index].dtype as usize == index);
            all[index] = FACTS[index].dtype;
            index += 1;
        }
        all
    };

    /// The type of a GGUF tensor-info id, or `None` for an id that has no kernels here.
    pub fn from_gguf_id(id: u32) -> Option<DType> {
        FACTS.iter().find(|facts| facts.gguf_id == id).map(|facts| facts.dtype)
    }

    /// The id of this type in GGUF tensor infos.
    pub const fn gguf_id(self) -> u32 {
        FACTS[self as usize].gguf_id
    }

    /// Elements of one block; 1 for the float types.
    pub const fn block_elements(self) -> usize {
        FACTS[self as usize].block_elements
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        FACTS[self as usize].block_bytes
    }

    /// Bytes of a row of `cols` elements; `None` when `cols` is no whole number of blocks or the
    /// product overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_elements()) {
            return None;
        }
        (cols / self.block_elements()).checked_mul(self.block_bytes())
    }

    /// Whether products take activations rounded to 8 bits. The others are floats of any width,
    /// whose products are in f32: 8-bit integers cannot hold the range of an e4m3.
    pub const fn is_quantized(self) -> bool {
        self.block_elements() > 1 && !matches!(self, DType::E4M3_128 | DType::E4M3_32)
    }

    /// The name of the type, ggml's where it has one.
    pub const fn name(self) -> &'static str {
        FACTS[self as usize].name
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(name: &str) -> Result<DType, UnknownDType> {
        DType::ALL
            .into_iter()
            .find(|dtype| dtype.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| UnknownDType { name: name.to_owned() })
    }
}
