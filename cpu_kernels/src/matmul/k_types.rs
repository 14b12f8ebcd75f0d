//! Decoders of the K types: 256 elements in 8 groups, scales in 4 to 8 bits.

use super::lanes::Lanes;
use super::packed::{BIT, Block, MinKind, NIBBLE, Packed, decode};
use crate::blocks::DType;

const CRUMB: i32 = 0x0303_0303;

/// 4-bit elements of the K types: groups 2a and 2a + 1 share 32 bytes.
#[inline(always)]
unsafe fn paired_nibbles<L: Lanes>(
    block: Block,
    offset: usize,
    group: usize,
    word: usize,
) -> L::Int {
    // SAFETY: `offset` is that of a field of 128 bytes; the caller has checked the CPU.
    unsafe {
        let both = block.words::<L>(offset, 8 * (group / 2) + word);
        L::and(L::shr(both, 4 * (group % 2)), L::splat(NIBBLE))
    }
}

/// 2-bit elements of the K types: four groups share 32 bytes.
#[inline(always)]
unsafe fn crumbs<L: Lanes>(block: Block, offset: usize, group: usize, word: usize) -> L::Int {
    // SAFETY: `offset` is that of a field of 64 bytes; the caller has checked the CPU.
    unsafe {
        let four = block.words::<L>(offset, 8 * (group / 4) + word);
        L::and(L::shr(four, 2 * (group % 4)), L::splat(CRUMB))
    }
}

/// 1-bit elements of the K types (all 8 groups share 32 bytes), moved to bit `to`.
#[inline(always)]
unsafe fn bits<L: Lanes>(
    block: Block,
    offset: usize,
    (group, word): (usize, usize),
    to: usize,
) -> L::Int {
    // SAFETY: `offset` is that of a field of 32 bytes; the caller has checked the CPU.
    unsafe {
        let eight = block.words::<L>(offset, word);
        L::and(L::rotate(eight, (32 + to - group) % 32), L::splat(BIT << to))
    }
}

/// A 6-bit integer of `Q4_K` and `Q5_K` (12 bytes at offset 4), as f32: scales at `first` 0,
/// offsets at `first` 4. See `q4_k_scale_min` in `dequantize/group.rs`.
#[inline(always)]
unsafe fn six_bits<L: Lanes>(block: Block, group: usize, first: usize) -> L::Float {
    // SAFETY: the field has 12 bytes, or has been unpacked; the caller has checked the CPU.
    unsafe {
        let integer = if !block.six_bits.is_null() {
            let bytes = block.six_bits.cast::<u8>();
            L::load_bytes(bytes.add(16 * (2 * first + group) + block.lane))
        } else if group < 4 {
            L::and(block.bytes::<L>(4, first + group), L::splat(63))
        } else {
            let low = L::shr(block.bytes::<L>(4, 4 + group), first);
            let high = L::shr(block.bytes::<L>(4, first + group - 4), 6);
            L::or(L::and(low, L::splat(15)), L::shl(high, 4))
        };
        L::to_f32(integer)
    }
}

pub(super) struct Q2K;
impl Packed for Q2K {
    const DTYPE: DType = DType::Q2_K;
    const HALVES: bool = true;
    const MIN: MinKind = MinKind::Pair;
    decode! {
        fn quants<L>(block: Block, group: usize, word: usize) -> L::Int {
            crumbs::<L>(block, 16, group, word)
        }
        fn scale<L>(block: Block, group: usize, half: usize) -> L::Float {
            let integer = L::and(block.bytes::<L>(0, 2 * group + half), L::splat(15));
            L::mul(block.f16::<L>(80), L::to_f32(integer))
        }
        fn min_pair<L>(block: Block, group: usize) -> (L::Int, L::Float) {
            let low = L::shr(block.bytes::<L>(0, 2 * group), 4);
            let high = L::shr(block.bytes::<L>(0, 2 * group + 1), 4);
            (L::or(low, L::shl(high, 16)), L::neg(block.f16::<L>(82)))
        }
    }
}

pub(super) struct Q3K;
impl Packed for Q3K {
    const DTYPE: DType = DType::Q3_K;
    const ZERO: i16 = 4;
    const HALVES: bool = true;
    decode! {
        fn quants<L>(block: Block, group: usize, word: usize) -> L::Int {
            L::or(crumbs::<L>(block, 32, group, word), bits::<L>(block, 0, (group, word), 2))
        }
        fn scale<L>(block: Block, group: usize, half: usize) -> L::Float {
            let index = 2 * group + half;
            let low = L::shr(block.bytes::<L>(96, index % 8), 4 * (index / 8));
            let high = L::shr(block.bytes::<L>(96, 8 + index % 4), 2 * (index / 4));
            let high = L::shl(L::and(high, L::splat(3)), 4);
            let integer = L::sub(L::or(L::and(low, L::splat(15)), high), L::splat(32));
            L::mul(block.f16::<L>(108), L::to_f32(integer))
        }
    }
}

pub(super) struct Q4K;
impl Packed for Q4K {
    const DTYPE: DType = DType::Q4_K;
    /// 311 instead of 286 GMAC/s on two threads of a Zen 4. All other types gain nothing by it.
    const LONG_CHUNKS: bool = true;
    const MIN: MinKind = MinKind::One;
    const SIX_BITS: bool = true;
    decode! {
        fn quants<L>(block: Block, group: usize, word: usize) -> L::Int {
            paired_nibbles::<L>(block, 16, group, word)
        }
        fn scale<L>(block: Block, group: usize, _half: usize) -> L::Float {
            L::mul(block.f16::<L>(0), six_bits::<L>(block, group, 0))
        }
        fn min<L>(block: Block, group: usize) -> L::Float {
            L::mul(L::neg(block.f16::<L>(2)), six_bits::<L>(block, group, 4))
        }
    }
}

pub(super) struct Q5K;
impl Packed for Q5K {
    const DTYPE: DType = DType::Q5_K;
    const APART: bool = true;
    const MIN: MinKind = MinKind::One;
    const SIX_BITS: bool = true;
    decode! {
        fn quants<L>(block: Block, group: usize, word: usize) -> L::Int {
            let low = paired_nibbles::<L>(block, 48, group, word);
            L::or(low, bits::<L>(block, 16, (group, word), 4))
        }
        fn scale<L>(block: Block, group: usize, half: usize) -> L::Float {
            Q4K::scale::<L>(block, group, half)
        }
        fn min<L>(block: Block, group: usize) -> L::Float { Q4K::min::<L>(block, group) }
    }
}

pub(super) struct Q6K;
impl Packed for Q6K {
    const DTYPE: DType = DType::Q6_K;
    const ZERO: i16 = 32;
    const HALVES: bool = true;
    const IN_RUNS: bool = true;
    decode! {
        fn quants<L>(block: Block, group: usize, word: usize) -> L::Int {
            let (half, quarter) = (group / 4, group % 4);
            let low = block.words::<L>(0, 16 * half + 8 * (quarter % 2) + word);
            let low = L::and(L::shr(low, 4 * (quarter / 2)), L::splat(NIBBLE));
            // Bits 2·quarter of each byte to bits 4: whichever way, a rotation.
            let high = block.words::<L>(128, 8 * half + word);
            let high = L::rotate(high, (36 - 2 * quarter) % 32);
            L::or(low, L::and(high, L::splat(0x3030_3030)))
        }
        fn scale<L>(block: Block, group: usize, half: usize) -> L::Float {
            let integer = L::load_signed_bytes(block.at(192, 1, 2 * group + half));
            L::mul(block.f16::<L>(208), L::to_f32(integer))
        }
    }
}
