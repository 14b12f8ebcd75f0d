//! Products of e4m3 weights with up to eight columns in f32, where a block has the shared memory
//! for it (`e4m3_stream.cu`).

use crate::gpu::{Gpu, GpuError};
use crate::launch::Manner;
use crate::pack::{lane_bytes, unit_bytes};
use crate::products::{CHUNK, Columns, Product, lower_name};
use crate::wide::WideArgs;
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::DType;
use tandem_cpu_kernels::blocks::GROUP;

/// Most columns, and those of the kernel for fewer.
const COLUMNS_MAX: usize = 8;
const FEW_COLUMNS: usize = 4;
/// Ranges of a segment, a warp for each; halves of a block; rows of a tile.
const RANGES: usize = 8;
const HALVES: usize = 2;
const TILE_ROWS: usize = 16;
const WARPS: usize = RANGES * HALVES;
/// Chunks of a segment.
const SEGMENT_CHUNKS: usize = 32;
/// Bytes of what a chunk of a column is split into: two f16 an element.
const SPLIT_BYTES: usize = 2 * size_of::<u16>() * CHUNK * GROUP;

#[repr(C)]
#[derive(Clone, Copy)]
struct E4m3StreamArgs {
    products: WideArgs,
    tiles: u32,
}

// SAFETY: plain numbers in the order of `E4m3StreamArgs` in e4m3_stream.cu.
unsafe impl DeviceRepr for E4m3StreamArgs {}

/// Columns of the kernel that some columns take.
fn kernel_columns(columns: usize) -> usize {
    if columns <= FEW_COLUMNS { FEW_COLUMNS } else { COLUMNS_MAX }
}

/// Shared memory of a block: weights on their way, sums, and a segment of columns with the value
/// of one of each chunk.
fn shared_bytes(dtype: DType, columns: usize) -> usize {
    let of_kernel = kernel_columns(columns);
    let depth = if of_kernel == FEW_COLUMNS { 3 } else { 2 };
    let chunk_bytes = 4 * TILE_ROWS * lane_bytes(dtype) + TILE_ROWS * unit_bytes(dtype);
    let sums = 2 * HALVES * RANGES * of_kernel * (TILE_ROWS + 4) * size_of::<f32>();
    let steps = SEGMENT_CHUNKS * of_kernel * size_of::<f32>();
    depth * WARPS * chunk_bytes + sums + steps + SEGMENT_CHUNKS * columns * SPLIT_BYTES
}

impl Gpu {
    /// Multiplies if there are few columns and whole tiles of rows, and room for as many columns as
    /// there may be: or else a column's bits would depend on how many there are.
    pub(crate) fn stream_e4m3(
        &self,
        run: &[Product<'_>],
        x: &Columns<'_>,
    ) -> Result<bool, GpuError> {
        let dtype = run[0].matrix.dtype();
        let are_whole = run.iter().all(|product| product.matrix.rows().is_multiple_of(TILE_ROWS));
        let has_room = shared_bytes(dtype, COLUMNS_MAX) <= self.shared_bytes();
        if !(x.columns <= COLUMNS_MAX && are_whole && has_room) {
            return Ok(false);
        }
        let (products, tiles) = WideArgs::new(run, (x, x.floats()), TILE_ROWS);
        let arguments = E4m3StreamArgs { products, tiles: tiles as u32 };
        let kernel = format!("stream_{}_{}", lower_name(dtype), kernel_columns(x.columns));
        // More than half of what there is: two blocks of one multiprocessor would leave another
        // without.
        let shared_bytes = shared_bytes(dtype, x.columns).max(self.shared_bytes() / 2);
        // Blocks that split columns for each other.
        let cluster = if kernel_columns(x.columns) == FEW_COLUMNS { 1 } else { 2 };
        let blocks = tiles.min(self.multiprocessors() / cluster * cluster);
        let shape = ([blocks.next_multiple_of(cluster), 1, 1], 32 * WARPS, shared_bytes);
        let manner = Manner::of_product(run.iter().map(|product| product.matrix));
        let manner = manner.in_clusters(cluster);
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch_as(&kernel, shape, manner, &arguments)? };
        Ok(true)
    }
}
