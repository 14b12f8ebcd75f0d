//! Products of F16 and BF16 weights with 2 to 128 tokens on tensor cores (`float_tiles.cu`). Where
//! an activation is infinite they may be NaN: its parts are differences.

use crate::floats::{FLOATS_MAX, FloatArgs};
use crate::gpu::{Gpu, GpuError};
use crate::launch::Manner;
use crate::products::{Columns, Product, lower_name};
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::DType;

/// Fewest tokens for which they are faster than `floats.cu`.
const FLOAT_TILES_MIN: usize = 2;
/// First `__CUDA_ARCH__`, over ten, that has these kernels.
const TILES_SINCE: usize = 80;
/// Rows, elements of a row's chunk and threads of a block.
const ROWS: usize = 128;
const CHUNK: usize = 128;
const THREADS: usize = 256;
/// Warps of a block that share rows, each with a part of a chunk, and bytes of what one of them has
/// for a column.
const WAYS: usize = 4;
const SUMS_BYTES: usize = (ROWS + 4) * size_of::<f32>();
/// Columns of a block, widest first.
const COLUMNS: [usize; 4] = [64, 32, 16, 8];
/// Most columns of a block of which two share a multiprocessor's memory.
const SHARING: usize = 16;
/// What the driver keeps of a block's shared memory.
const KEPT_BYTES: usize = 1 << 10;
/// Bytes of a chunk of weights on its way to a block, and how many of these there may be.
const SLOT_BYTES: usize = ROWS * CHUNK * size_of::<u16>();
const DEPTHS: std::ops::RangeInclusive<usize> = 2..=6;

#[repr(C)]
#[derive(Clone, Copy)]
struct FloatTileArgs {
    of: FloatArgs,
    depth: u64,
}

// SAFETY: plain numbers in the order of `FloatTileArgs` in float_tiles.cu, whose last one is filled
// up.
unsafe impl DeviceRepr for FloatTileArgs {}

/// A block of a kernel.
#[derive(Clone, Copy)]
struct FloatTile {
    columns: usize,
    /// Chunks of weights on their way.
    depth: usize,
    shared_bytes: usize,
}

impl FloatTile {
    /// The narrowest for some columns, or the widest that fits.
    fn of(dtype: DType, columns: usize, shared_bytes: usize) -> Option<FloatTile> {
        let parts = match dtype {
            DType::F16 => 2,
            DType::BF16 => 3,
            _ => return None,
        };
        let of = |tile: usize| {
            // Two chunks of activations, split, with a value of each column.
            let split = 2 * tile * (parts * CHUNK * size_of::<u16>() + size_of::<f32>());
            let fitting = |bytes: usize| Some(bytes.checked_sub(split)? / SLOT_BYTES);
            let half = (shared_bytes - KEPT_BYTES) / 2;
            let shared = fitting(half).filter(|depth| tile <= SHARING && DEPTHS.contains(depth));
            let depth = shared.or(fitting(shared_bytes))?.min(*DEPTHS.end());
            let shared_bytes = split + depth * SLOT_BYTES;
            // In the end the sums of all ways lie there.
            let fits = depth >= *DEPTHS.start() && shared_bytes >= WAYS * tile * SUMS_BYTES;
            fits.then_some(FloatTile { columns: tile, depth, shared_bytes })
        };
        let enough = COLUMNS.into_iter().rev().filter(|tile| *tile >= columns).find_map(of);
        enough.or_else(|| COLUMNS.into_iter().find_map(of))
    }
}

impl Gpu {
    /// Multiplies if there are as many columns as these kernels are for, and a kernel and room.
    pub(crate) fn multiply_float_tiles(
        &self,
        product: &Product<'_>,
        x: &Columns<'_>,
    ) -> Result<bool, GpuError> {
        let (matrix, dtype) = (product.matrix, product.matrix.dtype());
        let is_between = (FLOAT_TILES_MIN..=FLOATS_MAX).contains(&x.columns);
        let Some(tile) = FloatTile::of(dtype, x.columns, self.shared_bytes())
            .filter(|_| is_between && self.compiled_for() >= TILES_SINCE)
        else {
            return Ok(false);
        };
        let blocks = matrix.rows().div_ceil(ROWS);
        // As many as make nearly all multiprocessors work, whatever the number of columns. Two
        // blocks of few columns share one.
        let may_double = |cluster| 8 * cluster * blocks < 7 * self.multiprocessors();
        let cluster = self.row_cluster(matrix.cols().div_ceil(CHUNK), may_double);
        let arguments = FloatTileArgs { of: FloatArgs::new(product, x), depth: tile.depth as u64 };
        let kernel = format!("float_tiles_{}_{}", lower_name(dtype), tile.columns);
        let grid = [cluster, x.columns.div_ceil(tile.columns), blocks];
        let manner = Manner::of_product([matrix]).in_clusters(cluster);
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch_as(&kernel, (grid, THREADS, tile.shared_bytes), manner, &arguments)? };
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory of a block of generations 9.0, 8.0, and of 8.6, 8.9 and 12.0.
    const MOST: usize = 227 << 10;
    const LESS: usize = 163 << 10;
    const LEAST: usize = 99 << 10;

    #[test]
    fn blocks_have_as_many_columns_as_their_shared_memory_holds() {
        for dtype in [DType::F16, DType::BF16] {
            for (columns, wanted) in
                [(2, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64), (128, 64)]
            {
                for (shared_bytes, most) in [(MOST, 64), (LESS, 64), (LEAST, 16)] {
                    let tile = FloatTile::of(dtype, columns, shared_bytes).expect("a tile");
                    let least = if dtype == DType::F16 && most == 16 { 32 } else { most };
                    assert_eq!(tile.columns, wanted.min(least), "{dtype} × {columns}");
                    assert!(tile.shared_bytes <= shared_bytes && DEPTHS.contains(&tile.depth));
                }
            }
        }
        assert!(FloatTile::of(DType::F32, 16, MOST).is_none());
        // Weights and activations of 64 columns would have room, but not all sums.
        assert_eq!(FloatTile::of(DType::F16, 64, 132 << 10).expect("a tile").columns, 32);
    }
}
