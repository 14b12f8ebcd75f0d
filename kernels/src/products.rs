//! Products of weights with the activations of some tokens.
//!
//! Up to [`NARROW_MAX`] tokens reading the weights takes longest (`narrow.cu`): quantised weights
//! meet activations in 8 bits with a scale per 32 elements, as on the CPU. The integer sums are the
//! same, and only the order in which groups are added up differs; floats meet floats (`floats.cu`).
//! A token's product has the same bits in any batch of up to [`SAME_SUMS_MAX`], and in any of
//! more. For more tokens the arithmetic takes longest (`wide.cu`): weights of any type and activations
//! meet as f16, with sums in f32, and the same bits in any batch of so many.
//!
//! Activations have their elements in orders that tensor cores take without a shuffle. In 8 bits
//! byte `16 t + 8 g + 4 h + e` of a pair of groups of 32 is element `16 h + 4 t + e` of group g; the
//! order as f16 is told in `halves.cuh`.

use crate::gpu::{Gpu, GpuError, Span};
use crate::pack::{DeviceMatrix, Planes, lane_bytes};
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::DType;
use tandem_cpu_kernels::blocks::GROUP;

/// Most tokens of a product that meets activations in 8 bits.
pub const NARROW_MAX: usize = 128;
/// Most of them whose order of sums is that of one token.
pub const SAME_SUMS_MAX: usize = 32;
/// Warps of a block of the kernels for few tokens.
const NARROW_WARPS: usize = 8;
/// Groups that rows and columns are filled up to multiples of.
pub(crate) const CHUNK: usize = 4;
/// Shared memory of the wide kernel for each column of a tile of activations.
const WIDE_COLUMN_BYTES: usize = 128;
/// What its first tile's start may be moved by, and its barriers.
const WIDE_EXTRA_BYTES: usize = 1024 + 128;
/// Blocks of the wide kernel where it has wgmma, and elsewhere (`wide.cu`).
const WGMMA_TILES: [WideTile; 3] = [
    WideTile { rows: 128, columns: 256, threads: 384, copies: 6, cost: 48 },
    WideTile { rows: 192, columns: 128, threads: 512, copies: 6, cost: 40 },
    WideTile { rows: 128, columns: 128, threads: 384, copies: 6, cost: 30 },
];
const MMA_TILES: [WideTile; 2] = [
    WideTile { rows: 128, columns: 128, threads: 256, copies: 2, cost: 18 },
    WideTile { rows: 128, columns: 64, threads: 256, copies: 2, cost: 10 },
];
const FLOAT_WARPS: usize = 4;
/// Matrices that one launch can multiply.
const PARTS: usize = 3;
/// Bytes of a group's scale and sums.
const SCALE_BYTES: usize = 8;

/// Activations of some tokens, `[columns, cols]`.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a> {
    /// Tokens.
    pub columns: usize,
    /// Elements of a token.
    pub cols: usize,
    /// `[columns, cols]` f32, for float weights.
    pub values: Option<Span<'a>>,
    /// The 8-bit form, for quantised weights.
    pub eight_bits: Option<EightBits<'a>>,
    /// `[columns, cols]` f16, in the order of `halves.cuh` and filled up to multiples of 128
    /// elements: a sixteenth of the values. Where it is given, weights of all types are multiplied
    /// with it, by the wide kernel.
    pub halves: Option<Span<'a>>,
}

/// Bytes of [`Columns::halves`].
pub fn half_bytes(columns: usize, cols: usize) -> usize {
    columns * cols.next_multiple_of(CHUNK * GROUP) * size_of::<u16>()
}

/// The 8-bit form of `[rows, cols]` activations, in chunks of 128 elements: `[passes, chunks,
/// stride]`, where stride is [`EightBits::stride`] of the rows.
#[derive(Clone, Copy, Debug)]
pub struct EightBits<'a> {
    /// 128 i8 of a row's chunk.
    pub quants: Span<'a>,
    /// Four times f32 scale, whose last two bits are zero, and i16 sums of the halves.
    pub scales: Span<'a>,
    /// 2 where what 8 bits miss of values is rounded and multiplied in turn, else 1.
    pub passes: usize,
}

/// `out = matrix · x (+ bias)`
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// `[rows, cols]`
    pub matrix: &'a DeviceMatrix,
    /// `[rows]` f32
    pub bias: Option<Span<'a>>,
    /// f32; token t's product starts at element `t · stride`.
    pub out: Span<'a>,
    /// Elements from one token's product to the next's.
    pub stride: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Part {
    planes: Planes,
    bias: u64,
    out: u64,
    rows: u32,
    stride: u32,
    first_block: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ProductArgs {
    parts: [Part; PARTS],
    quants: u64,
    scales: u64,
    n_parts: u32,
    groups: u32,
    padded: u32,
    columns: u32,
    stride: u32,
    passes: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct WideArgs {
    parts: [Part; PARTS],
    x: u64,
    n_parts: u32,
    groups: u32,
    padded: u32,
    columns: u32,
    cols: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FloatArgs {
    weights: u64,
    x: u64,
    bias: u64,
    out: u64,
    rows: u32,
    cols: u32,
    columns: u32,
    stride: u32,
}

// SAFETY: plain numbers in the order of `ProductArgs` in products.cuh.
unsafe impl DeviceRepr for ProductArgs {}
// SAFETY: plain numbers in the order of `WideArgs` in wide.cuh.
unsafe impl DeviceRepr for WideArgs {}
// SAFETY: plain numbers in the order of `FloatArgs` in floats.cu.
unsafe impl DeviceRepr for FloatArgs {}

/// A kernel for few tokens.
struct NarrowKernel {
    /// Tiles of eight columns; 0 for a single column.
    tiles: usize,
    /// Columns of a block.
    columns: usize,
    /// Rows of a block.
    rows: usize,
    /// Shared memory of a block.
    shared: usize,
}

impl NarrowKernel {
    /// The widest that products with some columns fill and whose blocks have the shared memory.
    fn of(dtype: DType, columns: usize, shared_bytes: usize) -> NarrowKernel {
        let wanted = match columns {
            0 | 1 => 0,
            2..=8 => 1,
            9..=16 => 2,
            17..=SAME_SUMS_MAX => 4,
            _ => 8,
        };
        let narrower = [8, 4, 2, 1].into_iter().filter(|tiles| *tiles <= wanted);
        let fits = |kernel: &NarrowKernel| kernel.shared <= shared_bytes;
        let widest = narrower.map(|tiles| NarrowKernel::with_tiles(dtype, tiles)).find(fits);
        widest.unwrap_or_else(|| NarrowKernel::with_tiles(dtype, 0))
    }

    /// Rows, ranges and depth as in narrow.cu.
    fn with_tiles(dtype: DType, tiles: usize) -> NarrowKernel {
        let lane = lane_bytes(dtype);
        let (rows, ranges, depth) = match tiles {
            0 => (16, 8, if lane > 16 { 3 } else { 4 }),
            8 => (64, 4, 3),
            _ => (32, 8, 3),
        };
        let columns = (8 * tiles).max(1);
        // Of one chunk: each lane has some rows, each range all columns.
        let weights = 32 * rows * ranges / 8 * lane;
        let activations = ranges * columns * CHUNK * (GROUP + SCALE_BYTES);
        NarrowKernel { tiles, columns, rows, shared: depth * (weights + activations) }
    }
}

impl EightBits<'_> {
    /// Rows that there is room for where there are `rows`: whole tiles of the kernels.
    pub fn stride(rows: usize) -> usize {
        rows.next_multiple_of(if rows <= 16 { 8 } else { 64 })
    }

    /// Chunks of all rows and passes.
    fn chunks(rows: usize, cols: usize, passes: usize) -> usize {
        passes * Self::stride(rows) * cols.div_ceil(CHUNK * GROUP)
    }

    /// Bytes of the integers of `[rows, cols]`.
    pub fn quant_bytes(rows: usize, cols: usize, passes: usize) -> usize {
        Self::chunks(rows, cols, passes) * CHUNK * GROUP
    }

    /// Bytes of the scales of `[rows, cols]`.
    pub fn scale_bytes(rows: usize, cols: usize, passes: usize) -> usize {
        Self::chunks(rows, cols, passes) * CHUNK * SCALE_BYTES
    }

    /// Pointers, where `rows` rows of `cols` are there.
    pub(crate) fn pointers(&self, rows: usize, cols: usize) -> (u64, u64) {
        let (quants, scales) = (
            Self::quant_bytes(rows, cols, self.passes),
            Self::scale_bytes(rows, cols, self.passes),
        );
        (self.quants.of(quants, 1), self.scales.of(scales, 1))
    }
}

impl Gpu {
    /// Several products over the same activations: one launch for each run of matrices of one type.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short, a matrix has other columns, or the activations lack the form that
    /// a matrix's type needs.
    pub fn multiply(&self, products: &[Product<'_>], x: &Columns<'_>) -> Result<(), GpuError> {
        for run in products.chunk_by(|a, b| a.matrix.dtype() == b.matrix.dtype()) {
            for run in run.chunks(PARTS) {
                if let Some(halves) = x.halves {
                    self.multiply_wide(run, x, halves)?;
                } else if run[0].matrix.dtype().is_quantized() {
                    self.multiply_narrow(run, x)?;
                } else {
                    run.iter().try_for_each(|product| self.multiply_floats(product, x))?;
                }
            }
        }
        Ok(())
    }

    fn multiply_narrow(&self, run: &[Product<'_>], x: &Columns<'_>) -> Result<(), GpuError> {
        let eight_bits = x.eight_bits.expect("quantised weights need activations in 8 bits");
        let (quants, scales) = eight_bits.pointers(x.columns, x.cols);
        let dtype = run[0].matrix.dtype();
        let kernel = NarrowKernel::of(dtype, x.columns, self.shared_bytes());
        let (parts, blocks) = parts(run, x, kernel.rows);
        let groups = x.cols / GROUP;
        let arguments = ProductArgs {
            parts,
            quants,
            scales,
            n_parts: run.len() as u32,
            groups: groups as u32,
            padded: groups.next_multiple_of(CHUNK) as u32,
            columns: x.columns as u32,
            stride: EightBits::stride(x.columns) as u32,
            passes: eight_bits.passes as u32,
            unused: 0,
        };
        let grid = [blocks, x.columns.div_ceil(kernel.columns), 1];
        let name = format!("narrow_{}_{}", lower_name(dtype), kernel.tiles);
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&name, (grid, NARROW_WARPS * 32, kernel.shared), &arguments) }
    }

    fn multiply_wide(
        &self,
        run: &[Product<'_>],
        x: &Columns<'_>,
        halves: Span<'_>,
    ) -> Result<(), GpuError> {
        let tile = self.wide_tile(run, x.columns);
        let (parts, blocks) = parts(run, x, tile.rows);
        let groups = x.cols.div_ceil(GROUP);
        let arguments = WideArgs {
            parts,
            x: halves.of(half_bytes(x.columns, x.cols), 1),
            n_parts: run.len() as u32,
            groups: groups as u32,
            padded: groups.next_multiple_of(CHUNK) as u32,
            columns: x.columns as u32,
            cols: x.cols as u32,
        };
        let name = lower_name(run[0].matrix.dtype());
        let kernel = format!("wide_{name}_{}_{}", tile.rows, tile.columns);
        let grid = [x.columns.div_ceil(tile.columns), blocks, 1];
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&kernel, (grid, tile.threads, tile.shared_bytes()), &arguments) }
    }

    /// The tile whose blocks, as many at a time as there are multiprocessors, are done first.
    fn wide_tile(&self, run: &[Product<'_>], columns: usize) -> WideTile {
        let tiles = if self.has_wgmma() { &WGMMA_TILES[..] } else { &MMA_TILES[..] };
        let cost = |tile: &WideTile| {
            let row_blocks = run.iter().map(|product| product.matrix.rows().div_ceil(tile.rows));
            let blocks = row_blocks.sum::<usize>() * columns.div_ceil(tile.columns);
            blocks.div_ceil(self.multiprocessors()) * tile.cost
        };
        let fitting = tiles.iter().filter(|tile| tile.shared_bytes() <= self.shared_bytes());
        *fitting.min_by_key(|tile| cost(tile)).expect("a tile that fits")
    }

    fn multiply_floats(&self, product: &Product<'_>, x: &Columns<'_>) -> Result<(), GpuError> {
        let values = x.values.expect("float weights need activations in f32");
        let (bias, out) = product.pointers(x);
        let (rows, cols) = (product.matrix.rows(), product.matrix.cols());
        let arguments = FloatArgs {
            weights: product.matrix.span().pointer,
            x: values.of(x.columns * x.cols, size_of::<f32>()),
            bias,
            out,
            rows: rows as u32,
            cols: cols as u32,
            columns: x.columns as u32,
            stride: product.stride as u32,
        };
        let kernel = format!("matvec_{}", lower_name(product.matrix.dtype()));
        let grid = [rows.div_ceil(FLOAT_WARPS), x.columns, 1];
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&kernel, (grid, 32 * FLOAT_WARPS, 0), &arguments) }
    }
}

/// A block of the wide kernel.
#[derive(Clone, Copy)]
struct WideTile {
    rows: usize,
    columns: usize,
    threads: usize,
    /// Tiles of activations in shared memory.
    copies: usize,
    /// How long it takes next to others, in µs for 4096 weights per row on an H200.
    cost: usize,
}

impl WideTile {
    fn shared_bytes(&self) -> usize {
        self.copies * self.columns * WIDE_COLUMN_BYTES + WIDE_EXTRA_BYTES
    }
}

impl Product<'_> {
    /// Of the bias, or null, and of the output.
    fn pointers(&self, x: &Columns<'_>) -> (u64, u64) {
        let (rows, f32s) = (self.matrix.rows(), size_of::<f32>());
        assert_eq!(self.matrix.cols(), x.cols, "elements of a row and of a token");
        assert!(self.stride >= rows, "products of {rows} rows, {} apart", self.stride);
        let elements = x.columns.saturating_sub(1) * self.stride + rows;
        let out = self.out.unaligned(elements, f32s);
        (self.bias.map_or(0, |bias| bias.of(rows, f32s)), out)
    }
}

/// The matrices of a run as kernels take them, and how many blocks of rows they have.
fn parts(run: &[Product<'_>], x: &Columns<'_>, block_rows: usize) -> ([Part; PARTS], usize) {
    let mut parts = [Part::default(); PARTS];
    let mut blocks = 0;
    for (part, product) in parts.iter_mut().zip(run) {
        let (bias, out) = product.pointers(x);
        let rows = product.matrix.rows();
        *part = Part {
            planes: product.matrix.planes(),
            bias,
            out,
            rows: rows as u32,
            stride: product.stride as u32,
            first_block: blocks as u32,
            unused: 0,
        };
        blocks += rows.div_ceil(block_rows);
    }
    (parts, blocks)
}

fn lower_name(dtype: DType) -> String {
    dtype.name().to_ascii_lowercase()
}
