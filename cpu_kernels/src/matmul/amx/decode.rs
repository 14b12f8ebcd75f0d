//! Weights of 16 interleaved rows as a tile of bf16; `matmul/bf16.rs` says which numbers these are.
//!
//! A vector holds two elements of each of 16 rows, as they lie in a line of the tile: the even ones
//! of a word are an f16 each once their byte is moved up, the odd ones where they are. 4-bit types
//! take about 19 instructions per 128 weights:
//! ```text
//! integer   f16(q − 8) has zeros in its low byte: the high one from a table of 64 (vpermb), whose
//!           index needs no masking, since it repeats after 16
//! weight    integer · step (+ offset)
//! bf16      (weight + 4) >> 3 is vpmulhrsw with 2¹²; then the copies of the sign are taken away
//! ```

use super::super::avx512::Wide;
use super::super::bf16::{self, F16_EXPONENT, middle};
use super::super::packed::{Block, MinKind, Packed};
use super::unit::Weights;
use crate::blocks::{DType, GROUP};
use crate::repack::{ROWS, unpack_row};
use std::arch::asm;
use std::arch::x86_64::*;

type Vectors = Wide<true>;

/// The largest magnitudes of steps and of offsets so far, per row, as bits of f16; where the step
/// is the block's scale, that, not yet times 2¹⁰.
#[derive(Clone, Copy)]
pub(super) struct Largest([__m256i; 2]);

/// Where 4-bit elements lie that are unsigned and need no fifth bit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nibbles {
    /// Nowhere: the type has others.
    None,
    /// From this byte on: low nibbles are the first half of a group, high ones the second.
    Split(usize),
    /// From this byte on: low nibbles are a group, high ones the next.
    Paired(usize),
}

const fn nibbles(dtype: DType) -> Nibbles {
    match dtype {
        DType::Q4_0 => Nibbles::Split(2),
        DType::Q4_1 => Nibbles::Split(4),
        DType::Q4_K => Nibbles::Paired(16),
        _ => Nibbles::None,
    }
}

/// The high bytes of f16(q − 8), four times.
const NIBBLE_LESS_EIGHT: [u8; 64] = {
    const TABLE: [u8; 16] = [
        0xc8, 0xc7, 0xc6, 0xc5, 0xc4, 0xc2, 0xc0, 0xbc, 0x00, 0x3c, 0x40, 0x42, 0x44, 0x45, 0x46,
        0x47,
    ];
    let mut table = [0; 64];
    let mut at = 0;
    while at < table.len() {
        table[at] = TABLE[at % TABLE.len()];
        at += 1;
    }
    table
};

/// Bits of the power of two (of f16, times 2¹⁰ like them) that steps stay below on the fast way.
/// With offsets below 2¹⁵ all weights then are below 2¹⁶: `2¹⁵/m · m + 2¹⁵`, less what 11 bits
/// leave of either.
const fn step_limit<P: Packed>() -> u16 {
    let integer_max = match P::DTYPE {
        DType::Q2_K => 2,
        DType::Q3_K => 4,
        DType::Q4_0 | DType::Q4_1 | DType::Q4_K => 8,
        DType::INT4_128 | DType::INT4_64 | DType::INT4_32 => 8,
        DType::Q5_0 | DType::Q5_1 | DType::Q5_K => 16,
        DType::Q6_K => 32,
        _ => 128_u16,
    };
    let times = if is_plain::<P>() { F16_EXPONENT as u16 } else { 0 };
    (15 + 15 - times - integer_max.ilog2() as u16) << 10
}
const OFFSET_LIMIT: u16 = (15 + 15) << 10;

/// Whether the scale of a block is all that its elements have.
const fn is_plain<P: Packed>() -> bool {
    matches!(P::MIN, MinKind::None) && P::DTYPE.block_elements() == GROUP
}

impl Largest {
    #[inline(always)]
    pub unsafe fn none() -> Largest {
        // SAFETY: the caller has AVX-512.
        Largest(unsafe { [_mm256_setzero_si256(); 2] })
    }

    /// Whether all weights were right on the fast way.
    #[inline(always)]
    pub unsafe fn is_in_range<P: Packed>(self) -> bool {
        // SAFETY: the caller has AVX-512.
        unsafe {
            let steps =
                _mm256_cmpge_epu16_mask(self.0[0], _mm256_set1_epi16(step_limit::<P>() as i16));
            let offsets =
                _mm256_cmpge_epu16_mask(self.0[1], _mm256_set1_epi16(OFFSET_LIMIT as i16));
            steps | offsets == 0
        }
    }
}

/// Steps of [`decode`] between which its caller may do something else.
pub(super) const STEPS: usize = 8;

/// Decodes a group of 32 elements of 16 rows. The result is right if [`Largest::is_in_range`].
/// `between` is called before each of its [`STEPS`], with the step's number.
///
/// # Safety
/// The CPU has AVX-512 with VBMI and FP16; the block and the group exist, and so does the tile.
#[inline(always)]
pub(super) unsafe fn decode<P: Packed>(
    block: Block,
    group: usize,
    tile: *mut Weights,
    largest: &mut Largest,
    mut between: impl FnMut(usize),
) {
    let line = |at: usize| tile.cast::<__m512i>().wrapping_add(at);
    // Written out, not a loop: `between` shall know the step when it is compiled.
    macro_rules! part {
        ($part:literal, $($word:literal)*) => {
            let (step, offset) = factors::<P>(block, group, $part, largest);
            $(
                between($word);
                let [even, odd] = integers::<P>(block, group, $word);
                _mm512_store_si512(line(2 * $word), weight::<P>(even, step, offset));
                _mm512_store_si512(line(2 * $word + 1), weight::<P>(odd, step, offset));
            )*
        };
    }
    // SAFETY: the caller's promises; a tile has 16 lines.
    unsafe {
        if P::HALVES {
            part!(0, 0 1 2 3);
            part!(1, 4 5 6 7);
        } else {
            part!(0, 0 1 2 3 4 5 6 7);
        }
    }
}

/// Weights of two elements of each row as bf16.
#[inline(always)]
unsafe fn weight<P: Packed>(integers: __m512h, step: __m512h, offset: __m512h) -> __m512i {
    // SAFETY: the caller has AVX-512 with FP16.
    unsafe {
        let weight = match P::MIN {
            MinKind::None => _mm512_mul_ph(integers, step),
            _ => _mm512_fmadd_ph(integers, step, offset),
        };
        let shifted = _mm512_mulhrs_epi16(_mm512_castph_si512(weight), _mm512_set1_epi16(1 << 12));
        _mm512_and_si512(shifted, _mm512_set1_epi16(0x8fff_u16 as i16))
    }
}

/// Elements `4·word` and `4·word + 2` of each row, and those after them, less their middle.
#[inline(always)]
unsafe fn integers<P: Packed>(block: Block, group: usize, word: usize) -> [__m512h; 2] {
    // SAFETY: the caller's block and group exist.
    unsafe {
        let (bytes, is_high) = match const { nibbles(P::DTYPE) } {
            Nibbles::None => return integers_of_bytes::<P>(block, group, word),
            Nibbles::Split(offset) => (block.words::<Vectors>(offset, word % 4), word >= 4),
            Nibbles::Paired(offset) => {
                (block.words::<Vectors>(offset, 8 * (group / 2) + word), group % 2 == 1)
            }
        };
        let odd_bytes = odd_bytes();
        let table = _mm512_loadu_si512(NIBBLE_LESS_EIGHT.as_ptr().cast());
        let look_up = |index: __m512i| {
            _mm512_castsi512_ph(_mm512_maskz_permutexvar_epi8(odd_bytes, index, table))
        };
        if is_high {
            [look_up(_mm512_slli_epi16::<4>(bytes)), look_up(_mm512_srli_epi16::<4>(bytes))]
        } else {
            [look_up(_mm512_slli_epi16::<8>(bytes)), look_up(bytes)]
        }
    }
}

/// The mask of odd bytes. The compiler must not know which it is: it would turn the masked
/// instruction into one without a mask and another that clears bytes.
#[inline(always)]
fn odd_bytes() -> __mmask64 {
    let mut mask: __mmask64 = 0xaaaa_aaaa_aaaa_aaaa;
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {0} */", inout(reg) mask, options(pure, nomem, nostack, preserves_flags)) };
    mask
}

/// The same for whole bytes: 0x6400 | b is the f16 of 1024 + b.
#[inline(always)]
unsafe fn integers_of_bytes<P: Packed>(block: Block, group: usize, word: usize) -> [__m512h; 2] {
    // A flipped top bit adds 128 to a signed byte.
    let (magic, zero) = if P::SIGNED { (0x6480, 128) } else { (0x6400, P::ZERO) };
    // SAFETY: the caller's block and group exist.
    unsafe {
        let bytes = P::quants::<Vectors>(block, group, word);
        let magic = _mm512_set1_epi16(magic);
        // magic ^ (bytes & low)
        let low = _mm512_set1_epi16(0xff);
        let even = _mm512_ternarylogic_epi32::<0b0111_1000>(magic, bytes, low);
        let odd = _mm512_xor_si512(_mm512_srli_epi16::<8>(bytes), magic);
        // Whole numbers below 2048 are f16 bits less 0x6400.
        let excess = const { 0x6400 + middle(P::DTYPE) };
        let excess = _mm512_castsi512_ph(_mm512_set1_epi16(excess + zero));
        [even, odd].map(|sum| _mm512_sub_ph(_mm512_castsi512_ph(sum), excess))
    }
}

/// Step and offset of a group or a half of it, times 2¹⁰, twice per row.
#[inline(always)]
unsafe fn factors<P: Packed>(
    block: Block,
    group: usize,
    half: usize,
    largest: &mut Largest,
) -> (__m512h, __m512h) {
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    // SAFETY: the caller's block and group exist.
    unsafe {
        if const { is_plain::<P>() } {
            return plain_factors(block, largest);
        }
        let factor = _mm512_set1_ps(const { (1 << F16_EXPONENT) as f32 });
        let mut to_f16 = |value: __m512, kind: usize| {
            let halves = _mm512_cvtps_ph::<NEAREST>(_mm512_mul_ps(value, factor));
            let magnitude = _mm256_and_si256(halves, _mm256_set1_epi16(0x7fff));
            largest.0[kind] = _mm256_max_epu16(largest.0[kind], magnitude);
            twice(halves)
        };
        let scale = P::scale::<Vectors>(block, group, half);
        let step = to_f16(scale, 0);
        let min = match P::MIN {
            MinKind::None => return (step, step),
            MinKind::One => P::min::<Vectors>(block, group),
            MinKind::Pair => {
                let (mins, scale) = P::min_pair::<Vectors>(block, group);
                let min = match half {
                    0 => _mm512_and_si512(mins, _mm512_set1_epi32(0xffff)),
                    _ => _mm512_srli_epi32::<16>(mins),
                };
                _mm512_mul_ps(scale, _mm512_cvtepi32_ps(min))
            }
        };
        let middle = _mm512_set1_ps(const { middle(P::DTYPE) as f32 });
        (step, to_f16(_mm512_fmadd_ps(scale, middle, min), 1))
    }
}

/// [`factors`] of types whose scale is the f16 that a block begins with: not rounded, since a
/// product with a power of two is exact. One that is no longer finite is beyond the limit.
#[inline(always)]
unsafe fn plain_factors(block: Block, largest: &mut Largest) -> (__m512h, __m512h) {
    // SAFETY: the block begins with 16 scales.
    unsafe {
        let scales = _mm256_loadu_si256(block.bytes.cast());
        let magnitude = _mm256_and_si256(scales, _mm256_set1_epi16(0x7fff));
        largest.0[0] = _mm256_max_epu16(largest.0[0], magnitude);
        let factor = _mm512_set1_epi16(const { (15 + F16_EXPONENT as i16) << 10 });
        let step = _mm512_mul_ph(twice(scales), _mm512_castsi512_ph(factor));
        (step, step)
    }
}

#[inline(always)]
unsafe fn twice(halves: __m256i) -> __m512h {
    // SAFETY: the caller has AVX-512 BW.
    unsafe {
        let twice = _mm512_loadu_si512(TWICE.as_ptr().cast());
        let pairs = _mm512_permutexvar_epi16(twice, _mm512_castsi256_si512(halves));
        _mm512_castsi512_ph(pairs)
    }
}

/// Each of 16 halves of a vector twice.
const TWICE: [u16; 32] = {
    let mut twice = [0; 32];
    let mut at = 0;
    while at < twice.len() {
        twice[at] = at as u16 / 2;
        at += 1;
    }
    twice
};

/// [`decode`] for weights of any size, one by one.
///
/// # Safety
/// 16 blocks of `dtype` lie at `packed`; the tile exists.
#[cold]
#[inline(never)]
pub(super) unsafe fn decode_any(dtype: DType, packed: *const u8, group: usize, tile: *mut Weights) {
    let mut block = [0; 256];
    let block = &mut block[..dtype.block_bytes()];
    // SAFETY: the caller's promises.
    let (packed, tile) =
        unsafe { (std::slice::from_raw_parts(packed, ROWS * block.len()), &mut *tile) };
    for row in 0..ROWS {
        unpack_row(dtype, packed, row, block);
        let weights = bf16::weights(dtype, block, group);
        for place in 0..GROUP {
            tile.0[place / 2][2 * row + place % 2] = weights.0[place];
        }
    }
}
