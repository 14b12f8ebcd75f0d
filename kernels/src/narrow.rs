//! Products in which quantised weights meet activations in 8 bits (`narrow.cu`).

use crate::gpu::{Gpu, GpuError};
use crate::launch::Manner;
use crate::pack::lane_bytes;
use crate::products::{CHUNK, Columns, Product, ProductArgs, SCALE_BYTES, lower_name};
use tandem_cpu_kernels::DType;
use tandem_cpu_kernels::blocks::GROUP;

/// Warps of a block.
const NARROW_WARPS: usize = 8;
/// Most tokens of kernels with eight ranges, where not all have as many.
const EIGHT_RANGES_MAX: usize = 32;
/// Most tokens of kernels that add up groups in four sums.
const FOUR_SUMS_MAX: usize = 8;

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
            17..=EIGHT_RANGES_MAX => 4,
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

impl Gpu {
    /// Most tokens whose products have the bits of one token's.
    pub fn same_sums_max(&self) -> usize {
        FOUR_SUMS_MAX
    }

    pub(crate) fn multiply_narrow(
        &self,
        run: &[Product<'_>],
        x: &Columns<'_>,
    ) -> Result<(), GpuError> {
        let dtype = run[0].matrix.dtype();
        let kernel = NarrowKernel::of(dtype, x.columns, self.shared_bytes());
        let (arguments, blocks) = ProductArgs::new(run, x, kernel.rows);
        let grid = [blocks, x.columns.div_ceil(kernel.columns), 1];
        let name = format!("narrow_{}_{}", lower_name(dtype), kernel.tiles);
        let shape = (grid, NARROW_WARPS * 32, kernel.shared);
        let manner = Manner::of_product(run.iter().map(|product| product.matrix));
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch_as(&name, shape, manner, &arguments) }
    }
}
