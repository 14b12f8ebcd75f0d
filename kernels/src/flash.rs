//! Attention of many tokens of one sequence, on tensor cores: what prompts take (FlashAttention-2,
//! arXiv 2307.08691). Queries, keys, values and weights meet as f16, whatever the type of the
//! store, with sums in f32; a token's bits do not depend on which tokens it shares a tile with.

use crate::attention::{Attend, AttendArgs, HeadCounts, KvSpans, TokenTables};
use crate::gpu::{Gpu, GpuError, Span};
use crate::launch::Manner;
use cudarc::driver::DeviceRepr;

/// Rows of a warp.
const WARP_ROWS: usize = 16;
/// Warps of a block and keys of a step, as in flash.cu: the larger where it fits.
const TILES: [(usize, usize); 2] = [(8, 64), (4, 32)];

/// Sequences whose tokens follow each other in a step.
#[derive(Clone, Copy, Debug)]
pub struct Runs<'a> {
    /// First token in the step and number of tokens, at least one, of each.
    pub lengths: &'a [[u32; 2]],
    /// The same on the GPU.
    pub on_gpu: Span<'a>,
    /// Blocks that divide the positions that a tile of tokens sees, up to
    /// [`Gpu::run_blocks_max`], which is for few tokens and many positions. A token's bits depend
    /// on it.
    pub blocks: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FlashArgs {
    attend: AttendArgs,
    runs: u64,
    tile_tokens: u32,
    blocks: u32,
}

// SAFETY: plain numbers in the order of `FlashArgs` in flash.cu.
unsafe impl DeviceRepr for FlashArgs {}

/// Elements of a head that the kernel is for, the warps of its blocks, and their shared memory.
struct Tile {
    width: usize,
    warps: usize,
    bytes: usize,
}

impl Gpu {
    fn flash_tile(&self, heads: HeadCounts) -> Option<Tile> {
        let width = heads.head_dim.next_power_of_two().max(64);
        let group = heads.n_heads / heads.n_kv_heads;
        let tile = |(warps, keys): (usize, usize)| Tile {
            width,
            warps,
            // Queries, and two tiles of keys and of values, f16.
            bytes: (WARP_ROWS * warps + 4 * keys) * width * size_of::<u16>(),
        };
        let fits =
            |tile: &Tile| group <= WARP_ROWS * tile.warps && tile.bytes <= self.shared_bytes();
        TILES.into_iter().map(tile).find(fits)
    }

    /// Whether [`Gpu::attend_runs`] can attend with such heads.
    pub fn has_flash(&self, heads: HeadCounts) -> bool {
        heads.is_supported() && self.flash_tile(heads).is_some()
    }

    /// Most blocks that can divide the positions of a tile of tokens.
    pub fn run_blocks_max(&self) -> usize {
        self.cluster_max()
    }

    /// What [`Gpu::attend`] does, for all tokens of some sequences.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short, a run is of tokens that the step does not have, blocks are not a
    /// power of two up to [`Gpu::run_blocks_max`], or [`Gpu::has_flash`] says no. That the runs on
    /// the GPU are the same, positions of a run ascend by one, and block tables name blocks of the
    /// store, is the caller's promise.
    pub fn attend_runs(
        &self,
        pass: &Attend<'_>,
        heads: HeadCounts,
        (tokens, store): (&TokenTables<'_>, &KvSpans<'_>),
        runs: &Runs<'_>,
    ) -> Result<(), GpuError> {
        let tile = self.flash_tile(heads).expect("heads that the kernels support");
        let tile_tokens = WARP_ROWS * tile.warps / (heads.n_heads / heads.n_kv_heads);
        let blocks = runs.blocks;
        let can_divide = blocks.is_power_of_two() && blocks <= self.run_blocks_max();
        assert!(can_divide, "{blocks} blocks, at most {}", self.run_blocks_max());
        let mut tiles = 0;
        for [first, count] in runs.lengths.iter().map(|run| run.map(|n| n as usize)) {
            assert!(count > 0 && first + count <= tokens.tokens, "{count} tokens from {first}");
            tiles += count.div_ceil(tile_tokens);
        }
        let arguments = FlashArgs {
            attend: pass.arguments(heads, 0, (tokens, store)),
            runs: runs.on_gpu.unaligned(runs.lengths.len(), size_of::<[u32; 2]>()),
            tile_tokens: tile_tokens as u32,
            blocks: blocks as u32,
        };
        let kernel = format!("flash_{}_{}_{}", store.dtype, tile.width, tile.warps);
        let grid = [heads.n_kv_heads * blocks, tiles, 1];
        let shape = (grid, 32 * tile.warps, tile.bytes);
        let manner = Manner::of_product([]).in_clusters(blocks);
        // SAFETY: all spans were checked against the shapes, and the runs against the tokens.
        unsafe { self.launch_as(&kernel, shape, manner, &arguments) }
    }
}
