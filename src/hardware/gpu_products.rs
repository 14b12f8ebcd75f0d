//! What a GPU's products reach with weights of each type that lie in its own memory.

use super::measured::{GPU_TOKENS_MEASURED, GpuProductRates};
use tandem_cpu_kernels::{DType, quantize_row};
use tandem_kernels::{
    Columns, DeviceMatrix, DeviceMemory, EightBits, Gpu, GpuError, Product, RoundRows, half_bytes,
};

/// A matrix as large models have them.
const ROWS: usize = 14_336;
const COLS: usize = 4096;
/// Weights that are multiplied in turn: more than any cache holds.
const WEIGHT_BYTES: usize = 256 << 20;
/// Part of the free memory that weights may take, if that is less.
const MEMORY_DIVISOR: usize = 4;
/// Passes over all weights with each number of tokens, after one that loads the kernels; the best
/// counts, since others only ever take away.
const PASSES: usize = 5;
/// Rows whose values differ, and rows that are made of them at once.
const PATTERN_ROWS: usize = 16;
const PACKED_ROWS: usize = 512;
const F32: usize = size_of::<f32>();

/// Activations of some tokens in each form, and room for the products.
struct Rows {
    values: DeviceMemory,
    quants: DeviceMemory,
    scales: DeviceMemory,
    halves: DeviceMemory,
    out: DeviceMemory,
}

/// Multiply-accumulates per second for each type of which a matrix has room.
///
/// # Errors
/// No memory, or what the driver refuses.
pub(super) fn of_gpu(gpu: &Gpu) -> Result<Vec<GpuProductRates>, GpuError> {
    let rows = Rows::new(gpu)?;
    DType::ALL.into_iter().filter_map(|dtype| of_type(gpu, dtype, &rows).transpose()).collect()
}

fn of_type(gpu: &Gpu, dtype: DType, rows: &Rows) -> Result<Option<GpuProductRates>, GpuError> {
    let (free, _) = gpu.memory()?;
    let bytes = DeviceMatrix::bytes_of(dtype, ROWS, COLS);
    let count = WEIGHT_BYTES.min(free / MEMORY_DIVISOR) / bytes;
    if count == 0 {
        return Ok(None);
    }
    let matrices = (0..count).map(|_| DeviceMatrix::empty(gpu, dtype, (ROWS, COLS)));
    let matrices = matrices.collect::<Result<Vec<_>, _>>()?;
    fill(gpu, dtype, &matrices)?;
    let mut macs_per_second = [0.0; GPU_TOKENS_MEASURED.len()];
    for (rate, tokens) in macs_per_second.iter_mut().zip(GPU_TOKENS_MEASURED) {
        let x = rows.round(gpu, tokens)?;
        let pass = || {
            matrices.iter().try_for_each(|matrix| {
                let out = rows.out.span();
                gpu.multiply(&[Product { matrix, bias: None, out, stride: ROWS }], &x)
            })
        };
        let macs = (count * ROWS * COLS * tokens) as f64;
        *rate = macs / best_seconds(gpu, pass)?;
    }
    Ok(Some(GpuProductRates { dtype: dtype.to_string(), macs_per_second }))
}

/// Of several runs of what `pass` starts.
fn best_seconds(gpu: &Gpu, pass: impl Fn() -> Result<(), GpuError>) -> Result<f64, GpuError> {
    pass()?;
    let mut best_us = f64::INFINITY;
    for _ in 0..PASSES {
        gpu.synchronize()?;
        let before = gpu.mark()?;
        pass()?;
        let after = gpu.mark()?;
        gpu.synchronize()?;
        best_us = best_us.min(before.us_until(&after)?);
    }
    Ok(best_us.max(1e-3) * 1e-6)
}

/// Gives all matrices the same few rows, over and over.
fn fill(gpu: &Gpu, dtype: DType, matrices: &[DeviceMatrix]) -> Result<(), GpuError> {
    let mut pattern = vec![0; PATTERN_ROWS * dtype.row_bytes(COLS).expect("whole blocks")];
    quantize_row(dtype, &made_up(PATTERN_ROWS * COLS), &mut pattern);
    let file = pattern.repeat(PACKED_ROWS / PATTERN_ROWS);
    let staged = gpu.alloc(file.len())?;
    gpu.upload(&file, staged.span())?;
    for matrix in matrices {
        for start in (0..ROWS).step_by(PACKED_ROWS) {
            matrix.pack(gpu, staged.span(), start..ROWS.min(start + PACKED_ROWS))?;
        }
    }
    // Products ask for weights before the kernels ahead of them are done.
    gpu.synchronize()
}

impl Rows {
    fn new(gpu: &Gpu) -> Result<Rows, GpuError> {
        let (most, narrow) = (GPU_TOKENS_MEASURED[GPU_TOKENS_MEASURED.len() - 1], gpu.narrow_max());
        let values = gpu.alloc(most * COLS * F32)?;
        gpu.upload(&made_up(most * COLS), values.span())?;
        Ok(Rows {
            values,
            quants: gpu.alloc(EightBits::quant_bytes(narrow, COLS, 1))?,
            scales: gpu.alloc(EightBits::scale_bytes(narrow, COLS, 1))?,
            halves: gpu.alloc(half_bytes(most, COLS))?,
            out: gpu.alloc(most * ROWS * F32)?,
        })
    }

    /// The first rows in the forms that products of so many tokens read.
    fn round(&self, gpu: &Gpu, tokens: usize) -> Result<Columns<'_>, GpuError> {
        let is_narrow = tokens <= gpu.narrow_max();
        let quantised =
            EightBits { quants: self.quants.span(), scales: self.scales.span(), passes: 1 };
        let eight_bits = is_narrow.then_some(quantised);
        let halves = (!is_narrow).then(|| self.halves.span());
        let values = self.values.span();
        gpu.round_rows(&RoundRows {
            values,
            up: None,
            out: None,
            eight_bits,
            halves,
            rows: tokens,
            cols: COLS,
        })?;
        Ok(Columns { columns: tokens, cols: COLS, values: Some(values), eight_bits, halves })
    }
}

/// Numbers in ±1.
fn made_up(count: usize) -> Vec<f32> {
    (0..count).map(|at| ((at * 7919) % 2003) as f32 / 1001.5 - 1.0).collect()
}
