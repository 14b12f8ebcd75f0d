//! Decoders of our own 4-bit types, whose scale and zero point serve one, two or four groups.

use super::lanes::Lanes;
use super::packed::{Block, MinKind, Packed, decode, nibbles};
use crate::blocks::DType;

/// A type with one scale and one zero point in a block, and the quants at byte 3.
macro_rules! one_scale {
    ($name:ident, $dtype:expr) => {
        pub(super) struct $name;
        impl Packed for $name {
            const DTYPE: DType = $dtype;
            const MIN: MinKind = MinKind::One;
            decode! {
                fn quants<L>(block: Block, group: usize, word: usize) -> L::Int {
                    nibbles::<L>(block, 3 + 16 * group, word)
                }
                fn scale<L>(block: Block, _group: usize, _half: usize) -> L::Float {
                    block.f16::<L>(0)
                }
                fn min<L>(block: Block, _group: usize) -> L::Float {
                    let zero = L::to_f32(block.bytes::<L>(2, 0));
                    L::neg(L::mul(block.f16::<L>(0), zero))
                }
            }
        }
    };
}

one_scale!(Int4x128, DType::INT4_128);
one_scale!(Int4x64, DType::INT4_64);

pub(super) struct Int4x32;
impl Packed for Int4x32 {
    const DTYPE: DType = DType::INT4_32;
    const MIN: MinKind = MinKind::One;
    decode! {
        fn quants<L>(block: Block, group: usize, word: usize) -> L::Int {
            nibbles::<L>(block, 5 + 16 * group, word)
        }
        fn scale<L>(block: Block, group: usize, _half: usize) -> L::Float {
            block.f16::<L>(2 * group)
        }
        fn min<L>(block: Block, group: usize) -> L::Float {
            let zeros = L::shr(block.bytes::<L>(4, 0), 4 * group);
            let zero = L::to_f32(L::and(zeros, L::splat(15)));
            L::neg(L::mul(block.f16::<L>(2 * group), zero))
        }
    }
}
