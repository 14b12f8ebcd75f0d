//! Element types as a file names them, including those that have no kernels here.

use crate::tensor::DType;
use std::fmt;

/// The element type of a tensor in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoredType {
    /// A type that can be computed with.
    Known(DType),
    /// Any other GGUF type id.
    Other(u32),
}

/// Far from ggml's ids, which count up from 0, and from those of our own types.
const FIRST_OF_OTHER_FORMATS: u32 = 0x5444_0100;

/// ggml's further types: id, name, elements and bytes of a block. They can be listed, not used.
const OTHERS: [(u32, &str, usize, usize); 24] = [
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    // Types of safetensors that ggml has not.
    (FIRST_OF_OTHER_FORMATS, "U8", 1, 1),
    (FIRST_OF_OTHER_FORMATS + 1, "BOOL", 1, 1),
    (FIRST_OF_OTHER_FORMATS + 2, "F8_E4M3", 1, 1),
    (FIRST_OF_OTHER_FORMATS + 3, "F8_E5M2", 1, 1),
    (FIRST_OF_OTHER_FORMATS + 4, "F8_E8M0", 1, 1),
    (FIRST_OF_OTHER_FORMATS + 5, "U32", 1, 4),
];

impl StoredType {
    /// The type of a GGUF type id.
    pub fn from_gguf_id(id: u32) -> Self {
        DType::from_gguf_id(id).map_or(Self::Other(id), Self::Known)
    }

    /// A type that has no kernels here, by name.
    pub(super) fn named(name: &str) -> Self {
        let found = OTHERS.iter().find(|(_, known, ..)| *known == name);
        Self::Other(found.map_or(u32::MAX, |(id, ..)| *id))
    }

    /// The GGUF type id.
    pub fn gguf_id(self) -> u32 {
        match self {
            Self::Known(dtype) => dtype.gguf_id(),
            Self::Other(id) => id,
        }
    }

    /// Elements and bytes of a block, or `None` for an id that ggml does not define either.
    pub fn block(self) -> Option<(usize, usize)> {
        match self {
            Self::Known(dtype) => Some((dtype.block_elements(), dtype.block_bytes())),
            Self::Other(id) => OTHERS
                .iter()
                .find(|row| row.0 == id)
                .map(|(_, _, elements, bytes)| (*elements, *bytes)),
        }
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(dtype) => dtype.fmt(formatter),
            Self::Other(id) => match OTHERS.iter().find(|row| row.0 == *id) {
                Some((_, name, ..)) => formatter.pad(name),
                None => formatter.pad(&format!("type {id}")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_type_is_both_known_and_other() {
        for (id, name, ..) in OTHERS {
            assert_eq!(DType::from_gguf_id(id), None, "{name}");
            assert_eq!(StoredType::from_gguf_id(id).to_string(), name);
        }
    }
}
