//! One decoder per quantised type, from the 16-row interleaved layout to vectors of bytes.
//!
//! The vector twin of `dequantize/group.rs`: the same fields at the same offsets, 16 rows at a
//! time (see [`crate::repack`] for where units lie).

use super::lanes::Lanes;
use crate::blocks::DType;
use crate::dequantize::IQ4_CODEBOOK;
use std::mem::MaybeUninit;

/// A packed block, and the first of the rows that a vector's lanes are.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// First byte of the packed block.
    pub bytes: *const u8,
    /// First row: 0, or 8 for the second half with 8 lanes.
    pub lane: usize,
    /// What [`SixBits::unpack`] has made for types with [`Packed::SIX_BITS`]; null where they are
    /// to read the block itself.
    pub six_bits: *const SixBits,
}

/// The 6-bit integers of a packed block of `Q4_K` or `Q5_K` as bytes: `[8 groups][16 rows]` scales,
/// then as many offsets. Group by group they cost as much as a column's products.
#[repr(align(64))]
pub(super) struct SixBits(pub [u8; 256]);

impl SixBits {
    /// Those of the packed block at `bytes`. See `q4_k_scale_min` in `dequantize/group.rs`.
    ///
    /// # Safety
    /// A packed block of such a type lies there.
    #[inline(always)]
    pub unsafe fn unpack(bytes: *const u8, to: &mut MaybeUninit<SixBits>) {
        // SAFETY: the 12 bytes at offset 4 of each of 16 blocks; all of `to` is written.
        unsafe {
            let from = &*bytes.add(64).cast::<[u8; 192]>();
            let to = (&raw mut (*to.as_mut_ptr()).0).cast::<u8>();
            for at in 0..64 {
                let (scale, min, rest) = (from[at], from[64 + at], from[128 + at]);
                to.add(at).write(scale & 63);
                to.add(64 + at).write((rest & 15) | (scale >> 6) << 4);
                to.add(128 + at).write(min & 63);
                to.add(192 + at).write(rest >> 4 | (min >> 6) << 4);
            }
        }
    }
}

impl Block {
    /// Lanes of unit `index` (of `unit` bytes) of the field at `offset` of the original block.
    #[inline(always)]
    pub(super) fn at(self, offset: usize, unit: usize, index: usize) -> *const u8 {
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
    /// Subtracted from each (unsigned) quant; 0, or 8 times a power of two, or, where halves of
    /// groups have scales of their own, a power of two up to 32.
    const ZERO: i16 = 0;
    /// Whether quants are signed bytes; otherwise they are at most 127.
    const SIGNED: bool = false;
    /// Whether each half group of 16 elements has its own scale.
    const HALVES: bool = false;
    /// Whether a group's fields lie so far apart in a block that hardware does not fetch ahead.
    const APART: bool = Self::HALVES;
    /// Whether these are asked for in runs where hardware follows streams otherwise (`fetch.rs`).
    const IN_RUNS: bool = false;
    /// Whether many columns meet more elements at once than the first-level cache holds, decoded,
    /// where that was found to be faster: on Zen 4 with AVX-512.
    const LONG_CHUNKS: bool = false;
    const MIN: MinKind = MinKind::None;
    /// Whether scales and offsets are 6-bit integers that [`SixBits`] unpacks.
    const SIX_BITS: bool = false;

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

pub(super) const NIBBLE: i32 = 0x0f0f_0f0f;
pub(super) const BIT: i32 = 0x0101_0101;

/// 4-bit elements of a 32-element group in 16 bytes: words 0..4 low, 4..8 high.
#[inline(always)]
pub(super) unsafe fn nibbles<L: Lanes>(block: Block, offset: usize, word: usize) -> L::Int {
    // SAFETY: `offset` is that of a field of 16 bytes; the caller has checked the CPU.
    unsafe {
        let both = block.words::<L>(offset, word % 4);
        L::and(if word < 4 { both } else { L::shr(both, 4) }, L::splat(NIBBLE))
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
        use super::k_types::*;
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
