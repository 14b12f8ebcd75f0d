//! Row-wise passes over activations: norms with what is added to the residual stream before them,
//! gated activations, and rounding to 8 bits (as `tandem_cpu_kernels::activations`), fused.

use crate::gpu::{Gpu, GpuError, Span};
use crate::products::{CHUNK, EightBits, half_bytes};
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::blocks::GROUP;

const ROW_THREADS: usize = 256;
const NORM_THREADS_MAX: usize = 1024;
const F32: usize = size_of::<f32>();

/// Root-mean-square norm (arXiv 1910.07467): `x · weight / sqrt(mean(x²) + eps)`.
#[derive(Clone, Copy, Debug)]
pub struct RowNorm<'a> {
    /// `[cols]` f32
    pub weight: Span<'a>,
    /// Added to the mean square.
    pub eps: f32,
}

/// What is added to the residual stream before a norm.
#[derive(Clone, Copy, Debug)]
pub struct Added<'a> {
    /// `[rows, cols]` f32
    pub values: Span<'a>,
    /// The norm of it that is added instead.
    pub norm: Option<RowNorm<'a>>,
}

/// A pass over the residual stream.
#[derive(Clone, Copy, Debug)]
pub struct NormRows<'a> {
    /// `[rows, cols]` f32; the sum is written back unless rows are gathered.
    pub residual: Span<'a>,
    /// What is added first.
    pub added: Option<Added<'a>>,
    /// The norm of the sum.
    pub norm: RowNorm<'a>,
    /// u32 indices of the rows that are wanted, `[n]`; `None` for the first n.
    pub gather: Option<Span<'a>>,
    /// `[n, cols]` f32: the result.
    pub values: Option<Span<'a>>,
    /// The result in 8 bits.
    pub eight_bits: Option<EightBits<'a>>,
    /// The result as [`Columns::halves`](crate::Columns::halves).
    pub halves: Option<Span<'a>>,
    /// Rows of `residual` and of what is added.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
}

/// What gates a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x · sigmoid(x)`
    Silu = 0,
    /// `x / 2 · (1 + tanh(sqrt(2/π) · (x + 0.044715 x³)))`
    GeluTanh = 1,
}

/// A pass that rounds rows, or the product of activated rows with others.
#[derive(Clone, Copy, Debug)]
pub struct RoundRows<'a> {
    /// `[rows, cols]` f32
    pub values: Span<'a>,
    /// `[rows, cols]` f32 and how `values` are activated before they are multiplied with it.
    pub up: Option<(Span<'a>, Gate)>,
    /// `[rows, cols]` f32: what was rounded. May be `values`.
    pub out: Option<Span<'a>>,
    /// The result in 8 bits.
    pub eight_bits: Option<EightBits<'a>>,
    /// The result as [`Columns::halves`](crate::Columns::halves).
    pub halves: Option<Span<'a>>,
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct EightBitsArg {
    quants: u64,
    scales: u64,
    stride: u32,
    passes: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormArgs {
    residual: u64,
    added: u64,
    added_norm: u64,
    weight: u64,
    gather: u64,
    values: u64,
    eight_bits: EightBitsArg,
    halves: u64,
    added_eps: f32,
    eps: f32,
    cols: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RoundArgs {
    values: u64,
    up: u64,
    out: u64,
    eight_bits: EightBitsArg,
    halves: u64,
    rows: u32,
    cols: u32,
    activation: u32,
}

// SAFETY: plain numbers in the order of `NormArgs` in rows.cu.
unsafe impl DeviceRepr for NormArgs {}
// SAFETY: plain numbers in the order of `RoundArgs` in rows.cu.
unsafe impl DeviceRepr for RoundArgs {}

/// As kernels take it.
pub(crate) fn eight_bits(of: Option<EightBits<'_>>, rows: usize, cols: usize) -> EightBitsArg {
    let Some(of) = of else { return EightBitsArg { quants: 0, scales: 0, stride: 0, passes: 0 } };
    assert!(cols.is_multiple_of(GROUP), "8-bit activations need cols % 32 == 0, got {cols}");
    let (quants, scales) = of.pointers(rows, cols);
    let (stride, passes) = (EightBits::stride(rows) as u32, of.passes as u32);
    EightBitsArg { quants, scales, stride, passes }
}

/// Threads that normalise a row, and the fours that each of them holds: one, two or four.
pub(crate) fn norm_threads(cols: usize) -> (usize, usize) {
    let fours = cols.next_multiple_of(CHUNK * GROUP) / 4;
    let each = fours.div_ceil(NORM_THREADS_MAX).next_power_of_two();
    (fours.div_ceil(each).next_multiple_of(32), each)
}

impl Gpu {
    /// Longest row of [`Gpu::norm_rows`], in elements.
    pub const NORM_COLS_MAX: usize = 16 << 10;

    /// `residual += added; result = norm(residual)` for `n` rows.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short, or a row no multiple of 4 or longer than [`Gpu::NORM_COLS_MAX`].
    /// Gathered indices are the caller's promise.
    pub fn norm_rows(&self, pass: &NormRows<'_>, n: usize) -> Result<(), GpuError> {
        let (elements, cols) = (pass.rows * pass.cols, pass.cols);
        assert!(cols <= Self::NORM_COLS_MAX, "rows of {cols} elements");
        assert!(cols.is_multiple_of(4), "rows are read in fours, got {cols}");
        assert!(pass.gather.is_some() || n <= pass.rows, "{n} of {} rows", pass.rows);
        let added_norm = pass.added.and_then(|added| added.norm);
        let arguments = NormArgs {
            residual: pass.residual.of(elements, F32),
            added: pass.added.map_or(0, |added| added.values.of(elements, F32)),
            added_norm: added_norm.map_or(0, |norm| norm.weight.of(cols, F32)),
            weight: pass.norm.weight.of(cols, F32),
            gather: pass.gather.map_or(0, |gather| gather.of(n, size_of::<u32>())),
            values: pass.values.map_or(0, |values| values.of(n * cols, F32)),
            eight_bits: eight_bits(pass.eight_bits, n, cols),
            halves: pass.halves.map_or(0, |halves| halves.of(half_bytes(n, cols), 1)),
            added_eps: added_norm.map_or(0.0, |norm| norm.eps),
            eps: pass.norm.eps,
            cols: cols as u32,
        };
        let (threads, each) = norm_threads(cols);
        let shape = ([n, 1, 1], threads, 0);
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&format!("norm_rows_{each}"), shape, &arguments) }
    }

    /// Rounds rows to 8 bits, or `activation(values) · up`.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short or a row no multiple of 4.
    pub fn round_rows(&self, pass: &RoundRows<'_>) -> Result<(), GpuError> {
        let (elements, cols) = (pass.rows * pass.cols, pass.cols);
        assert!(cols.is_multiple_of(4), "rows are read in fours, got {cols}");
        let arguments = RoundArgs {
            values: pass.values.of(elements, F32),
            up: pass.up.map_or(0, |(up, _)| up.of(elements, F32)),
            out: pass.out.map_or(0, |out| out.of(elements, F32)),
            eight_bits: eight_bits(pass.eight_bits, pass.rows, cols),
            halves: pass.halves.map_or(0, |halves| halves.of(half_bytes(pass.rows, cols), 1)),
            rows: pass.rows as u32,
            cols: cols as u32,
            activation: pass.up.map_or(0, |(_, gate)| gate as u32),
        };
        let blocks = cols.next_multiple_of(CHUNK * GROUP).div_ceil(4 * ROW_THREADS);
        let shape = ([pass.rows, blocks, 1], ROW_THREADS, 0);
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch("round_rows", shape, &arguments) }
    }
}
