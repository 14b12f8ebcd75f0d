//! Products of F16 and BF16 weights on tensor cores against those in f32.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::specification::{file_bytes, got, got_with, wanted};
use gpu::{Random, cases, distance, gpu, on_gpu, with_smaller_ones};
use tandem_cpu_kernels::DType;
use tandem_kernels::{DeviceMatrix, Gpu, Staging};

const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

/// Blocks of a cluster divide what lies along rows, as many as follow from the matrix; one column
/// at a time meets the weights as f32.
fn agree_with_one_column(gpu: &Gpu, shapes: &[(usize, usize)], widths: &[usize]) {
    let staging = Staging::new(gpu).expect("staging memory");
    let mut random = Random(11);
    for (dtype, (rows, cols)) in
        DTYPES.into_iter().flat_map(|d| shapes.iter().map(move |s| (d, *s)))
    {
        let period = rows.min(48);
        let mut file = file_bytes(dtype, period, cols, &mut random).repeat(rows.div_ceil(period));
        file.truncate(rows * cols * 2);
        let matrix = DeviceMatrix::upload(gpu, &staging, dtype, (rows, cols), &file);
        let matrix = matrix.expect("an upload");
        let x = random.floats(widths.iter().max().copied().unwrap_or(0) * cols);
        let exact: Vec<f32> =
            x.chunks(cols).flat_map(|x| got(gpu, &[&matrix], x, false).remove(0)).collect();
        for columns in widths.iter().copied() {
            let some = got(gpu, &[&matrix], &x[..columns * cols], false).remove(0);
            let (off, largest) = distance(&some, &exact[..columns * rows]);
            let shape = format!("{dtype} [{rows}, {cols}] × {columns}");
            assert!(off <= 4e-6 * largest, "{shape}: {off} of {largest} off");
        }
    }
}

#[test]
fn clusters_of_blocks_have_the_products_of_f32_at_the_shapes_of_models() {
    let Some(gpu) = gpu() else { return };
    // The last one has chunks for seven of the eight blocks of a cluster.
    let shapes =
        [(1024, 4096), (28672, 4096), (4096, 14336), (4096, 4096), (6000, 2880), (2048, 4224)];
    let shapes: Vec<_> = cases(shapes, 6).collect();
    let widths: Vec<_> = cases([2, 7, 8, 9, 16, 17, 32, 40, 64, 65, 100, 128], 6).collect();
    agree_with_one_column(&gpu, &shapes, &widths);
}

#[test]
fn blocks_with_less_shared_memory_have_them_too() {
    for gpu in with_smaller_ones().iter().skip(1) {
        let shapes: Vec<_> = cases([(1000, 1096), (4096, 4096)], 2).collect();
        let widths: Vec<_> = cases([2, 8, 9, 16, 23, 64, 128], 3).collect();
        agree_with_one_column(gpu, &shapes, &widths);
    }
}

/// Columns meet these weights nearly as exactly as in f32, whatever their range.
#[test]
fn activations_of_any_range_meet_float_weights_on_tensor_cores() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let (mut random, rows, cols, columns) = (Random(12), 150, 512, 20);
    for dtype in DTYPES {
        let file = file_bytes(dtype, rows, cols, &mut random);
        let matrix = DeviceMatrix::upload(&gpu, &staging, dtype, (rows, cols), &file);
        let matrix = matrix.expect("an upload");
        for unit in [1e-30, 1e-9, 1e-3, 1.0, 1e4, 1e12, 1e30] {
            let mut x: Vec<f32> =
                random.floats(columns * cols).iter().map(|value| unit * value).collect();
            // One among small ones; and a column of zeros.
            x[7] = 300.0 * unit;
            x[cols..2 * cols].fill(0.0);
            let got = got(&gpu, &[&matrix], &x, false).remove(0);
            let wanted = wanted(dtype, (rows, cols), &file, &x);
            for (column, (got, wanted)) in got.chunks(rows).zip(wanted.chunks(rows)).enumerate() {
                let (off, largest) = distance(got, wanted);
                let what = format!("{dtype} {unit:e}, column {column}");
                assert!(off <= 4e-6 * largest, "{what}: {off} of {largest} off");
            }
        }
    }
}

/// BF16 has the range of f32: tiny and huge weights lose nothing.
#[test]
fn weights_of_any_range_are_multiplied_exactly() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let (mut random, rows, cols, columns) = (Random(13), 40, 384, 9);
    for unit in [1e-20f32, 1e-7, 1e6, 1e20] {
        let weights = random.floats(rows * cols).into_iter().map(|value| unit * value);
        let file: Vec<u8> =
            weights.flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect();
        let matrix = DeviceMatrix::upload(&gpu, &staging, DType::BF16, (rows, cols), &file);
        let matrix = matrix.expect("an upload");
        let x = random.floats(columns * cols);
        let bias = random.floats(rows);
        let bias: Vec<f32> = bias.iter().map(|value| unit * value).collect();
        let bias_memory = on_gpu(&gpu, &bias);
        let got = got_with(&gpu, &[&matrix], &x, (false, Some(&bias_memory))).remove(0);
        let mut wanted = wanted(DType::BF16, (rows, cols), &file, &x);
        for product in wanted.chunks_mut(rows) {
            product.iter_mut().zip(&bias).for_each(|(sum, bias)| *sum += bias);
        }
        let (off, largest) = distance(&got, &wanted);
        assert!(off <= 4e-6 * largest, "{unit:e}: {off} of {largest} off");
    }
}
