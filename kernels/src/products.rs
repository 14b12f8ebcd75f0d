//! Products of weights with the activations of some tokens.
//!
//! With few tokens reading the weights takes longest (`stream.cu`, `narrow.cu`): quantised weights
//! meet activations in 8 bits with a scale per 32 elements, as on the CPU. The integer sums are
//! the same, and only the order in which groups are added up differs; floats meet floats, or what
//! is nearly as exact (`floats.cu`, `float_tiles.cu`, `e4m3_stream.cu`, `e4m3.cu`). With more than
//! [`Gpu::narrow_max`] tokens decoding weights, and then arithmetic, takes longest: weights and
//! activations meet as f16, with sums in f32 (`middle.cu`, `wide.cu`).
//!
//! A token's product has the same bits in any batch of up to [`Gpu::same_sums_max`] tokens, of more
//! up to 128 (elsewhere than on Hopper of more up to 32, and of 33 to 128), and of more than that;
//! F16 and BF16 weights have them alone, in any batch of 2 to 128, and of more.
//!
//! Activations have their elements in orders that tensor cores take without a shuffle. In 8 bits
//! byte `16 t + 8 g + 4 h + e` of a pair of groups of 32 is element `16 h + 4 t + e` of group g;
//! the order as f16 is told in `halves.cuh`.

use crate::floats::FLOATS_MAX;
use crate::gpu::{Gpu, GpuError, Span};
use crate::pack::{DeviceMatrix, Planes, has_planes};
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::DType;
use tandem_cpu_kernels::blocks::GROUP;

/// Groups that rows and columns are filled up to multiples of.
pub(crate) const CHUNK: usize = 4;
/// Matrices that one launch can multiply.
pub(crate) const PARTS: usize = 3;
/// Bytes of a group's scale and sums.
pub(crate) const SCALE_BYTES: usize = 8;

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
    /// elements: a sixteenth of the values. Where it is given, quantised weights and e4m3 are
    /// multiplied with it, and other floats where there are many columns.
    pub halves: Option<Span<'a>>,
}

impl Columns<'_> {
    /// Pointer to the values.
    pub(crate) fn floats(&self) -> u64 {
        let values = self.values.expect("float weights need activations in f32");
        values.of(self.columns * self.cols, size_of::<f32>())
    }
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
pub(crate) struct Part {
    planes: Planes,
    bias: u64,
    out: u64,
    rows: u32,
    stride: u32,
    first_block: u32,
    unused: u32,
}

impl Part {
    /// The rows of all experts, of each of which a column has `rows` products at `out`.
    pub(crate) fn of_experts(matrix: &DeviceMatrix, out: u64, rows: usize) -> Part {
        Part {
            planes: matrix.planes(),
            out,
            rows: matrix.rows() as u32,
            stride: rows as u32,
            ..Part::default()
        }
    }
}

/// What products in 8 bits take.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ProductArgs {
    parts: [Part; PARTS],
    quants: u64,
    scales: u64,
    n_parts: u32,
    padded: u32,
    columns: u32,
    stride: u32,
    passes: u32,
    /// Blocks of rows of all parts, or what else has a block in turn.
    pub(crate) tiles: u32,
}

// SAFETY: plain numbers in the order of `ProductArgs` in products.cuh.
unsafe impl DeviceRepr for ProductArgs {}

impl ProductArgs {
    /// For blocks (or tiles) of some rows, and how many of these there are.
    pub(crate) fn new(
        run: &[Product<'_>],
        x: &Columns<'_>,
        block_rows: usize,
    ) -> (ProductArgs, usize) {
        let (parts, blocks) = parts(run, x, block_rows);
        (Self::with_parts(parts, (run.len(), blocks), x), blocks)
    }

    /// For parts that are made already, and how many parts and blocks (or tiles) there are.
    pub(crate) fn with_parts(
        parts: [Part; PARTS],
        (n_parts, blocks): (usize, usize),
        x: &Columns<'_>,
    ) -> ProductArgs {
        let eight_bits = x.eight_bits.expect("quantised weights need activations in 8 bits");
        let (quants, scales) = eight_bits.pointers(x.columns, x.cols);
        ProductArgs {
            parts,
            quants,
            scales,
            n_parts: n_parts as u32,
            padded: x.cols.div_ceil(GROUP).next_multiple_of(CHUNK) as u32,
            columns: x.columns as u32,
            stride: EightBits::stride(x.columns) as u32,
            passes: eight_bits.passes as u32,
            tiles: blocks as u32,
        }
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
        for run in runs(products) {
            let dtype = run[0].matrix.dtype();
            let halves = x.halves.filter(|_| has_planes(dtype) || x.columns > FLOATS_MAX);
            if let Some(halves) = halves {
                self.multiply_halves(run, x, halves)?;
            } else if dtype.is_quantized() {
                if !self.multiply_stream(run, x)? {
                    self.multiply_narrow(run, x)?;
                }
            } else if has_planes(dtype) {
                if !self.stream_e4m3(run, x)? {
                    self.multiply_e4m3(run, x)?;
                }
            } else {
                for product in run {
                    if !self.multiply_float_tiles(product, x)? {
                        self.multiply_floats(product, x)?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl Product<'_> {
    /// Of the bias, or null, and of the output.
    pub(crate) fn pointers(&self, x: &Columns<'_>) -> (u64, u64) {
        let (rows, f32s) = (self.matrix.rows(), size_of::<f32>());
        assert_eq!(self.matrix.cols(), x.cols, "elements of a row and of a token");
        assert!(self.stride >= rows, "products of {rows} rows, {} apart", self.stride);
        let elements = x.columns.saturating_sub(1) * self.stride + rows;
        let out = self.out.unaligned(elements, f32s);
        (self.bias.map_or(0, |bias| bias.of(rows, f32s)), out)
    }
}

/// Products that one launch can make: of matrices of one type, and not too many.
pub(crate) fn runs<'a, 'b>(products: &'b [Product<'a>]) -> impl Iterator<Item = &'b [Product<'a>]> {
    let of_types = products.chunk_by(|a, b| a.matrix.dtype() == b.matrix.dtype());
    of_types.flat_map(|run| run.chunks(PARTS))
}

/// The matrices of a run as kernels take them, and how many blocks of rows they have.
pub(crate) fn parts(
    run: &[Product<'_>],
    x: &Columns<'_>,
    block_rows: usize,
) -> ([Part; PARTS], usize) {
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

pub(crate) fn lower_name(dtype: DType) -> String {
    dtype.name().to_ascii_lowercase()
}
