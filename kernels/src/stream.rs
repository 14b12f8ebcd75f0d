//! Products of quantised weights with up to eight columns in 8 bits (`stream.cu`).

use crate::gpu::{Gpu, GpuError};
use crate::pack::lane_bytes;
use crate::products::{CHUNK, Columns, Product, ProductArgs, SCALE_BYTES, lower_name};
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
/// Bytes of a column's chunk, with its scales.
const CHUNK_BYTES: usize = CHUNK * (GROUP + SCALE_BYTES);

/// How a block of the kernel for some weights and columns is made.
struct StreamKernel {
    name: String,
    shared_bytes: usize,
}

impl StreamKernel {
    /// If there are few columns, and a block's shared memory holds them.
    fn of(gpu: &Gpu, dtype: DType, x: &Columns<'_>) -> Option<StreamKernel> {
        let is_quantized = dtype.is_quantized();
        let passes = x.eight_bits.filter(|_| is_quantized && x.columns <= COLUMNS_MAX)?.passes;
        let columns = if x.columns == 1 { 1 } else { COLUMNS_MAX };
        let lane = lane_bytes(dtype);
        let kib = match columns {
            1 if gpu.has_wgmma() => 128,
            1 => 64,
            _ => 48,
        };
        let weights = (kib / lane).max(3) * 2 * THREADS * lane;
        let sums = 2 * HALVES * RANGES * columns * (TILE_ROWS + 4) * size_of::<f32>();
        let each = x.cols.div_ceil(CHUNK * GROUP).div_ceil(RANGES);
        let shared_bytes = weights + sums + RANGES * each * passes * columns * CHUNK_BYTES;
        let name = format!("stream_{}_{columns}", lower_name(dtype));
        (shared_bytes <= gpu.shared_bytes()).then_some(StreamKernel { name, shared_bytes })
    }
}

impl Gpu {
    /// Multiplies if there are few columns and room for them.
    pub(crate) fn multiply_stream(
        &self,
        run: &[Product<'_>],
        x: &Columns<'_>,
    ) -> Result<bool, GpuError> {
        let Some(kernel) = StreamKernel::of(self, run[0].matrix.dtype(), x) else {
            return Ok(false);
        };
        let (arguments, tiles) = ProductArgs::new(run, x, TILE_ROWS);
        // One block per multiprocessor at most.
        let blocks = tiles.min(self.multiprocessors());
        let shape = ([blocks, 1, 1], THREADS, kernel.shared_bytes);
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&kernel.name, shape, &arguments)? };
        Ok(true)
    }
}
