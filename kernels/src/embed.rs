//! Rows of an embedding in f32, which a step starts from.

use crate::gpu::{Gpu, GpuError, Span};
use crate::pack::{DeviceMatrix, Planes, has_planes};
use crate::products::CHUNK;
use cudarc::driver::DeviceRepr;
use tandem_cpu_kernels::blocks::GROUP;

const THREADS: usize = 128;
/// Elements of a thread: of a float row, and of one in planes.
const FLOATS: usize = 4;
const LANE: usize = GROUP * CHUNK / 4;

/// Rows of a matrix, times a factor.
#[derive(Clone, Copy)]
pub struct EmbedRows<'a> {
    /// `[rows, cols]`
    pub table: &'a DeviceMatrix,
    /// u32 numbers of the tokens' rows, each below `rows`; `None`: token t has row t.
    pub rows: Option<Span<'a>>,
    /// How many there are.
    pub tokens: usize,
    /// What all elements are multiplied with.
    pub scale: f32,
    /// `[tokens, cols]` f32
    pub out: Span<'a>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct EmbedArgs {
    planes: Planes,
    rows: u64,
    out: u64,
    cols: u32,
    padded: u32,
    scale: f32,
    table_rows: u32,
}

// SAFETY: plain numbers in the order of `EmbedArgs` in embed.cu.
unsafe impl DeviceRepr for EmbedArgs {}

impl Gpu {
    /// `out[t] = scale · table[rows[t]]`
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short. That the numbers name rows of the table is the caller's promise.
    pub fn embed_rows(&self, pass: &EmbedRows<'_>) -> Result<(), GpuError> {
        let (table, tokens) = (pass.table, pass.tokens);
        let (cols, dtype) = (table.cols(), table.dtype());
        assert!(cols.is_multiple_of(FLOATS), "rows of {cols} elements");
        assert!(pass.rows.is_some() || tokens <= table.rows(), "{tokens} of {} rows", table.rows());
        let padded = cols.div_ceil(GROUP).next_multiple_of(CHUNK);
        let arguments = EmbedArgs {
            planes: table.planes(),
            rows: pass.rows.map_or(0, |rows| rows.of(tokens, size_of::<u32>())),
            out: pass.out.of(tokens * cols, size_of::<f32>()),
            cols: cols as u32,
            padded: padded as u32,
            scale: pass.scale,
            table_rows: table.rows() as u32,
        };
        let threads = if has_planes(dtype) { padded * GROUP / LANE } else { cols.div_ceil(FLOATS) };
        let kernel = format!("embed_{}", dtype.name().to_ascii_lowercase());
        let grid = [threads.div_ceil(THREADS), tokens, 1];
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&kernel, (grid, THREADS, 0), &arguments) }
    }
}
