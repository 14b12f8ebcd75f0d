//! Products in which weights of any type meet activations as f16: `middle.cu`, `wide.cu`.

use crate::gpu::{Gpu, GpuError, Span, WGMMA_CAPABILITY};
use crate::launch::Manner;
use crate::pack::has_planes;
use crate::products::{CHUNK, Columns, PARTS, Part, Product, half_bytes, lower_name, parts};
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::blocks::GROUP;

/// Most tokens of a product whose blocks may divide what lies along rows, where there is wgmma.
pub(crate) const MIDDLE_MAX: usize = 128;
/// The same of products in 8 bits where there are faster ones for more.
const NARROW_MAX_HOPPER: usize = 8;
/// Rows and threads of its blocks.
const MIDDLE_ROWS: usize = 128;
const MIDDLE_THREADS: usize = 256;
/// Bytes of weights on their way to a block (at most), and of activations of a column's chunk.
const MIDDLE_WEIGHT_BYTES: usize = 56 << 10;
const CHUNK_BYTES: usize = 2 * CHUNK * GROUP;
/// Shared memory of the wide kernel for each column of a tile of activations.
const WIDE_COLUMN_BYTES: usize = 128;
/// What the first tile's start may be moved by, and barriers.
const EXTRA_BYTES: usize = 1024 + 128;
/// Blocks of the wide kernel where it has wgmma, and elsewhere (`wide.cu`).
const WGMMA_TILES: [WideTile; 3] = [
    WideTile { rows: 128, columns: 256, threads: 384, copies: 6, cost: 48 },
    WideTile { rows: 192, columns: 128, threads: 512, copies: 6, cost: 40 },
    WideTile { rows: 128, columns: 128, threads: 384, copies: 6, cost: 30 },
];
const MMA_TILES: [WideTile; 2] = [
    WideTile { rows: 128, columns: 128, threads: 256, copies: 2, cost: 18 },
    WideTile { rows: 128, columns: 64, threads: 256, copies: 2, cost: 10 },
];

/// `WideArgs` of wide.cuh, and `E4m3Args` of e4m3.cu.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct WideArgs {
    parts: [Part; PARTS],
    x: u64,
    n_parts: u32,
    padded: u32,
    columns: u32,
    cols: u32,
}

// SAFETY: plain numbers in the order of both structures.
unsafe impl DeviceRepr for WideArgs {}

impl WideArgs {
    /// For activations at a pointer and blocks of some rows, and how many of these there are.
    pub(crate) fn new(
        run: &[Product<'_>],
        (x, pointer): (&Columns<'_>, u64),
        block_rows: usize,
    ) -> (WideArgs, usize) {
        let (parts, blocks) = parts(run, x, block_rows);
        (Self::with_parts((parts, run.len()), (x, pointer)), blocks)
    }

    /// For parts that are made already, and how many these are.
    pub(crate) fn with_parts(
        (parts, n_parts): ([Part; PARTS], usize),
        (x, pointer): (&Columns<'_>, u64),
    ) -> WideArgs {
        WideArgs {
            parts,
            x: pointer,
            n_parts: n_parts as u32,
            padded: x.cols.div_ceil(GROUP).next_multiple_of(CHUNK) as u32,
            columns: x.columns as u32,
            cols: x.cols as u32,
        }
    }
}

/// Columns of a block of `middle.cu` for some columns, and tiles of these that are on their way.
fn middle_tiles(columns: usize) -> (usize, usize) {
    match columns {
        0..=32 => (32, 4),
        33..=64 => (64, 3),
        _ => (128, 4),
    }
}

fn middle_shared_bytes(columns: usize) -> usize {
    let (columns, tiles) = middle_tiles(columns);
    tiles * columns * CHUNK_BYTES + MIDDLE_WEIGHT_BYTES + EXTRA_BYTES
}

impl Gpu {
    /// Most tokens whose products meet activations in 8 bits: Hopper has faster ones for more.
    pub fn narrow_max(&self) -> usize {
        if self.has_middle() { NARROW_MAX_HOPPER } else { MIDDLE_MAX }
    }

    /// The same of a GPU of some compute capability that nobody has opened.
    pub fn narrow_max_of(capability: (u32, u32)) -> usize {
        if capability == WGMMA_CAPABILITY { NARROW_MAX_HOPPER } else { MIDDLE_MAX }
    }

    /// Whether there is wgmma, and shared memory for products whose blocks divide what lies along
    /// rows.
    fn has_middle(&self) -> bool {
        self.has_wgmma() && middle_shared_bytes(MIDDLE_MAX) <= self.shared_bytes()
    }

    pub(crate) fn multiply_halves(
        &self,
        run: &[Product<'_>],
        x: &Columns<'_>,
        halves: Span<'_>,
    ) -> Result<(), GpuError> {
        let halves = halves.of(half_bytes(x.columns, x.cols), 1);
        if x.columns <= MIDDLE_MAX && self.has_middle() && has_planes(run[0].matrix.dtype()) {
            self.multiply_middle(run, x, halves)
        } else {
            self.multiply_wide(run, x, halves)
        }
    }

    fn multiply_middle(
        &self,
        run: &[Product<'_>],
        x: &Columns<'_>,
        halves: u64,
    ) -> Result<(), GpuError> {
        let (arguments, blocks) = WideArgs::new(run, (x, halves), MIDDLE_ROWS);
        // As many as there is room for at a time, whatever the number of columns.
        let chunks = arguments.padded as usize / CHUNK;
        let room = 2 * self.multiprocessors();
        let cluster = self.row_cluster(chunks, |cluster| 2 * cluster * blocks <= room);
        let (columns, _) = middle_tiles(x.columns);
        let shared_bytes = middle_shared_bytes(x.columns);
        let kernel = format!("middle_{}_{columns}", lower_name(run[0].matrix.dtype()));
        let shape = ([cluster, blocks, 1], MIDDLE_THREADS, shared_bytes);
        let manner = Manner::of_product(run.iter().map(|product| product.matrix));
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch_as(&kernel, shape, manner.in_clusters(cluster), &arguments) }
    }

    fn multiply_wide(
        &self,
        run: &[Product<'_>],
        x: &Columns<'_>,
        halves: u64,
    ) -> Result<(), GpuError> {
        let tile = self.wide_tile(run, x.columns);
        let (arguments, blocks) = WideArgs::new(run, (x, halves), tile.rows);
        let name = lower_name(run[0].matrix.dtype());
        let kernel = format!("wide_{name}_{}_{}", tile.rows, tile.columns);
        let grid = [x.columns.div_ceil(tile.columns), blocks, 1];
        let shape = (grid, tile.threads, tile.shared_bytes());
        let manner = Manner::of_product(run.iter().map(|product| product.matrix));
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch_as(&kernel, shape, manner, &arguments) }
    }

    /// The tile whose blocks, as many at a time as there are multiprocessors, are done first.
    fn wide_tile(&self, run: &[Product<'_>], columns: usize) -> WideTile {
        let tiles = if self.has_wgmma() { &WGMMA_TILES[..] } else { &MMA_TILES[..] };
        let cost = |tile: &WideTile| {
            let row_blocks = run.iter().map(|product| product.matrix.rows().div_ceil(tile.rows));
            let blocks = row_blocks.sum::<usize>() * columns.div_ceil(tile.columns);
            blocks.div_ceil(self.multiprocessors()) * tile.cost
        };
        let fitting = tiles.iter().filter(|tile| tile.shared_bytes() <= self.shared_bytes());
        *fitting.min_by_key(|tile| cost(tile)).expect("a tile that fits")
    }
}

/// A block of the wide kernel.
#[derive(Clone, Copy)]
struct WideTile {
    rows: usize,
    columns: usize,
    threads: usize,
    /// Tiles of activations in shared memory.
    copies: usize,
    /// How long it takes next to others, in µs for 4096 weights per row on an H200.
    cost: usize,
}

impl WideTile {
    fn shared_bytes(&self) -> usize {
        self.copies * self.columns * WIDE_COLUMN_BYTES + EXTRA_BYTES
    }
}
