//! One decoder per quantised type, from the 16-row interleaved layout to vectors of bytes.
//!
//! The vector twin of `dequantize/group.rs`: the same fields at the same offsets, 16 rows at a
//! time (see [`crate::repack`] for where units lie).

use super::lanes::Lanes;
use crate::blocks::DType;
use crate::dequantize::IQ4_CODEBOOK;

/// A packed block, and the first of the rows that a vector's lanes are.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// First byte of the packed block.
    pub bytes: *const u8,
    /// First row: 0, or 8 for the second half with 8 lanes.
    pub lane: usize,
}

impl Block {
    /// Lanes of unit `index` (of `unit` bytes) of the field at `offset` of the original block.
    #[inline(always)]
    fn at(self, offset: usize, unit: usize, index: usize) -> *const u8 {
        self.bytes.wrapping_add(16 * offset + unit * (16 * index + self.lane))
    }

    /// 4 bytes of each row.
    #[inline(always)]
    pub(super) unsafe fn words<L: Lanes>(self, offset: usize, index: usize) -> L::Int {
        // SAFETY: decoders ask only for units of their own block (contract of `Packed`).
        unsafe { L::load_words(self.at(offset, 4, index)) }
    }

    /// One byte of each row.
    #[inline(always)]
    pub unsafe fn bytes<L: Lanes>(self, offset: usize, index: usize) -> L::Int {
        // SAFETY: as in `words`.
        unsafe { L::load_bytes(self.at(offset, 1, index)) }
    }

    /// The f16 of each row.
    #[inline(always)]
    pub unsafe fn f16<L: Lanes>(self, offset: usize) -> L::Float {
        // SAFETY: as in `words`.
        unsafe { L::load_f16(self.at(offset, 2, 0)) }
    }
}

/// What a type's offsets look like.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum MinKind {
    /// It has none.
    None,
    /// One per group, from [`Packed::min`].
    One,
    /// One per 16 elements, from [`Packed::min_pair`].
    Pair,
}

/// A quantised type in the interleaved layout.
///
/// # Safety
/// Methods read within the packed block (16 blocks of the type) for `group` below the groups per
/// block and `word` below 8; the caller owns that much memory and has checked the CPU.
pub(super) trait Packed {
    const DTYPE: DType;
    /// Subtracted from each (unsigned) quant; 0, or 8 times a power of two where halves of groups
    /// have no scales of their own.
    const ZERO: i16 = 0;
    /// Whether quants are signed bytes; otherwise they are at most 127.
    const SIGNED: bool = false;
    /// Whether each half group of 16 elements has its own scale.
    const HALVES: bool = false;
    const MIN: MinKind = MinKind::None;

    /// Elements `4·word ..` of a group of 32.
    unsafe fn quants<L: Lanes>(block: Block, group: usize, word: usize) -> L::Int;
    /// Scale of a group, or of a half of it.
    unsafe fn scale<L: Lanes>(block: Block, group: usize, half: usize) -> L::Float;
    /// The offset of a group ([`MinKind::One`]).
    #[inline(always)]
    unsafe fn min<L: Lanes>(_block: Block, _group: usize) -> L::Float {
        // SAFETY: the caller has checked the CPU.
        unsafe { L::splat_f32(0.0) }
    }
    /// i16 pairs of integer offsets, and their scale ([`MinKind::Pair`]).
    #[inline(always)]
    unsafe fn min_pair<L: Lanes>(_block: Block, _group: usize) -> (L::Int, L::Float) {
        // SAFETY: the caller has checked the CPU.
        unsafe { (L::splat(0), L::splat_f32(0.0)) }
    }
}

/// Writes the methods of a decoder: generic in the lanes, inlined, one unsafe block as the body.
macro_rules! decode {
    ($(fn $name:ident<$lanes:ident>($($arg:ident: $type:ty),*) -> $result:ty { $($body:tt)* })*)
    => {$(
        #[inline(always)]
        unsafe fn $name<$lanes: Lanes>($($arg: $type),*) -> $result {
            // SAFETY: the contract of `Packed`; offsets are those of the type's fields.
            unsafe { $($body)* }
        }
    )*};
}

const NIBBLE: i32 = 0x0f0f_0f0f;
const CRUMB: i32 = 0x0303_0303;
const BIT: i32 = 0x0101_0101;

/// 4-bit elements of a 32-element group in 16 bytes: words 0..4 low, 4..8 high.
#[inline(always)]
pub(super) unsafe fn nibbles<L: Lanes>(block: Block, offset: usize, word: usize) -> L::Int {
    // SAFETY: `offset` is that of a field of 16 bytes; the caller has checked the CPU.
    unsafe {
        let both = block.words::<L>(offset, word % 4);
        L::and(if word < 4 { both } else { L::shr(both, 4) }, L::splat(NIBBLE))
    }
}

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
        L::shl(L::and(L::shr(eight, group), L::splat(BIT)), to)
    }
}

/// Fifth bits of `Q5_0` and `Q5_1`: bit `word` of each byte (see `repack::Unit::Bits`) to bit 4.
#[inline(always)]
unsafe fn fifth_bits<L: Lanes>(block: Block, offset: usize, word: usize) -> L::Int {
    // SAFETY: `offset` is that of the mask; the caller has checked the CPU.
    unsafe {
        let mask = block.words::<L>(offset, 0);
        let moved = if word < 4 { L::shl(mask, 4 - word) } else { L::shr(mask, word - 4) };
        L::and(moved, L::splat(BIT << 4))
    }
}

/// 6-bit integers of `Q4_K` and `Q5_K` (12 bytes at offset 4), as f32: scales at `first` 0, mins
/// at `first` 4. See `q4_k_scale_min` in `dequantize/group.rs`.
#[inline(always)]
unsafe fn six_bits<L: Lanes>(block: Block, group: usize, first: usize) -> L::Float {
    // SAFETY: the field has 12 bytes; the caller has checked the CPU.
    unsafe {
        let integer = if group < 4 {
            L::and(block.bytes::<L>(4, first + group), L::splat(63))
        } else {
            let low = L::shr(block.bytes::<L>(4, 4 + group), first);
            let high = L::shr(block.bytes::<L>(4, first + group - 4), 6);
            L::or(L::and(low, L::splat(15)), L::shl(high, 4))
        };
        L::to_f32(integer)
    }
}

pub(super) struct Q4_0;
impl Packed for Q4_0 {
    const DTYPE: DType = DType::Q4_0;
    const ZERO: i16 = 8;
    decode! {
        fn quants<L>(block: Block, _group: usize, word: usize) -> L::Int {
            nibbles::<L>(block, 2, word)
        }
        fn scale<L>(block: Block, _group: usize, _half: usize) -> L::Float { block.f16::<L>(0) }
    }
}

pub(super) struct Q4_1;
impl Packed for Q4_1 {
    const DTYPE: DType = DType::Q4_1;
    const MIN: MinKind = MinKind::One;
    decode! {
        fn quants<L>(block: Block, _group: usize, word: usize) -> L::Int {
            nibbles::<L>(block, 4, word)
        }
        fn scale<L>(block: Block, _group: usize, _half: usize) -> L::Float { block.f16::<L>(0) }
        fn min<L>(block: Block, _group: usize) -> L::Float { block.f16::<L>(2) }
    }
}

pub(super) struct Q5_0;
impl Packed for Q5_0 {
    const DTYPE: DType = DType::Q5_0;
    const ZERO: i16 = 16;
    decode! {
        fn quants<L>(block: Block, _group: usize, word: usize) -> L::Int {
            L::or(nibbles::<L>(block, 6, word), fifth_bits::<L>(block, 2, word))
        }
        fn scale<L>(block: Block, _group: usize, _half: usize) -> L::Float { block.f16::<L>(0) }
    }
}

pub(super) struct Q5_1;
impl Packed for Q5_1 {
    const DTYPE: DType = DType::Q5_1;
    const MIN: MinKind = MinKind::One;
    decode! {
        fn quants<L>(block: Block, _group: usize, word: usize) -> L::Int {
            L::or(nibbles::<L>(block, 8, word), fifth_bits::<L>(block, 4, word))
        }
        fn scale<L>(block: Block, _group: usize, _half: usize) -> L::Float { block.f16::<L>(0) }
        fn min<L>(block: Block, _group: usize) -> L::Float { block.f16::<L>(2) }
    }
}

pub(super) struct Q8_0;
impl Packed for Q8_0 {
    const DTYPE: DType = DType::Q8_0;
    const SIGNED: bool = true;
    decode! {
        fn quants<L>(block: Block, _group: usize, word: usize) -> L::Int {
            block.words::<L>(2, word)
        }
        fn scale<L>(block: Block, _group: usize, _half: usize) -> L::Float { block.f16::<L>(0) }
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
    const MIN: MinKind = MinKind::One;
    decode! {
        fn quants<L>(block: Block, group: usize, word: usize) -> L::Int {
            paired_nibbles::<L>(block, 16, group, word)
        }
        fn scale<L>(block: Block, group: usize, _half: usize) -> L::Float {
            L::mul(block.f16::<L>(0), six_bits::<L>(block, group, 0))
        }
        fn min<L>(block: Block, group: usize) -> L::Float {
            L::neg(L::mul(block.f16::<L>(2), six_bits::<L>(block, group, 4)))
        }
    }
}

pub(super) struct Q5K;
impl Packed for Q5K {
    const DTYPE: DType = DType::Q5_K;
    const MIN: MinKind = MinKind::One;
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
    decode! {
        fn quants<L>(block: Block, group: usize, word: usize) -> L::Int {
            let (half, quarter) = (group / 4, group % 4);
            let low = block.words::<L>(0, 16 * half + 8 * (quarter % 2) + word);
            let low = L::and(L::shr(low, 4 * (quarter / 2)), L::splat(NIBBLE));
            L::or(low, L::shl(crumbs::<L>(block, 128, group, word), 4))
        }
        fn scale<L>(block: Block, group: usize, half: usize) -> L::Float {
            let integer = L::load_signed_bytes(block.at(192, 1, 2 * group + half));
            L::mul(block.f16::<L>(208), L::to_f32(integer))
        }
    }
}

pub(super) struct Iq4Nl;
impl Packed for Iq4Nl {
    const DTYPE: DType = DType::IQ4_NL;
    const SIGNED: bool = true;
    decode! {
        fn quants<L>(block: Block, _group: usize, word: usize) -> L::Int {
            L::lookup(&IQ4_CODEBOOK, nibbles::<L>(block, 2, word))
        }
        fn scale<L>(block: Block, _group: usize, _half: usize) -> L::Float { block.f16::<L>(0) }
    }
}

pub(super) struct Iq4Xs;
impl Packed for Iq4Xs {
    const DTYPE: DType = DType::IQ4_XS;
    const SIGNED: bool = true;
    decode! {
        fn quants<L>(block: Block, group: usize, word: usize) -> L::Int {
            L::lookup(&IQ4_CODEBOOK, nibbles::<L>(block, 8 + 16 * group, word))
        }
        fn scale<L>(block: Block, group: usize, _half: usize) -> L::Float {
            let low = L::shr(block.bytes::<L>(4, group / 2), 4 * (group % 2));
            let high = L::shr(L::load_halves(block.at(2, 2, 0)), 2 * group);
            let high = L::shl(L::and(high, L::splat(3)), 4);
            let integer = L::sub(L::or(L::and(low, L::splat(15)), high), L::splat(32));
            L::mul(block.f16::<L>(0), L::to_f32(integer))
        }
    }
}

/// `$base` with the kernel `$kernel::<P>` for each quantised type.
macro_rules! table {
    ($base:expr, $kernel:ident) => {{
        use super::int4::*;
        use super::packed::*;
        let mut kernels: [MatmulFn; crate::blocks::DType::COUNT] = $base;
        kernels[Q4_0::DTYPE as usize] = $kernel::<Q4_0>;
        kernels[Q4_1::DTYPE as usize] = $kernel::<Q4_1>;
        kernels[Q5_0::DTYPE as usize] = $kernel::<Q5_0>;
        kernels[Q5_1::DTYPE as usize] = $kernel::<Q5_1>;
        kernels[Q8_0::DTYPE as usize] = $kernel::<Q8_0>;
        kernels[Q2K::DTYPE as usize] = $kernel::<Q2K>;
        kernels[Q3K::DTYPE as usize] = $kernel::<Q3K>;
        kernels[Q4K::DTYPE as usize] = $kernel::<Q4K>;
        kernels[Q5K::DTYPE as usize] = $kernel::<Q5K>;
        kernels[Q6K::DTYPE as usize] = $kernel::<Q6K>;
        kernels[Iq4Nl::DTYPE as usize] = $kernel::<Iq4Nl>;
        kernels[Iq4Xs::DTYPE as usize] = $kernel::<Iq4Xs>;
        kernels[Int4x128::DTYPE as usize] = $kernel::<Int4x128>;
        kernels[Int4x64::DTYPE as usize] = $kernel::<Int4x64>;
        kernels[Int4x32::DTYPE as usize] = $kernel::<Int4x32>;
        kernels
    }};
}
pub(super) use {decode, table};
