//! Products of quantised weights with up to eight columns in 8 bits (`stream.cu`), and gated ones.

use crate::gpu::{Gpu, GpuError, Span};
use crate::pack::lane_bytes;
use crate::products::{CHUNK, Columns, EightBits, Product, ProductArgs, SCALE_BYTES, lower_name};
use crate::rows::{EightBitsArg, Gate, RoundRows, eight_bits};
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::DType;
use tandem_cpu_kernels::blocks::GROUP;

/// Most columns.
const COLUMNS_MAX: usize = 8;
/// Ranges of what lies along rows: a warp for each.
const RANGES: usize = 8;
/// Halves of a block, and rows of a tile.
const HALVES: usize = 2;
const TILE_ROWS: usize = 16;
const THREADS: usize = 32 * RANGES * HALVES;
/// Shared memory that kernels have in any case, at most.
const STATIC_BYTES: usize = 128;
/// Bytes of a column's chunk, with its scales.
const CHUNK_BYTES: usize = CHUNK * (GROUP + SCALE_BYTES);

#[repr(C)]
#[derive(Clone, Copy)]
struct StreamArgs {
    products: ProductArgs,
    rounded: EightBitsArg,
    halves_done: u64,
    activation: u64,
}

// SAFETY: plain numbers in the order of `StreamArgs` in stream.cu.
unsafe impl DeviceRepr for StreamArgs {}

/// `activation(gate) · up` of two products, and the same rounded for the next one.
#[derive(Clone, Copy)]
pub struct Gated<'a> {
    /// What is activated; its output is overwritten.
    pub gate: Product<'a>,
    /// What it is multiplied with; its output may be overwritten.
    pub up: Product<'a>,
    /// How the gate is activated.
    pub activation: Gate,
    /// `[columns, rows]` f32: the result, if that is wanted. May be the gate's output.
    pub out: Option<Span<'a>>,
    /// The result in 8 bits.
    pub eight_bits: Option<EightBits<'a>>,
    /// The result as [`Columns::halves`].
    pub halves: Option<Span<'a>>,
    /// Zeros between launches: [`Gated::counter_bytes`].
    pub counters: Span<'a>,
}

/// How a block of the kernel for some weights and columns is made.
struct StreamKernel {
    name: String,
    threads: usize,
    shared_bytes: usize,
}

impl StreamKernel {
    /// If there are few columns, and a block's shared memory holds them.
    fn of(gpu: &Gpu, dtype: DType, x: &Columns<'_>, matrices: usize) -> Option<StreamKernel> {
        let is_quantized = dtype.is_quantized();
        let passes = x.eight_bits.filter(|_| is_quantized && x.columns <= COLUMNS_MAX)?.passes;
        let columns = if x.columns == 1 { 1 } else { COLUMNS_MAX };
        let lane = lane_bytes(dtype);
        let kib = if columns > 1 {
            48
        } else if gpu.has_wgmma() {
            128
        } else {
            64
        };
        let fitting = kib / lane;
        let weights = fitting.max(3) * 2 * THREADS * lane;
        let sums = 2 * HALVES * RANGES * columns * (TILE_ROWS + 4) * size_of::<f32>();
        let each = x.cols.div_ceil(CHUNK * GROUP).div_ceil(RANGES);
        let shared_bytes = weights + sums + RANGES * each * passes * columns * CHUNK_BYTES;
        let kind = if matrices == 2 { "gated" } else { "stream" };
        let name = format!("{kind}_{}_{columns}", lower_name(dtype));
        // Gated ones have threads, and some memory, for what comes after products.
        let finishing = if columns == 1 { 32 } else { 128 };
        let threads = THREADS + if matrices == 2 { finishing } else { 0 };
        let fits = shared_bytes + STATIC_BYTES <= gpu.shared_bytes();
        fits.then_some(StreamKernel { name, threads, shared_bytes })
    }
}

impl Gated<'_> {
    /// Bytes of the counters of results with `rows` elements.
    pub fn counter_bytes(rows: usize) -> usize {
        rows.div_ceil(GROUP) * size_of::<u32>()
    }
}

impl Gpu {
    /// Multiplies if there are few columns and room for them.
    pub(crate) fn multiply_stream(
        &self,
        run: &[Product<'_>],
        x: &Columns<'_>,
    ) -> Result<bool, GpuError> {
        let Some(kernel) = StreamKernel::of(self, run[0].matrix.dtype(), x, 1) else {
            return Ok(false);
        };
        let (products, _) = ProductArgs::new(run, x, TILE_ROWS);
        self.launch_stream(&kernel, &StreamArgs::new(products))?;
        Ok(true)
    }

    /// `activation(gate) · up`, rounded.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// As [`Gpu::multiply`] and [`Gpu::round_rows`].
    pub fn multiply_gated(&self, gated: &Gated<'_>, x: &Columns<'_>) -> Result<(), GpuError> {
        let (gate, up) = (&gated.gate, &gated.up);
        let (dtype, rows) = (gate.matrix.dtype(), gate.matrix.rows());
        assert_eq!(up.matrix.rows(), rows, "rows of a gate and of what it gates");
        assert!(gate.stride == rows && up.stride == rows, "rows without gaps");
        let is_even = rows.is_multiple_of(CHUNK * GROUP) && up.matrix.dtype() == dtype;
        let stays = gated.out.is_none_or(|out| out.pointer == gate.out.pointer)
            && gate.out.pointer.is_multiple_of(16);
        let rounded = gated.eight_bits.filter(|_| is_even && stays && gated.halves.is_none());
        let kernel = StreamKernel::of(self, dtype, x, 2);
        if let (Some(kernel), Some(_)) = (kernel, rounded) {
            let (mut products, _) = ProductArgs::new(&[*gate, *up], x, TILE_ROWS);
            products.tiles = (rows / TILE_ROWS) as u32;
            let mut arguments = StreamArgs::new(products);
            arguments.rounded = eight_bits(rounded, x.columns, rows);
            arguments.halves_done = gated.counters.of(Gated::counter_bytes(rows), 1);
            arguments.activation = gated.activation as u64;
            return self.launch_stream(&kernel, &arguments);
        }
        self.multiply(&[*gate, *up], x)?;
        self.round_rows(&RoundRows {
            values: gate.out,
            up: Some((up.out, gated.activation)),
            out: gated.out,
            eight_bits: gated.eight_bits,
            halves: gated.halves,
            rows: x.columns,
            cols: rows,
        })
    }

    /// One block per multiprocessor at most.
    fn launch_stream(&self, kernel: &StreamKernel, arguments: &StreamArgs) -> Result<(), GpuError> {
        let blocks = (arguments.products.tiles as usize).min(self.multiprocessors());
        let shape = ([blocks, 1, 1], kernel.threads, kernel.shared_bytes);
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&kernel.name, shape, arguments) }
    }
}

impl StreamArgs {
    fn new(products: ProductArgs) -> Self {
        Self { products, rounded: EightBitsArg::default(), halves_done: 0, activation: 0 }
    }
}
