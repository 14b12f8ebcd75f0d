//! Products of e4m3 weights with a few columns in f32 (`e4m3.cu`).

use crate::gpu::{Gpu, GpuError};
use crate::launch::Manner;
use crate::products::{Columns, Product, lower_name};
use crate::wide::WideArgs;

/// Rows, columns and threads of a block.
pub(crate) const ROWS: usize = 32;
const COLUMNS: usize = 8;
pub(crate) const THREADS: usize = 256;

impl Gpu {
    pub(crate) fn multiply_e4m3(
        &self,
        run: &[Product<'_>],
        x: &Columns<'_>,
    ) -> Result<(), GpuError> {
        let (arguments, blocks) = WideArgs::new(run, (x, x.floats()), ROWS);
        let kernel = format!("matvec_{}", lower_name(run[0].matrix.dtype()));
        let grid = [blocks, x.columns.div_ceil(COLUMNS), 1];
        let manner = Manner::of_product(run.iter().map(|product| product.matrix));
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch_as(&kernel, (grid, THREADS, 0), manner, &arguments) }
    }
}
