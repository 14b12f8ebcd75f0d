//! The quantised kernel for many columns: weights are decoded once into a buffer in the first-level
//! cache, and every tile of columns reads them there.
//!
//! ```text
//! for each R vectors of rows (32 rows with AVX-512), for each 256 columns:
//!   for each chunk of up to 512 elements (1,536 of `Q4_K` on Zen 4), all of about one length:
//!     decode R × 16 groups of 32 into bytes, scales and offsets             (26 KB)
//!     for each tile of T columns:                 R·T sums in registers
//!       for each group, for each of 8 words:
//!         R weight vectors, T broadcast words, R·T dot products
//!       R·T times: scale, add to the sums, which wait in a buffer between chunks     (32 KB)
//! ```
//! A broadcast word serves R products and a weight vector T of them, so that with R = 2, T = 6 the
//! 8 loads of a word take less time than its 12 products. A lane does what `scalar.rs` does.

use super::columns::{Column, less_sums, start};
use super::fetch::stream_lines;
use super::lanes::Lanes;
use super::packed::{Block, MinKind, Packed, SixBits};
use super::sums::{row_lanes, store_sums};
use super::{Layout, MatrixView, OutputColumns};
use crate::activations::Quantized;
use crate::blocks::GROUP;
use crate::isa::follows_streams;
use crate::repack::ROWS;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Groups of a chunk: 512 elements, two blocks of the K types, stay in the first-level cache.
const CHUNK_GROUPS: usize = 16;
/// The same in the second-level one ([`Packed::LONG_CHUNKS`]).
const LONG_CHUNK_GROUPS: usize = 48;
/// Row vectors that are decoded together.
const VECTORS: usize = 2;
/// A group of 32 elements of one vector of rows, decoded.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Group<L: Lanes> {
    /// 4 elements of each row per word.
    words: [L::Int; 8],
    /// Of the group, or of its halves.
    scales: [L::Float; 2],
    /// Offset, or minus the scale of the offset pair.
    min: L::Float,
    /// Integer offsets of the halves.
    min_pair: L::Int,
}

/// Columns whose sums wait together; in the output they may lie pages apart. They need not be near:
/// a tile meets its own once a chunk. 128, which need half of the memory, decode twice as often and
/// took a prompt of 256 tokens 1.6 % longer.
const COLUMNS: usize = 256;

/// What waits between tiles and between chunks.
struct Scratch<L: Lanes> {
    /// The decoded chunk of each row vector.
    chunk: [[MaybeUninit<Group<L>>; LONG_CHUNK_GROUPS]; VECTORS],
    /// The sums of each column and row vector.
    sums: [[MaybeUninit<L::Float>; VECTORS]; COLUMNS],
}

/// What a tile of columns meets: groups `first_group ..` of a row of `groups`.
#[derive(Clone, Copy)]
struct Panel<'a, const R: usize> {
    x: Quantized<'a>,
    /// Whose sums are in the buffer.
    columns: (usize, usize),
    groups: usize,
    first_group: usize,
    count: usize,
    /// The chunk that is decoded next: fetched while the first tile computes, a little per group,
    /// since a burst would fill the queue of outstanding misses.
    next: [*const u8; R],
}

/// The kernel; see the module.
///
/// # Safety
/// The CPU has the instruction set of `L`; shapes were checked by `Kernels::matmul`; `weights` are
/// of type `P` in [`Layout::Rows16`].
#[inline(always)]
pub(super) unsafe fn matmul<L: Lanes, P: Packed>(
    weights: &MatrixView<'_>,
    x: Quantized<'_>,
    rows: Range<usize>,
    out: OutputColumns<'_>,
) {
    debug_assert!(weights.layout() == Layout::Rows16);
    let height = const { VECTORS * L::LANES };
    let mut scratch = Scratch::<L> {
        chunk: [[const { MaybeUninit::uninit() }; LONG_CHUNK_GROUPS]; VECTORS],
        sums: [[const { MaybeUninit::uninit() }; VECTORS]; COLUMNS],
    };
    let mut first_row = rows.start / ROWS * ROWS;
    while first_row < rows.end {
        let vectors = (rows.end - first_row).div_ceil(L::LANES).min(VECTORS);
        let covered = rows.start.max(first_row)..rows.end.min(first_row + height);
        let mut column = 0;
        while column < out.columns() {
            let columns = (column, out.columns().min(column + COLUMNS));
            let rows = (first_row, covered.clone());
            // SAFETY: our own contract; the rows begin a vector and exist.
            unsafe {
                match vectors {
                    VECTORS => {
                        block::<L, P, VECTORS>((weights, x), rows, columns, &mut scratch, out)
                    }
                    _ => block::<L, P, 1>((weights, x), rows, columns, &mut scratch, out),
                }
            }
            column = columns.1;
        }
        first_row += vectors * L::LANES;
    }
}

/// Some columns against `R` vectors of rows.
#[inline(always)]
unsafe fn block<L: Lanes, P: Packed, const R: usize>(
    (weights, x): (&MatrixView<'_>, Quantized<'_>),
    (first_row, covered): (usize, Range<usize>),
    columns: (usize, usize),
    scratch: &mut Scratch<L>,
    out: OutputColumns<'_>,
) {
    let block_groups = const { P::DTYPE.block_elements() / GROUP };
    let blocks = weights.cols() / P::DTYPE.block_elements();
    let group_bytes = ROWS * blocks * P::DTYPE.block_bytes();
    // Of equal length: each asks for as much as it has of the one that follows.
    let is_long = P::LONG_CHUNKS && L::LANES == ROWS && follows_streams();
    let chunk_groups = if is_long { LONG_CHUNK_GROUPS } else { CHUNK_GROUPS };
    let chunks = blocks.div_ceil(chunk_groups / block_groups).max(1);
    let chunk_blocks = blocks.div_ceil(chunks);
    let block_bytes = const { ROWS * P::DTYPE.block_bytes() };
    let at = |row: usize, block: usize| {
        let first = row / ROWS * group_bytes + block * block_bytes;
        weights.bytes().as_ptr().wrapping_add(first)
    };
    let mut start = 0;
    while start < blocks {
        let count = chunk_blocks.min(blocks - start);
        let mut next = [std::ptr::null(); R];
        for (vector, next) in next.iter_mut().enumerate() {
            let row = first_row + vector * L::LANES;
            let bytes = at(row, start);
            let block = Block { bytes, lane: row % ROWS, six_bits: std::ptr::null() };
            // SAFETY: `count` packed blocks lie there; the chunk has room for their groups.
            unsafe { decode::<L, P>(block, count, &mut scratch.chunk[vector]) };
            *next = match start + count {
                end if end < blocks => at(row, end),
                _ => at(row + R * L::LANES, 0),
            };
        }
        let panel = Panel {
            x,
            columns,
            groups: blocks * block_groups,
            first_group: start * block_groups,
            count: count * block_groups,
            next,
        };
        // SAFETY: the first `count` groups of `R` vectors were just decoded.
        unsafe { all_columns::<L, P, R>(&panel, scratch, (first_row, &covered), out) };
        start += count;
    }
}

/// Decodes the groups of `count` packed blocks for one vector of rows.
#[inline(always)]
unsafe fn decode<L: Lanes, P: Packed>(
    first: Block,
    count: usize,
    decoded: &mut [MaybeUninit<Group<L>>; LONG_CHUNK_GROUPS],
) {
    let groups = const { P::DTYPE.block_elements() / GROUP };
    let size = const { ROWS * P::DTYPE.block_bytes() };
    for index in 0..count {
        let bytes = first.bytes.wrapping_add(index * size);
        let mut six_bits = MaybeUninit::uninit();
        if P::SIX_BITS {
            // SAFETY: the block exists, of a type with 6-bit integers.
            unsafe { SixBits::unpack(bytes, &mut six_bits) };
        }
        let block = Block { bytes, lane: first.lane, six_bits: six_bits.as_ptr() };
        for group in 0..groups {
            let target = decoded[index * groups + group].as_mut_ptr();
            // SAFETY: the block and the group exist, and so does the target.
            unsafe { decode_group::<L, P>(block, group, target) };
        }
    }
}

/// Writes the fields that the type has.
#[inline(always)]
unsafe fn decode_group<L: Lanes, P: Packed>(block: Block, group: usize, target: *mut Group<L>) {
    // SAFETY: the caller's block, group and target exist.
    unsafe {
        let words = (&raw mut (*target).words).cast::<L::Int>();
        for word in 0..8 {
            words.add(word).write(P::quants::<L>(block, group, word));
        }
        let scales = (&raw mut (*target).scales).cast::<L::Float>();
        for half in 0..if P::HALVES { 2 } else { 1 } {
            scales.add(half).write(P::scale::<L>(block, group, half));
        }
        match P::MIN {
            MinKind::None => {}
            MinKind::One => (&raw mut (*target).min).write(P::min::<L>(block, group)),
            MinKind::Pair => {
                let (pair, scale) = P::min_pair::<L>(block, group);
                (&raw mut (*target).min_pair).write(pair);
                (&raw mut (*target).min).write(L::neg(scale));
            }
        }
    }
}

/// Tiles of 6 and 4 columns, so that few results are dropped.
#[inline(always)]
unsafe fn all_columns<L: Lanes, P: Packed, const R: usize>(
    panel: &Panel<'_, R>,
    scratch: &mut Scratch<L>,
    rows: (usize, &Range<usize>),
    out: OutputColumns<'_>,
) {
    let (mut column, end) = panel.columns;
    while column < end {
        let left = end - column;
        // SAFETY: passed on; the tile starts at an existing column.
        unsafe {
            column += match (L::LANES, left) {
                (8, _) => tile::<L, P, R, 2>(panel, scratch, (column, left), rows, out),
                (_, ..=4 | 7 | 8) => tile::<L, P, R, 4>(panel, scratch, (column, left), rows, out),
                _ => tile::<L, P, R, 6>(panel, scratch, (column, left), rows, out),
            };
        }
    }
}

/// Up to `T` of the `left` columns from `first` on; past the last one a tile repeats it and drops
/// the results. Returns how many columns it did.
#[inline(always)]
unsafe fn tile<L: Lanes, P: Packed, const R: usize, const T: usize>(
    panel: &Panel<'_, R>,
    scratch: &mut Scratch<L>,
    (first, left): (usize, usize),
    (first_row, rows): (usize, &Range<usize>),
    out: OutputColumns<'_>,
) -> usize {
    let columns = T.min(left);
    let lines = const { stream_lines::<P>() };
    let mut x = [Column::NONE; T];
    for (index, x) in x.iter_mut().enumerate() {
        *x = Column::new(&panel.x, first + index.min(columns - 1), panel.first_group);
    }
    // SAFETY: `x` points to `panel.count` groups of existing columns, the chunk holds as many of
    // each vector, and the rows of the vectors are this thread's.
    unsafe {
        let mut acc = [[L::splat_f32(0.0); T]; R];
        let sums = &mut scratch.sums[first - panel.columns.0..][..columns];
        if panel.first_group > 0 {
            for (c, sums) in sums.iter().enumerate() {
                acc.iter_mut().zip(sums).for_each(|(acc, sum)| acc[c] = sum.assume_init());
            }
        }
        for group in 0..panel.count {
            let mut weights = [std::ptr::null(); R];
            for (vector, weights) in weights.iter_mut().enumerate() {
                *weights = scratch.chunk[vector][group].as_ptr();
                for line in 0..if first == panel.columns.0 { lines } else { 0 } {
                    L::prefetch_second(
                        panel.next[vector].wrapping_add(64 * (group * lines + line)),
                    );
                }
            }
            add_group::<L, P, R, T>(&weights, group, &x, &mut acc);
        }
        if panel.first_group + panel.count < panel.groups {
            for (c, sums) in sums.iter_mut().enumerate() {
                acc.iter().zip(sums).for_each(|(acc, sum)| {
                    sum.write(acc[c]);
                });
            }
            return columns;
        }
        for (vector, acc) in acc.iter().enumerate() {
            let lanes = row_lanes::<L>(rows, first_row + vector * L::LANES);
            store_sums::<L, T>(acc, (first, columns), lanes, out);
        }
    }
    columns
}

/// One step of the accumulation; the twin of `scalar::accumulate`.
#[inline(always)]
unsafe fn add_group<L: Lanes, P: Packed, const R: usize, const T: usize>(
    weights: &[*const Group<L>; R],
    group: usize,
    x: &[Column; T],
    acc: &mut [[L::Float; T]; R],
) {
    // SAFETY: the weights were decoded, and `group` is one of the columns'.
    unsafe {
        let parts = if P::HALVES { 2 } else { 1 };
        for half in 0..parts {
            let mut isum = [[L::splat(0); T]; R];
            for c in 0..T {
                let start = start::<L, P>(half, x[c], group);
                isum.iter_mut().for_each(|isum| isum[c] = start);
            }
            let words = 8 / parts;
            for word in half * words..(half + 1) * words {
                dot_word::<L, P, R, T>(weights, (group, word), x, &mut isum);
            }
            for c in 0..T {
                let x_scale = L::splat_f32((*x[c].scales.add(group)).scale);
                for r in 0..R {
                    let scale = L::mul((*weights[r]).scales[half], x_scale);
                    acc[r][c] = L::fma(L::to_f32(isum[r][c]), scale, acc[r][c]);
                }
            }
        }
        add_min::<L, P, R, T>(weights, group, x, acc);
    }
}

/// Four elements of each row times the same four of each column.
#[inline(always)]
unsafe fn dot_word<L: Lanes, P: Packed, const R: usize, const T: usize>(
    weights: &[*const Group<L>; R],
    (group, word): (usize, usize),
    x: &[Column; T],
    isum: &mut [[L::Int; T]; R],
) {
    // SAFETY: the weights were decoded, and `group` is one of the columns'.
    unsafe {
        for c in 0..T {
            let at = x[c].quants.add(group * GROUP + 4 * word).cast::<i32>();
            let x = L::splat(at.read_unaligned());
            for r in 0..R {
                let w = (*weights[r]).words[word];
                isum[r][c] = if P::SIGNED {
                    L::dot_signed(isum[r][c], L::signed(w), x)
                } else {
                    L::dot_unsigned(isum[r][c], w, x)
                };
            }
        }
    }
}

#[inline(always)]
unsafe fn add_min<L: Lanes, P: Packed, const R: usize, const T: usize>(
    weights: &[*const Group<L>; R],
    group: usize,
    x: &[Column; T],
    acc: &mut [[L::Float; T]; R],
) {
    // SAFETY: the weights were decoded, and `group` is one of the columns'.
    unsafe {
        for c in 0..T {
            let of_x = &*x[c].scales.add(group);
            match P::MIN {
                MinKind::None => {}
                MinKind::One => {
                    let sum = L::splat_f32(of_x.scaled_sum);
                    for r in 0..R {
                        acc[r][c] = L::fma((*weights[r]).min, sum, acc[r][c]);
                    }
                }
                MinKind::Pair => {
                    let (sums, x_scale) = (less_sums::<L>(x[c], group), L::splat_f32(of_x.scale));
                    for r in 0..R {
                        let sums = L::pair_dot((*weights[r]).min_pair, sums);
                        let scale = L::mul((*weights[r]).min, x_scale);
                        acc[r][c] = L::fma(L::to_f32(sums), scale, acc[r][c]);
                    }
                }
            }
        }
    }
}
