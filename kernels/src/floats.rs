//! Products of float weights with up to 128 tokens, whose activations they meet as f32
//! (`floats.cu`), or nearly so (`float_tiles.cu`).

use crate::gpu::{Gpu, GpuError};
use crate::launch::Manner;
use crate::products::{Columns, Product, lower_name};
use cudarc::driver::DeviceRepr;

/// Most tokens whose activations float weights meet as f32.
pub(crate) const FLOATS_MAX: usize = 128;
const WARPS: usize = 4;
/// Columns that a warp has together, and its rows.
const SHAPES: [(usize, usize); 3] = [(1, 1), (4, 2), (8, 4)];

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct FloatArgs {
    weights: u64,
    x: u64,
    bias: u64,
    out: u64,
    rows: u32,
    cols: u32,
    columns: u32,
    stride: u32,
}

// SAFETY: plain numbers in the order of `FloatArgs` in floats.cuh.
unsafe impl DeviceRepr for FloatArgs {}

impl FloatArgs {
    pub(crate) fn new(product: &Product<'_>, x: &Columns<'_>) -> Self {
        let (bias, out) = product.pointers(x);
        Self {
            weights: product.matrix.span().pointer,
            x: x.floats(),
            bias,
            out,
            rows: product.matrix.rows() as u32,
            cols: product.matrix.cols() as u32,
            columns: x.columns as u32,
            stride: product.stride as u32,
        }
    }
}

impl Gpu {
    pub(crate) fn multiply_floats(
        &self,
        product: &Product<'_>,
        x: &Columns<'_>,
    ) -> Result<(), GpuError> {
        let arguments = FloatArgs::new(product, x);
        let wider = SHAPES.into_iter().find(|(columns, _)| *columns >= x.columns);
        let (columns, warp_rows) = wider.unwrap_or(SHAPES[SHAPES.len() - 1]);
        let kernel = format!("matvec_{}_{columns}", lower_name(product.matrix.dtype()));
        let blocks = product.matrix.rows().div_ceil(WARPS * warp_rows);
        let grid = [blocks, x.columns.div_ceil(columns), 1];
        let manner = Manner::of_product([product.matrix]);
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch_as(&kernel, (grid, 32 * WARPS, 0), manner, &arguments) }
    }
}
