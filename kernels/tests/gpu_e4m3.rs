//! Products of e4m3 weights with few columns of f32 against the scalar specification.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::specification::{file_bytes, got, got_with, wanted};
use gpu::{Random, distance, gpu, on_gpu};
use tandem_cpu_kernels::DType;
use tandem_kernels::{DeviceMatrix, Staging};

/// Few columns meet e4m3 weights nearly as exactly as f32 does, whatever their range.
#[test]
fn activations_of_any_range_meet_e4m3_weights() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let (mut random, rows, cols, columns) = (Random(9), 40, 512, 6);
    let file = file_bytes(DType::E4M3_128, rows, cols, &mut random);
    let matrix = DeviceMatrix::upload(&gpu, &staging, DType::E4M3_128, (rows, cols), &file);
    let matrix = matrix.expect("an upload");
    for unit in [1e-30, 1e-9, 1e-3, 1e4, 1e12, 1e30] {
        let mut x: Vec<f32> =
            random.floats(columns * cols).iter().map(|value| unit * value).collect();
        // One among small ones; and a column of zeros.
        x[7] = 300.0 * unit;
        x[cols..2 * cols].fill(0.0);
        let got = got(&gpu, &[&matrix], &x, false).remove(0);
        let wanted = wanted(DType::E4M3_128, (rows, cols), &file, &x);
        for (column, (got, wanted)) in got.chunks(rows).zip(wanted.chunks(rows)).enumerate() {
            let (off, largest) = distance(got, wanted);
            assert!(off <= 4e-6 * largest, "{unit:e}, column {column}: {off} of {largest} off");
        }
    }
}

/// Rows of several segments, in tiles of several matrices that blocks take in turn.
#[test]
fn blocks_take_many_tiles_and_segments_of_e4m3_in_turn() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let mut random = Random(10);
    for (dtype, rows, cols) in [
        (DType::E4M3_128, [4432, 208], 768),
        (DType::E4M3_128, [400, 16], 12_672),
        (DType::E4M3_32, [4640, 16], 800),
        (DType::E4M3_32, [32, 80], 9_248),
    ] {
        let files = rows.map(|rows| file_bytes(dtype, rows, cols, &mut random));
        let matrices = [0, 1].map(|i| {
            let shape = (rows[i], cols);
            DeviceMatrix::upload(&gpu, &staging, dtype, shape, &files[i]).expect("an upload")
        });
        let x = random.floats(8 * cols);
        let bias = random.floats(rows[0].max(rows[1]));
        let bias_memory = on_gpu(&gpu, &bias);
        for columns in [1, 3, 4, 5, 8] {
            let x = &x[..columns * cols];
            let both = [&matrices[0], &matrices[1]];
            let got = got_with(&gpu, &both, x, (false, Some(&bias_memory)));
            for ((rows, file), got) in rows.into_iter().zip(&files).zip(&got) {
                let mut wanted = wanted(dtype, (rows, cols), file, x);
                for product in wanted.chunks_mut(rows) {
                    product.iter_mut().zip(&bias).for_each(|(sum, bias)| *sum += bias);
                }
                let (off, largest) = distance(got, &wanted);
                let shape = format!("{dtype} [{rows}, {cols}] × {columns}");
                assert!(off <= 4e-6 * largest, "{shape}: {off} of {largest} off");
            }
        }
    }
}
