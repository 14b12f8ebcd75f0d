//! The decode-once kernel on a unit that multiplies tiles of bytes (AMX): 16 rows of weights times
//! up to 16 columns, 32 elements deep, in one instruction.
//!
//! ```text
//! for each 16 columns, for each vector of 16 rows:            16 sums in registers
//!   for each group of the chunk:
//!     products of group + 2  →  memory                        the tile unit
//!     load, scale, add the products of this group             the vector unit
//! ```
//! Decoded words are what the unit wants as they lie: row *w* of its second operand holds elements
//! `4w .. 4w + 4` of each of 16 rows. Scales change from group to group, so products leave the unit
//! after each group, and the two units work side by side, two groups apart: that is how long a
//! product takes to arrive. The sums are those of `scalar.rs`, in the same order.

use super::OutputColumns;
use super::columns::{Column, sums};
use super::interleaved::stream_lines;
use super::lanes::Lanes;
use super::packed::{MinKind, Packed};
use super::sums::{row_lanes, store_sums};
use super::wide::{Group, Panel, Scratch};
use crate::blocks::GROUP;
use crate::repack::ROWS;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Columns of a tile.
pub(super) const TILE_COLUMNS: usize = 16;
/// Groups that the tile unit is ahead.
const AHEAD: usize = 2;
/// Products that exist at a time: one more than are under way, rounded up to a power of two.
const SLOTS: usize = 4;

/// Products of one vector of rows with the columns of a tile, `[column][row]`; of a half group each
/// where halves have scales.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Products([[[i32; ROWS]; TILE_COLUMNS]; 2]);

/// The products that exist at a time, one group's per slot.
pub(super) type Slots = [MaybeUninit<Products>; SLOTS];

pub(super) const fn no_products() -> Slots {
    [const { MaybeUninit::uninit() }; SLOTS]
}

/// Makes all products readable, also those of columns that a tile does not have.
pub(super) fn clear(slots: &mut Slots) {
    slots.fill(MaybeUninit::new(Products([[[0; ROWS]; TILE_COLUMNS]; 2])));
}

/// A unit for products of tiles, or none.
///
/// # Safety
/// The CPU has the unit and the operating system lets this process use it. Only between `configure`
/// and `release` may products be made, on the same thread.
pub(super) trait TileUnit: Copy {
    /// Whether there is one.
    const EXISTS: bool;

    /// Prepares products of `depth` (16 or 32) elements with 16 columns, or with `rest` columns.
    unsafe fn configure(depth: usize, rest: usize);
    /// Gives the unit's registers up: the system then need not save them.
    unsafe fn release();
    /// `out[column][row] = Σ words[..][row] · x[column][..]`, exactly. `words` are `depth / 4`
    /// vectors of signed bytes for 16 rows; columns of `x` lie `stride` bytes apart.
    unsafe fn product(
        words: *const u8,
        x: (*const i8, usize),
        shape: (usize, usize),
        out: *mut [[i32; ROWS]; TILE_COLUMNS],
    );
}

/// No unit.
#[derive(Clone, Copy)]
pub(super) struct NoTiles;

impl TileUnit for NoTiles {
    const EXISTS: bool = false;

    unsafe fn configure(_depth: usize, _rest: usize) {}
    unsafe fn release() {}
    unsafe fn product(
        _words: *const u8,
        _x: (*const i8, usize),
        _shape: (usize, usize),
        _out: *mut [[i32; ROWS]; TILE_COLUMNS],
    ) {
    }
}

/// Elements of one product: a group, or the half of it that has a scale of its own.
pub(super) const fn depth<P: Packed>() -> usize {
    if P::HALVES { GROUP / 2 } else { GROUP }
}

/// The columns of `panel` against its decoded chunk.
///
/// # Safety
/// As `wide::all_columns`; the unit is configured for [`depth`] and the columns modulo 16.
#[inline(always)]
pub(super) unsafe fn all_columns<L: Lanes, P: Packed, const R: usize>(
    panel: &Panel<'_, R>,
    scratch: &mut Scratch<L>,
    rows: (usize, &Range<usize>),
    out: OutputColumns<'_>,
) {
    let (mut first, end) = panel.columns;
    while first < end {
        let columns = TILE_COLUMNS.min(end - first);
        for vector in 0..R {
            let tile = (first, columns);
            // SAFETY: passed on; the columns and the vector exist.
            unsafe {
                match columns {
                    TILE_COLUMNS => {
                        columns_of::<L, P, R, 16, true>(panel, scratch, (vector, tile), rows, out);
                    }
                    ..=8 => {
                        columns_of::<L, P, R, 8, false>(panel, scratch, (vector, tile), rows, out);
                    }
                    _ => {
                        columns_of::<L, P, R, 16, false>(panel, scratch, (vector, tile), rows, out);
                    }
                }
            }
        }
        first += columns;
    }
}

/// The columns of a tile that meet a vector of rows: where their first group is, and how far apart
/// they are.
#[derive(Clone, Copy)]
struct TileOfX {
    first: Column,
    groups_apart: usize,
    columns: usize,
}

impl TileOfX {
    /// Column `c`; the last one again where there are fewer, which `FULL` says is not so.
    #[inline(always)]
    fn column<const FULL: bool>(&self, c: usize) -> Column {
        let c = if FULL { c } else { c.min(self.columns - 1) };
        let groups = c * self.groups_apart;
        (self.first.0.wrapping_add(groups * GROUP), self.first.1.wrapping_add(groups))
    }
}

/// `columns ≤ T` columns from `first` on against one vector of rows. Past the last column the sums
/// are of products that nobody made, and dropped.
#[inline(always)]
unsafe fn columns_of<L: Lanes, P: Packed, const R: usize, const T: usize, const FULL: bool>(
    panel: &Panel<'_, R>,
    scratch: &mut Scratch<L>,
    (vector, (first, columns)): (usize, (usize, usize)),
    (first_row, rows): (usize, &Range<usize>),
    out: OutputColumns<'_>,
) {
    let start = first * panel.x.groups_apart + panel.first_group;
    let first_column = (panel.x.quants[start * GROUP..].as_ptr(), panel.x.scales[start..].as_ptr());
    let columns = if FULL { T } else { columns };
    let x = TileOfX { first: first_column, groups_apart: panel.x.groups_apart, columns };
    let place = first - panel.columns.0;
    let sums = scratch.sums[place..][..columns].as_mut_ptr();
    let weights = scratch.chunk[vector].as_ptr().cast::<Group<L>>();
    let products = scratch.products.as_mut_ptr().cast::<Products>();
    // SAFETY: `x` has `panel.count` groups of existing columns, the chunk holds as many of each
    // vector, `sums` holds `columns` columns, and the rows of the vectors are this thread's.
    unsafe {
        let mut acc = [L::splat_f32(0.0); T];
        if panel.first_group > 0 {
            for (c, acc) in acc.iter_mut().enumerate() {
                if FULL || c < columns {
                    *acc = (*sums.add(c))[vector].assume_init();
                }
            }
        }
        for step in 0..panel.count + AHEAD {
            if step < panel.count {
                let product = products.add(step % SLOTS);
                multiply::<L, P, FULL>(weights.add(step), &x, step, product);
                if first == panel.columns.0 {
                    fetch::<L, P, R>(panel, vector, step);
                }
            }
            if step >= AHEAD {
                let group = step - AHEAD;
                let product = products.add(group % SLOTS);
                add_group::<L, P, T, FULL>(weights.add(group), group, &x, (product, &mut acc));
            }
        }
        if panel.first_group + panel.count < panel.groups {
            for (c, acc) in acc.iter().enumerate() {
                if FULL || c < columns {
                    (*sums.add(c))[vector].write(*acc);
                }
            }
            return;
        }
        let lanes = row_lanes::<L>(rows, first_row + vector * L::LANES);
        store_sums::<L, T>(&acc, (first, columns), lanes, out);
    }
}

/// Asks for what the next chunk takes in place of this group.
#[inline(always)]
unsafe fn fetch<L: Lanes, P: Packed, const R: usize>(
    panel: &Panel<'_, R>,
    vector: usize,
    group: usize,
) {
    let lines = const { stream_lines::<P>() };
    for line in 0..lines {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { L::prefetch(panel.next[vector].wrapping_add(64 * (group * lines + line))) };
    }
}

/// Has the tile unit make the products of one group.
#[inline(always)]
unsafe fn multiply<L: Lanes, P: Packed, const FULL: bool>(
    weights: *const Group<L>,
    x: &TileOfX,
    group: usize,
    products: *mut Products,
) {
    let depth = const { depth::<P>() };
    let columns = if FULL { TILE_COLUMNS } else { x.columns };
    let stride = x.groups_apart * GROUP;
    for part in 0..GROUP / depth {
        // SAFETY: the weights were decoded, and the columns exist; the unit is configured.
        unsafe {
            let words = (&raw const (*weights).words).cast::<L::Int>().add(part * depth / 4);
            let x = (x.first.0.add(group * GROUP + part * depth), stride);
            L::Tiles::product(words.cast(), x, (depth, columns), &raw mut (*products).0[part]);
        }
    }
}

/// One step of the accumulation; the twin of `scalar::accumulate`.
#[inline(always)]
unsafe fn add_group<L: Lanes, P: Packed, const T: usize, const FULL: bool>(
    weights: *const Group<L>,
    group: usize,
    x: &TileOfX,
    (products, acc): (*const Products, &mut [L::Float; T]),
) {
    // SAFETY: the weights were decoded, and `group` is one of the columns'.
    unsafe {
        for part in 0..GROUP / const { depth::<P>() } {
            let scale = (*weights).scales[part];
            for (c, acc) in acc.iter_mut().enumerate() {
                let isum = L::load_words((&raw const (*products).0[part][c]).cast());
                let of_x = x.column::<FULL>(c).1.add(group);
                let scale = L::mul(scale, L::splat_f32((*of_x).scale));
                *acc = L::fma(L::to_f32(isum), scale, *acc);
            }
        }
        if P::MIN == MinKind::None {
            return;
        }
        for (c, acc) in acc.iter_mut().enumerate() {
            let column = x.column::<FULL>(c);
            let of_x = &*column.1.add(group);
            if P::MIN == MinKind::One {
                *acc = L::fma((*weights).min, L::splat_f32(of_x.scaled_sum), *acc);
            } else {
                let sums = L::pair_dot((*weights).min_pair, sums::<L>(column, group));
                let scale = L::mul((*weights).min, L::splat_f32(of_x.scale));
                *acc = L::fma(L::to_f32(sums), scale, *acc);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activations::ActivationBuffer;
    use crate::dispatch::Kernels;
    use crate::isa::Isa;
    use crate::matmul::packed::*;
    use crate::matmul::{Layout, MatrixView, avx512, interleaved};
    use crate::quantize::quantize_row;
    use crate::repack::{packed_bytes, repack_row_group};

    /// A unit made of loops, for CPUs without one.
    #[derive(Clone, Copy)]
    struct Loops;

    impl TileUnit for Loops {
        const EXISTS: bool = true;

        unsafe fn configure(_depth: usize, _rest: usize) {}
        unsafe fn release() {}
        unsafe fn product(
            words: *const u8,
            (x, stride): (*const i8, usize),
            (depth, columns): (usize, usize),
            out: *mut [[i32; ROWS]; TILE_COLUMNS],
        ) {
            for (column, row) in (0..columns).flat_map(|c| (0..ROWS).map(move |row| (c, row))) {
                let (word, byte) = (k_words(row), |k: usize| column * stride + k);
                // SAFETY: the promises of the trait.
                unsafe {
                    let product = |k: usize| {
                        let weight = words.add(word(k)).cast::<i8>().read();
                        i32::from(weight) * i32::from(x.add(byte(k)).read())
                    };
                    (*out)[column][row] = (0..depth).map(product).sum();
                }
            }
        }
    }

    /// Where element `k` of a row is in the words.
    fn k_words(row: usize) -> impl Fn(usize) -> usize {
        move |k| 64 * (k / 4) + 4 * row + k % 4
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn with_loops<P: Packed>(
        weights: &MatrixView<'_>,
        x: &crate::activations::Activations<'_>,
        rows: Range<usize>,
        out: OutputColumns<'_>,
    ) {
        // SAFETY: the caller checked the CPU and the shapes.
        unsafe { interleaved::matmul::<avx512::Wide<true, Loops>, P>(weights, x, rows, out) }
    }

    /// Numbers in ±1 that look random.
    fn noise(count: usize, seed: u32) -> Vec<f32> {
        let next = |state: &mut u32| {
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            Some((*state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        std::iter::repeat_n((), count).scan(seed, |state, ()| next(state)).collect()
    }

    fn equals_the_specification<P: Packed>((rows, cols, columns): (usize, usize, usize)) {
        let dtype = P::DTYPE;
        let row_bytes = dtype.row_bytes(cols).unwrap();
        let mut file = vec![0; rows.next_multiple_of(ROWS) * row_bytes];
        for (row, bytes) in file.chunks_exact_mut(row_bytes).take(rows).enumerate() {
            quantize_row(dtype, &noise(cols, row as u32), bytes);
        }
        let mut packed = vec![0; packed_bytes(dtype, Layout::Rows16, rows, cols).unwrap()];
        let groups = packed.chunks_exact_mut(ROWS * row_bytes);
        for (source, target) in file.chunks_exact(ROWS * row_bytes).zip(groups) {
            repack_row_group(dtype, cols, source, target);
        }
        let weights = MatrixView::new(dtype, Layout::Rows16, rows, cols, &packed).unwrap();
        let values = noise(columns * cols, 77);
        let kernels = Kernels::for_isa(Isa::Avx512Vnni).unwrap();
        let mut buffer = ActivationBuffer::new(columns, cols);
        // SAFETY: this thread alone fills it, before it is viewed.
        let target = unsafe { buffer.writer(columns, cols) };
        for (column, values) in values.chunks_exact(cols).enumerate() {
            kernels.quantize_activations(values, target, column, 0..cols);
        }
        let x = target.view(&values);
        let (mut got, mut wanted) = (vec![0.0; columns * rows], vec![0.0; columns * rows]);
        // SAFETY: outputs of the size named; the CPU was checked.
        unsafe {
            let out = OutputColumns::new(got.as_mut_ptr(), columns, rows);
            with_loops::<P>(&weights, &x, 0..rows, out);
            let out = OutputColumns::new(wanted.as_mut_ptr(), columns, rows);
            Kernels::for_isa(Isa::Scalar).unwrap().matmul(&weights, &x, 0..rows, out);
        }
        assert_eq!(got, wanted, "{dtype} [{rows}, {cols}] with {columns} columns");
    }

    #[test]
    fn tiles_of_any_unit_give_the_bits_of_the_specification() {
        if !Isa::Avx512Vnni.is_available() {
            println!("skipped: this CPU has no AVX-512 with VNNI");
            return;
        }
        for shape in [(16, 256, 17), (33, 768, 24), (50, 1280, 40), (32, 512, 129), (7, 512, 31)] {
            equals_the_specification::<Q4_0>(shape);
            equals_the_specification::<Q4_1>(shape);
            equals_the_specification::<Q5_0>(shape);
            equals_the_specification::<Q8_0>(shape);
            equals_the_specification::<Q2K>(shape);
            equals_the_specification::<Q3K>(shape);
            equals_the_specification::<Q4K>(shape);
            equals_the_specification::<Q6K>(shape);
            equals_the_specification::<Iq4Xs>(shape);
        }
    }
}
