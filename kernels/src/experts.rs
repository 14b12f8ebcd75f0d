//! Products of a step's experts with the tokens that go through them (`experts.cu`, and on Hopper
//! with f16 activations `expert_tiles.cu`).
//!
//! A matrix has the rows of all experts, one after the other; which columns an expert is multiplied
//! with the GPU alone knows ([`ExpertRoutes`](crate::ExpertRoutes)). A pair of token and expert has
//! the same bits in any step whose activations have the same form; as f16 on Hopper, in any whose
//! experts have 32 tokens or more on average, and in any whose experts have fewer.

use crate::e4m3;
use crate::gpu::{Gpu, GpuError, Span};
use crate::launch::Manner;
use crate::pack::{DeviceMatrix, has_planes, lane_bytes};
use crate::products::{
    CHUNK, Columns, PARTS, Part, ProductArgs, SCALE_BYTES, half_bytes, lower_name,
};
use crate::route::Routed;
use crate::wide::WideArgs;
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::DType;
use tandem_cpu_kernels::blocks::GROUP;

/// Matrices that one launch can multiply.
const MATRICES: usize = 2;
const WARPS: usize = 8;
const THREADS: usize = 32 * WARPS;
/// Rows that a warp multiplies at once, and columns that it does with 8 bits.
const WARP_ROWS: usize = 16;
const NARROW_COLUMNS: usize = 8;
/// Longest rows, in chunks, that are divided into two ranges instead of eight, and of which blocks
/// with f16 are small where experts have few columns.
const SHORT_CHUNKS: usize = 32;
/// Blocks with f16, and how many columns an expert has on average, at most, where it is the first.
const WIDE_BLOCKS: [WideBlock; 2] =
    [WideBlock { columns: 16, warps: 4, depth: 3 }, WideBlock { columns: 64, warps: 8, depth: 2 }];
const FEW_COLUMNS: usize = 12;
/// How many columns an expert has on average, at most, where this is faster on Hopper as well: with
/// 32 it is where all experts have as many, but real routes are less even (`docs/performance.md`).
const WIDE_AVERAGE_MAX: usize = 31;
/// Most blocks that share an expert's columns.
const SPLITS_MAX: usize = 16;
/// A tile of `expert_tiles.cu`, and the threads and the shared memory of a block: columns, weights
/// and their barriers, and what the first may be moved by.
const TILE_ROWS: usize = 128;
const TILE_COLUMNS: usize = 256;
const TILE_THREADS: usize = 384;
const TILE_BYTES: usize = (128 << 10) + 128 + (64 << 10) + 128 + 1024;
const F32: usize = size_of::<f32>();

/// `out = matrix_e · x` for each pair of token and expert e.
#[derive(Clone, Copy)]
pub struct ExpertProduct<'a> {
    /// `[n_experts · rows, cols]`
    pub matrix: &'a DeviceMatrix,
    /// `[pairs, rows]` f32
    pub out: Span<'a>,
}

/// `out = Σ_e weight_e · products` over the experts of each token, by ascending index.
#[derive(Clone, Copy, Debug)]
pub struct ExpertSums<'a> {
    /// `[pairs, cols]` f32
    pub products: Span<'a>,
    /// `[tokens, cols]` f32
    pub out: Span<'a>,
    /// Elements of a row.
    pub cols: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Experts {
    slots: u64,
    pairs: u64,
    rows: u32,
    row_blocks: u32,
    sharing: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ExpertArgs<A> {
    product: A,
    experts: Experts,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ExpertFloatArgs {
    weights: [u64; MATRICES],
    out: [u64; MATRICES],
    x: u64,
    experts: Experts,
    cols: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumArgs {
    products: u64,
    weights: u64,
    out: u64,
    cols: u32,
    n_used: u32,
}

// SAFETY: plain numbers in the order of `ExpertNarrowArgs` in experts.cu.
unsafe impl DeviceRepr for ExpertArgs<ProductArgs> {}
// SAFETY: plain numbers in the order of `ExpertWideArgs` in experts.cuh and `ExpertE4m3Args` in
// experts.cu.
unsafe impl DeviceRepr for ExpertArgs<WideArgs> {}
// SAFETY: plain numbers in the order of `ExpertFloatArgs` in experts.cu.
unsafe impl DeviceRepr for ExpertFloatArgs {}
// SAFETY: plain numbers in the order of `SumArgs` in experts.cu.
unsafe impl DeviceRepr for SumArgs {}

/// A block of `expert_wide`: as `ExpertShape` of experts.cu.
#[derive(Clone, Copy)]
struct WideBlock {
    columns: usize,
    warps: usize,
    depth: usize,
}

/// Matrices of one type and shape, over the same activations.
struct ExpertRun<'a> {
    products: &'a [ExpertProduct<'a>],
    x: &'a Columns<'a>,
    routed: Routed<'a>,
    /// Of an expert.
    rows: usize,
}

impl ExpertRun<'_> {
    fn dtype(&self) -> DType {
        self.products[0].matrix.dtype()
    }

    /// What kernels know of the experts, whose blocks have `block_rows` rows; and the grid.
    fn experts(&self, block_rows: usize) -> (Experts, [usize; 2]) {
        let row_blocks = self.rows.div_ceil(block_rows);
        let (slots, pairs) = self.routed.lists();
        let sharing = self.routed.pairs() / self.x.columns.max(1);
        let experts = Experts {
            slots,
            pairs,
            rows: self.rows as u32,
            row_blocks: row_blocks as u32,
            sharing: sharing as u32,
            unused: 0,
        };
        (experts, [row_blocks * self.products.len(), self.routed.slots()])
    }

    /// Columns that an expert has on average.
    fn average(&self) -> usize {
        self.routed.pairs().div_ceil(self.routed.routes.n_experts())
    }

    fn manner(&self) -> Manner {
        Manner::of_product(self.products.iter().map(|product| product.matrix))
    }

    fn out(&self, product: &ExpertProduct<'_>) -> u64 {
        product.out.of(self.routed.pairs() * self.rows, F32)
    }

    fn parts(&self) -> [Part; PARTS] {
        let mut parts = [Part::default(); PARTS];
        for (part, product) in parts.iter_mut().zip(self.products) {
            *part = Part::of_experts(product.matrix, self.out(product), self.rows);
        }
        parts
    }

    /// For activations at a pointer.
    fn wide_args(&self, experts: Experts, x: u64) -> ExpertArgs<WideArgs> {
        let parts = (self.parts(), self.products.len());
        ExpertArgs { product: WideArgs::with_parts(parts, (self.x, x)), experts }
    }

    /// The same for f16 activations.
    fn halves_args(&self, experts: Experts, halves: Span<'_>) -> ExpertArgs<WideArgs> {
        self.wide_args(experts, halves.of(half_bytes(self.x.columns, self.x.cols), 1))
    }
}

impl DeviceMatrix {
    /// Whether the kernels can multiply with experts of so many rows each: those of quantised and
    /// e4m3 weights lie in blocks of 16.
    pub fn supports_experts(dtype: DType, rows: usize) -> bool {
        match dtype {
            DType::F32 | DType::F16 | DType::BF16 => true,
            _ => has_planes(dtype) && rows.is_multiple_of(WARP_ROWS),
        }
    }
}

impl Gpu {
    /// Products of the experts of all pairs over the same activations, which are those of the
    /// tokens or, for each pair its own, of the pairs.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short, a matrix has other columns or no whole experts, or the activations
    /// lack the form that a matrix's type needs.
    pub fn multiply_experts(
        &self,
        products: &[ExpertProduct<'_>],
        x: &Columns<'_>,
        routed: Routed<'_>,
    ) -> Result<(), GpuError> {
        let of_pairs = x.columns == routed.pairs();
        assert!(of_pairs || x.columns == routed.tokens, "{} columns", x.columns);
        let n_experts = routed.routes.n_experts();
        let kind = |product: &ExpertProduct<'_>| (product.matrix.dtype(), product.matrix.rows());
        for run in products.chunk_by(|a, b| kind(a) == kind(b)) {
            for products in run.chunks(MATRICES) {
                let (dtype, all_rows) = kind(&products[0]);
                for product in products {
                    assert_eq!(product.matrix.cols(), x.cols, "elements of a row and of a token");
                }
                assert!(all_rows.is_multiple_of(n_experts), "{all_rows} rows of {n_experts}");
                let rows = all_rows / n_experts;
                assert!(DeviceMatrix::supports_experts(dtype, rows), "experts of {rows} rows");
                let run = ExpertRun { products, x, routed, rows };
                match x.halves.filter(|_| has_planes(dtype)) {
                    Some(halves) if self.has_wgmma() && run.average() > WIDE_AVERAGE_MAX => {
                        self.experts_tiles(&run, halves)?;
                    }
                    Some(halves) => self.experts_wide(&run, halves)?,
                    None if dtype.is_quantized() => self.experts_narrow(&run)?,
                    None if has_planes(dtype) => self.experts_e4m3(&run)?,
                    None => self.experts_floats(&run)?,
                }
            }
        }
        Ok(())
    }

    fn experts_narrow(&self, run: &ExpertRun<'_>) -> Result<(), GpuError> {
        let ranges = if run.x.cols.div_ceil(CHUNK * GROUP) <= SHORT_CHUNKS { 2 } else { 8 };
        let (experts, [blocks, slots]) = run.experts(WARPS / ranges * WARP_ROWS);
        let parts = (run.products.len(), blocks);
        let product = ProductArgs::with_parts(run.parts(), parts, run.x);
        let arguments = ExpertArgs { product, experts };
        let lane = lane_bytes(run.dtype());
        let depth = if lane > 16 { 2 } else { 3 };
        let activations = WARPS * NARROW_COLUMNS * CHUNK * (GROUP + SCALE_BYTES);
        let shared_bytes = depth * (2 * THREADS * lane + activations);
        let kernel = format!("expert_narrow_{}_{ranges}", lower_name(run.dtype()));
        let shape = ([blocks, slots, 1], THREADS, shared_bytes);
        // SAFETY: all spans were checked against the shapes, and routes name no other pairs.
        unsafe { self.launch_as(&kernel, shape, run.manner(), &arguments) }
    }

    fn experts_wide(&self, run: &ExpertRun<'_>, halves: Span<'_>) -> Result<(), GpuError> {
        let average = run.average();
        // Long rows are read faster by few blocks (14336 elements on an H200: 144 µs, not 210).
        let is_long = run.x.cols.div_ceil(CHUNK * GROUP) > SHORT_CHUNKS;
        let WideBlock { columns, warps, depth } =
            WIDE_BLOCKS[usize::from(is_long || average > FEW_COLUMNS)];
        let (experts, [blocks, slots]) = run.experts(warps * WARP_ROWS);
        let arguments = run.halves_args(experts, halves);
        // As many blocks as an expert's columns fill where all experts have as many.
        let splits = average.div_ceil(columns).clamp(1, SPLITS_MAX);
        let threads = 32 * warps;
        let weights = 2 * threads * lane_bytes(run.dtype());
        let shared_bytes = depth * (weights + 2 * columns * CHUNK * GROUP);
        let kernel = format!("expert_wide_{}_{columns}", lower_name(run.dtype()));
        let shape = ([blocks, slots, splits], threads, shared_bytes);
        // SAFETY: as in `experts_narrow`.
        unsafe { self.launch_as(&kernel, shape, run.manner(), &arguments) }
    }

    fn experts_tiles(&self, run: &ExpertRun<'_>, halves: Span<'_>) -> Result<(), GpuError> {
        let (experts, [blocks, slots]) = run.experts(TILE_ROWS);
        let arguments = run.halves_args(experts, halves);
        // No expert has more than one tile of columns that is not whole.
        let tiles = blocks * (slots + run.routed.pairs() / TILE_COLUMNS);
        let kernel = format!("expert_tiles_{}", lower_name(run.dtype()));
        let shape = ([tiles.min(self.multiprocessors()), 1, 1], TILE_THREADS, TILE_BYTES);
        // SAFETY: as in `experts_narrow`.
        unsafe { self.launch_as(&kernel, shape, run.manner(), &arguments) }
    }

    fn experts_e4m3(&self, run: &ExpertRun<'_>) -> Result<(), GpuError> {
        let (experts, [blocks, slots]) = run.experts(e4m3::ROWS);
        let arguments = run.wide_args(experts, run.x.floats());
        let kernel = format!("expert_{}", lower_name(run.dtype()));
        let shape = ([blocks, slots, 1], e4m3::THREADS, 0);
        // SAFETY: as in `experts_narrow`.
        unsafe { self.launch_as(&kernel, shape, run.manner(), &arguments) }
    }

    fn experts_floats(&self, run: &ExpertRun<'_>) -> Result<(), GpuError> {
        let (experts, [blocks, slots]) = run.experts(WARPS);
        let (mut weights, mut out) = ([0; MATRICES], [0; MATRICES]);
        for (index, product) in run.products.iter().enumerate() {
            (weights[index], out[index]) = (product.matrix.span().pointer, run.out(product));
        }
        let arguments = ExpertFloatArgs {
            weights,
            out,
            x: run.x.floats(),
            experts,
            cols: run.x.cols as u32,
            unused: 0,
        };
        let kernel = format!("expert_floats_{}", lower_name(run.dtype()));
        // SAFETY: as in `experts_narrow`.
        unsafe {
            self.launch_as(&kernel, ([blocks, slots, 1], THREADS, 0), run.manner(), &arguments)
        }
    }

    /// Adds up what each token's experts made, times their weights.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short or a row no multiple of 4.
    pub fn sum_experts(&self, sums: &ExpertSums<'_>, routed: Routed<'_>) -> Result<(), GpuError> {
        let cols = sums.cols;
        assert!(cols.is_multiple_of(4), "rows are read in fours, got {cols}");
        let arguments = SumArgs {
            products: sums.products.of(routed.pairs() * cols, F32),
            weights: routed.weights(),
            out: sums.out.of(routed.tokens * cols, F32),
            cols: cols as u32,
            n_used: routed.routes.n_used() as u32,
        };
        let shape = ([routed.tokens, cols.div_ceil(4 * THREADS), 1], THREADS, 0);
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch("sum_experts", shape, &arguments) }
    }
}
