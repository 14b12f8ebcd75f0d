//! Products of weights with the activations of some tokens. Quantised weights meet activations in 8
//! bits with a scale per 32 elements, as on the CPU: the integer sums are the same, and only the
//! order in which groups are added up differs. A token's product has the same bits in any batch.

use crate::gpu::{Gpu, GpuError, Span};
use crate::pack::{DeviceMatrix, Planes};
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::DType;
use tandem_cpu_kernels::blocks::GROUP;

const WARPS: usize = 4;
/// Rows of a warp.
const ROWS: usize = 2;
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
}

/// The 8-bit form of `[rows, cols]` activations.
#[derive(Clone, Copy, Debug)]
pub struct EightBits<'a> {
    /// `[rows, cols]` i8; twice as many rows where there is a `second`.
    pub quants: Span<'a>,
    /// `[rows, cols / 32]` of 8 bytes: f32 scale, i16 sums of the halves.
    pub scales: Span<'a>,
    /// From the row of a token's values to that of what their 8 bits miss, which is rounded and
    /// multiplied in turn; `None` if that is not wanted.
    pub second: Option<usize>,
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
struct MatvecArgs {
    parts: [Part; PARTS],
    quants: u64,
    scales: u64,
    n_parts: u32,
    groups: u32,
    columns: u32,
    second: u32,
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

// SAFETY: plain numbers in the order of `MatvecArgs` in matvec.cu.
unsafe impl DeviceRepr for MatvecArgs {}
// SAFETY: plain numbers in the order of `FloatArgs` in matvec.cu.
unsafe impl DeviceRepr for FloatArgs {}

impl EightBits<'_> {
    /// Bytes of the integers of `[rows, cols]`.
    pub fn quant_bytes(rows: usize, cols: usize) -> usize {
        rows * cols.next_multiple_of(GROUP)
    }

    /// Bytes of the scales of `[rows, cols]`.
    pub fn scale_bytes(rows: usize, cols: usize) -> usize {
        rows * cols.div_ceil(GROUP) * SCALE_BYTES
    }

    /// Pointers, where `rows` rows of `cols` are there.
    pub(crate) fn pointers(&self, rows: usize, cols: usize) -> (u64, u64) {
        let rows = rows + self.second.unwrap_or(0);
        let groups = rows * cols.div_ceil(GROUP);
        (self.quants.of(groups, GROUP), self.scales.of(groups, SCALE_BYTES))
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
                if run[0].matrix.dtype().is_quantized() {
                    self.multiply_quantized(run, x)?;
                } else {
                    run.iter().try_for_each(|product| self.multiply_floats(product, x))?;
                }
            }
        }
        Ok(())
    }

    fn multiply_quantized(&self, run: &[Product<'_>], x: &Columns<'_>) -> Result<(), GpuError> {
        if x.columns == 0 {
            return Ok(());
        }
        let eight_bits = x.eight_bits.expect("quantised weights need activations in 8 bits");
        let (quants, scales) = eight_bits.pointers(x.columns, x.cols);
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
            blocks += rows.div_ceil(WARPS * ROWS);
        }
        let arguments = MatvecArgs {
            parts,
            quants,
            scales,
            n_parts: run.len() as u32,
            groups: (x.cols / GROUP) as u32,
            columns: x.columns as u32,
            second: eight_bits.second.unwrap_or(0) as u32,
        };
        let tile = match x.columns {
            1 => 1,
            2 => 2,
            3..=4 => 4,
            _ => 8,
        };
        let kernel = format!("matvec_{}_{tile}", lower_name(run[0].matrix.dtype()));
        let grid = [blocks, x.columns.div_ceil(tile), 1];
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&kernel, (grid, 32 * WARPS, 0), &arguments) }
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
        let grid = [rows.div_ceil(WARPS), x.columns, 1];
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&kernel, (grid, 32 * WARPS, 0), &arguments) }
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

fn lower_name(dtype: DType) -> String {
    dtype.name().to_ascii_lowercase()
}
