//! Products in which quantised weights meet activations in 8 bits (`narrow.cu`).

use crate::gpu::{Gpu, GpuError};
use crate::launch::Manner;
use crate::pack::lane_bytes;
use crate::products::{CHUNK, Columns, Product, ProductArgs, SCALE_BYTES, lower_name};
use tandem_cpu_kernels::DType;
use tandem_cpu_kernels::blocks::GROUP;

/// Warps of a block.
const NARROW_WARPS: usize = 8;
/// Most tokens of kernels with four ranges, where those for more have two.
const FOUR_RANGES_MAX: usize = 32;
/// Most tokens of kernels with eight ranges, which add up groups in four sums.
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
            17..=FOUR_RANGES_MAX => 4,
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
            1 => (if lane > 20 { 16 } else { 32 }, 8, 2),
            2 | 4 => (32, 4, 2),
            _ => (64, 2, 2),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory of a block of generations 8.6, 8.9 and 12.0, and of 7.5.
    const LESS: usize = 99 << 10;
    const LEAST: usize = 64 << 10;

    #[test]
    fn weights_are_read_once_for_as_many_columns_where_shared_memory_is_small() {
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
            for columns in [1, 2, 8, 9, 16, 17, 32, 33, 64, 128] {
                let kernel = NarrowKernel::of(dtype, columns, LESS);
                assert!(kernel.shared <= LESS, "{dtype} × {columns}: {} bytes", kernel.shared);
                assert!(kernel.columns >= columns.min(64), "{dtype} × {columns}");
                let kernel = NarrowKernel::of(dtype, columns, LEAST);
                assert!(kernel.shared <= LEAST, "{dtype} × {columns}: {} bytes", kernel.shared);
                assert!(kernel.columns >= columns.min(16), "{dtype} × {columns}");
            }
        }
    }
}
