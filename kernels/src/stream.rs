//! Products of quantised weights with up to eight columns in 8 bits (`stream.cu`), and gated ones.

use crate::gpu::{Gpu, GpuError, Span};
use crate::launch::Manner;
use crate::pack::{lane_bytes, unit_bytes};
use crate::products::{
    CHUNK, Columns, EightBits, Product, ProductArgs, SCALE_BYTES, lower_name, runs,
};
use crate::rows::{EightBitsArg, Gate, NormRows, RoundRows, eight_bits, norm_threads};
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::blocks::GROUP;

/// Most columns.
const COLUMNS_MAX: usize = 8;
/// Ranges of what lies along rows: a warp for each.
const RANGES: usize = 8;
/// Halves of a block, and rows of a tile.
const HALVES: usize = 2;
const TILE_ROWS: usize = 16;
const THREADS: usize = 32 * RANGES * HALVES;
/// What kernels of gated products are called.
const GATED: &str = "gated";
/// Shared memory that kernels have in any case, at most.
const STATIC_BYTES: usize = 2048;
/// Fours that a thread of `norm_rows` holds, at most, where products normalise on the way.
const NORM_QUADS_MAX: usize = 2;
/// Bytes of a column's chunk, with its scales.
const CHUNK_BYTES: usize = CHUNK * (GROUP + SCALE_BYTES);

#[repr(C)]
#[derive(Clone, Copy)]
struct StreamArgs {
    products: ProductArgs,
    rounded: EightBitsArg,
    halves_done: u64,
    norm: NormArg,
    activation: u64,
}

/// `StreamNorm` of stream.cu.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct NormArg {
    residual: u64,
    added: u64,
    sum: u64,
    weight: u64,
    eps: f32,
    cols: u32,
    threads: u32,
    quads: u32,
}

// SAFETY: plain numbers in the order of `StreamArgs` in stream.cu.
unsafe impl DeviceRepr for StreamArgs {}

/// A norm of one row that products over it can make on the way, each block for itself.
#[derive(Clone, Copy, Debug)]
pub struct NormBefore<'a> {
    /// The norm; its 8-bit result is what the products read.
    pub pass: NormRows<'a>,
    /// `[cols]` f32: where the residual stream is put then, since others still read it.
    pub sum: Span<'a>,
}

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
    manner: Manner,
}

impl StreamKernel {
    /// If there are few columns, rounded once, that a block's shared memory holds; and whole tiles.
    fn of(gpu: &Gpu, run: &[Product<'_>], x: &Columns<'_>, kind: &str) -> Option<StreamKernel> {
        let dtype = run[0].matrix.dtype();
        let is_rounded = x.eight_bits.is_some_and(|eight_bits| eight_bits.passes == 1);
        let are_whole = run.iter().all(|product| product.matrix.rows().is_multiple_of(TILE_ROWS));
        if !(dtype.is_quantized() && is_rounded && are_whole && x.columns <= COLUMNS_MAX) {
            return None;
        }
        let columns = if x.columns == 1 { 1 } else { COLUMNS_MAX };
        let lane = lane_bytes(dtype);
        let kib = if columns > 1 {
            48
        } else if gpu.has_wgmma() {
            80
        } else {
            64
        };
        let fitting = kib / lane;
        let chunk_bytes = 64 * lane + TILE_ROWS * unit_bytes(dtype);
        let weights = fitting.max(3) * THREADS / 32 * chunk_bytes;
        let sums = 2 * HALVES * RANGES * columns * (TILE_ROWS + 4) * size_of::<f32>();
        let each = x.cols.div_ceil(CHUNK * GROUP).div_ceil(RANGES);
        let need = weights + sums + RANGES * each * columns * CHUNK_BYTES;
        // More than half of what there is: two blocks of one multiprocessor would leave another
        // without.
        let shared_bytes = need.max(gpu.shared_bytes() / 2);
        let name = format!("{kind}_{}_{columns}", lower_name(dtype));
        // Gated ones have threads, and some memory, for what comes after products.
        let finishing = if columns == 1 { 32 } else { 128 };
        let threads = THREADS + if kind == GATED { finishing } else { 0 };
        let fits = shared_bytes + STATIC_BYTES <= gpu.shared_bytes();
        let manner = Manner::of_product(run.iter().map(|product| product.matrix));
        fits.then_some(StreamKernel { name, threads, shared_bytes, manner })
    }
}

impl NormBefore<'_> {
    /// As kernels take it, where they can make it.
    fn argument(&self, x: &Columns<'_>) -> Option<NormArg> {
        let (pass, cols) = (&self.pass, self.pass.cols);
        let is_plain = pass.gather.is_none() && pass.values.is_none() && pass.halves.is_none();
        let added = pass.added.filter(|added| added.norm.is_none());
        let (threads, quads) = norm_threads(cols);
        let fits = x.columns == 1 && quads <= NORM_QUADS_MAX && threads <= 2 * THREADS;
        if !(is_plain && fits && added.is_some() == pass.added.is_some()) {
            return None;
        }
        assert_eq!(cols, x.cols, "elements of a row and of a token");
        assert_ne!(pass.residual.pointer, self.sum.pointer, "others read the residual stream");
        Some(NormArg {
            residual: pass.residual.of(cols, size_of::<f32>()),
            added: added.map_or(0, |added| added.values.of(cols, size_of::<f32>())),
            sum: self.sum.of(cols, size_of::<f32>()),
            weight: pass.norm.weight.of(cols, size_of::<f32>()),
            eps: pass.norm.eps,
            cols: cols as u32,
            threads: threads as u32,
            quads: quads as u32,
        })
    }
}

impl Gated<'_> {
    /// What makes it at once, if that can be.
    fn stream(&self, gpu: &Gpu, x: &Columns<'_>) -> Option<(StreamKernel, StreamArgs)> {
        let (gate, up) = (&self.gate, &self.up);
        let (dtype, rows) = (gate.matrix.dtype(), gate.matrix.rows());
        assert_eq!(up.matrix.rows(), rows, "rows of a gate and of what it gates");
        assert!(gate.stride == rows && up.stride == rows, "rows without gaps");
        let is_even = rows.is_multiple_of(CHUNK * GROUP) && up.matrix.dtype() == dtype;
        let stays = self.out.is_none_or(|out| out.pointer == gate.out.pointer)
            && gate.out.pointer.is_multiple_of(16);
        let rounded = self.eight_bits.filter(|_| is_even && stays && self.halves.is_none())?;
        let kernel = StreamKernel::of(gpu, &[*gate, *up], x, GATED)?;
        let (mut products, _) = ProductArgs::new(&[*gate, *up], x, TILE_ROWS);
        products.tiles = (rows / TILE_ROWS) as u32;
        let mut arguments = StreamArgs::new(products);
        arguments.rounded = eight_bits(Some(rounded), x.columns, rows);
        arguments.halves_done = self.counters.of(Gated::counter_bytes(rows), 1);
        arguments.activation = self.activation as u64;
        Some((kernel, arguments))
    }

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
        let Some(kernel) = StreamKernel::of(self, run, x, "stream") else {
            return Ok(false);
        };
        self.launch_run(&kernel, (run, x), NormArg::default())?;
        Ok(true)
    }

    /// [`Gpu::norm_rows`] and then [`Gpu::multiply`], at once where that can be. Says whether the
    /// residual stream is at [`NormBefore::sum`] now.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// As these.
    pub fn multiply_after(
        &self,
        norm: &NormBefore<'_>,
        products: &[Product<'_>],
        x: &Columns<'_>,
    ) -> Result<bool, GpuError> {
        let kernels =
            runs(products).map(|run| Some((run, StreamKernel::of(self, run, x, "stream")?)));
        let kernels = kernels.collect::<Option<Vec<_>>>();
        let (Some(argument), Some(kernels)) = (norm.argument(x), kernels) else {
            self.norm_rows(&norm.pass, x.columns)?;
            self.multiply(products, x)?;
            return Ok(false);
        };
        for (run, kernel) in kernels {
            self.launch_run(&kernel, (run, x), argument)?;
        }
        Ok(norm.pass.added.is_some())
    }

    /// `activation(gate) · up`, rounded; after a norm, if there is one. Says whether the residual
    /// stream is at [`NormBefore::sum`] now.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// As [`Gpu::norm_rows`], [`Gpu::multiply`] and [`Gpu::round_rows`].
    pub fn multiply_gated(
        &self,
        norm: Option<&NormBefore<'_>>,
        gated: &Gated<'_>,
        x: &Columns<'_>,
    ) -> Result<bool, GpuError> {
        let argument = match norm {
            Some(norm) => norm.argument(x),
            None => Some(NormArg::default()),
        };
        if let (Some(norm_arg), Some((kernel, mut arguments))) = (argument, gated.stream(self, x)) {
            arguments.norm = norm_arg;
            self.launch_stream(&kernel, &arguments)?;
            return Ok(norm.is_some_and(|norm| norm.pass.added.is_some()));
        }
        if let Some(norm) = norm {
            self.norm_rows(&norm.pass, x.columns)?;
        }
        let (gate, up) = (&gated.gate, &gated.up);
        self.multiply(&[*gate, *up], x)?;
        self.round_rows(&RoundRows {
            values: gate.out,
            up: Some((up.out, gated.activation)),
            out: gated.out,
            eight_bits: gated.eight_bits,
            halves: gated.halves,
            rows: x.columns,
            cols: gate.matrix.rows(),
        })?;
        Ok(false)
    }

    /// Products that are not gated, after a norm or, with the default, on what is there.
    fn launch_run(
        &self,
        kernel: &StreamKernel,
        (run, x): (&[Product<'_>], &Columns<'_>),
        norm: NormArg,
    ) -> Result<(), GpuError> {
        let mut arguments = StreamArgs::new(ProductArgs::new(run, x, TILE_ROWS).0);
        arguments.norm = norm;
        self.launch_stream(kernel, &arguments)
    }

    /// One block per multiprocessor at most.
    fn launch_stream(&self, kernel: &StreamKernel, arguments: &StreamArgs) -> Result<(), GpuError> {
        let blocks = (arguments.products.tiles as usize).min(self.multiprocessors());
        let shape = ([blocks, 1, 1], kernel.threads, kernel.shared_bytes);
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch_as(&kernel.name, shape, kernel.manner, arguments) }
    }
}

impl StreamArgs {
    fn new(products: ProductArgs) -> Self {
        Self {
            products,
            rounded: EightBitsArg::default(),
            halves_done: 0,
            norm: NormArg::default(),
            activation: 0,
        }
    }
}
