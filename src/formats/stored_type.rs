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

/// ggml's further types: id, name, elements and bytes of a block. They can be listed, not used.
const OTHERS: [(u32, &str, usize, usize); 18] = [
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
];

impl StoredType {
    /// The type of a GGUF type id.
    pub fn from_gguf_id(id: u32) -> Self {
        DType::from_gguf_id(id).map_or(Self::Other(id), Self::Known)
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
