//! Products on the GPU against the scalar specification of the CPU kernels.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::specification::{file_bytes, got, round, wanted};
use gpu::{EightBitMemory, Random, cases, distance, from_gpu, gpu, on_gpu, with_smaller_ones};
use tandem_cpu_kernels::{DType, dequantize_row, quantize_row};
use tandem_kernels::{Columns, DeviceMatrix, Gate, Gated, Gpu, Product, Staging, half_bytes};

/// Whether up to 128 columns meet weights of a type in f32, on any GPU.
fn is_plain_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

fn root_mean_square(values: &[f32]) -> f32 {
    (values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32).sqrt()
}

/// Products of some types at odd shapes.
fn agree_with_the_specification(gpu: &Gpu, dtypes: impl Iterator<Item = DType>, batches: &[usize]) {
    let staging = Staging::new(gpu).expect("staging memory");
    let mut random = Random(1);
    for dtype in dtypes {
        for (rows, cols) in cases([(37, 768), (1, 256), (300, 2304), (45, 320), (50, 384)], 5) {
            if dtype.row_bytes(cols).is_none() {
                continue;
            }
            let file = file_bytes(dtype, rows, cols, &mut random);
            let matrix = DeviceMatrix::upload(gpu, &staging, dtype, (rows, cols), &file);
            let matrix = matrix.expect("an upload");
            // What these are beside a file's `weight_bytes.rs` says.
            assert_eq!(matrix.bytes(), DeviceMatrix::bytes_of(dtype, rows, cols), "{dtype}");
            let mut exact = vec![0.0f32; rows * cols];
            dequantize_row(dtype, &file, &mut exact);
            let exact_values = exact;
            let exact: Vec<u8> =
                exact_values.iter().flat_map(|value| value.to_le_bytes()).collect();
            for columns in batches.iter().copied() {
                let x = random.floats(columns * cols);
                let got = got(gpu, &[&matrix], &x, false).remove(0);
                // Many columns meet the weights as f16: both are off by up to 2^-11 of a value.
                let (wanted, bound) =
                    if columns <= gpu.narrow_max() || is_plain_float(dtype) && columns <= 128 {
                        (wanted(dtype, (rows, cols), &file, &x), 4e-6)
                    } else {
                        (wanted(DType::F32, (rows, cols), &exact, &x), 1e-3)
                    };
                let (off, largest) = distance(&got, &wanted);
                let shape = format!("{dtype} [{rows}, {cols}] × {columns}");
                // A single product may happen to be small beside what it is the sum of.
                let scale = largest.max(
                    root_mean_square(&exact_values) * root_mean_square(&x) * (cols as f32).sqrt(),
                );
                assert!(off <= bound * scale, "{shape}: {off} of {scale} off");
            }
        }
    }
}

#[test]
fn every_quantised_type_has_the_products_of_the_specification_at_odd_shapes() {
    let Some(gpu) = gpu() else { return };
    let dtypes = DType::ALL.into_iter().filter(|dtype| dtype.is_quantized());
    agree_with_the_specification(&gpu, dtypes, &[1, 2, 5, 9, 17, 40, 70, 129, 200, 600]);
}

#[test]
fn every_quantised_type_has_them_where_blocks_have_less_shared_memory() {
    for gpu in with_smaller_ones().iter().skip(1) {
        let dtypes = DType::ALL.into_iter().filter(|dtype| dtype.is_quantized());
        agree_with_the_specification(gpu, dtypes, &[1, 8, 16, 23, 32, 64, 100, 128]);
    }
}

#[test]
fn every_float_type_has_the_products_of_the_specification_at_odd_shapes() {
    let Some(gpu) = gpu() else { return };
    let dtypes = DType::ALL.into_iter().filter(|dtype| !dtype.is_quantized());
    agree_with_the_specification(&gpu, dtypes, &[1, 2, 5, 9, 17, 40, 70, 129, 200, 600]);
}

#[test]
fn a_column_has_the_same_bits_in_any_batch_up_to_a_width_and_in_any_above() {
    for (gpu, (rows, most)) in with_smaller_ones().iter().zip([(21, 450), (32, 128), (32, 128)]) {
        have_the_same_bits(gpu, (rows, 1536), most);
    }
    if let Some(gpu) = gpu() {
        have_the_same_bits(&gpu, (32, 4608), 450);
    }
}

/// In batches of up to `columns_max`.
fn have_the_same_bits(gpu: &Gpu, (rows, cols): (usize, usize), columns_max: usize) {
    let staging = Staging::new(gpu).expect("staging memory");
    let mut random = Random(2);
    for dtype in cases(DType::ALL, 6) {
        let same_sums_max = if dtype == DType::F32 { 128 } else { gpu.same_sums_max() };
        let has_tiles = matches!(dtype, DType::F16 | DType::BF16);
        let file = file_bytes(dtype, rows, cols, &mut random);
        let matrix = DeviceMatrix::upload(gpu, &staging, dtype, (rows, cols), &file);
        let matrix = matrix.expect("an upload");
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        for (most, part, second) in [
            (same_sums_max, 1, true),
            (same_sums_max, 3, false),
            (same_sums_max, 5, false),
            (32, 16, true),
            (128, 64, true),
            (120, 40, false),
            (450, 150, true),
        ] {
            // A single token's activations meet such weights as they are.
            if most > columns_max || has_tiles && part == 1 {
                continue;
            }
            let x = random.floats(most * cols);
            let together = got(gpu, &[&matrix], &x, second).remove(0);
            for (index, x) in x.chunks(part * cols).enumerate().step_by((most / part / 3).max(1)) {
                let alone = got(gpu, &[&matrix], x, second).remove(0);
                let same = &together[index * part * rows..][..alone.len()];
                assert_eq!(bits(&alone), bits(same), "{dtype} columns {index} · {part}..");
            }
        }
    }
}

#[test]
fn a_column_has_the_same_bits_whichever_tile_is_chosen() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let (mut random, cols) = (Random(5), 256);
    for (dtype, rows, most, part) in [
        (DType::Q4_0, 4096, 1024, 512),
        (DType::Q4_0, 6144, 450, 150),
        (DType::Q6_K, 4096, 1024, 256),
        (DType::Q6_K, 6144, 450, 150),
        (DType::E4M3_128, 4096, 1024, 256),
        (DType::F16, 4096, 1024, 512),
    ] {
        let file = file_bytes(dtype, rows, cols, &mut random);
        let matrix = DeviceMatrix::upload(&gpu, &staging, dtype, (rows, cols), &file);
        let matrix = matrix.expect("an upload");
        let x = random.floats(most * cols);
        let together = got(&gpu, &[&matrix], &x, false).remove(0);
        for (x, same) in x.chunks(part * cols).zip(together.chunks(part * rows)) {
            let alone = got(&gpu, &[&matrix], x, false).remove(0);
            let same = alone.iter().zip(same).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{dtype} [{rows}, {cols}] × {part} of {most}");
        }
    }
}

#[test]
fn several_matrices_of_mixed_types_are_multiplied_at_once() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let mut random = Random(3);
    let cols = 512;
    let parts = [
        (DType::Q4_K, 64),
        (DType::Q4_K, 17),
        (DType::Q6_K, 17),
        (DType::E4M3_128, 40),
        (DType::E4M3_128, 7),
        (DType::Q4_K, 9),
        (DType::F16, 5),
    ];
    let files: Vec<_> =
        parts.iter().map(|(dtype, rows)| file_bytes(*dtype, *rows, cols, &mut random)).collect();
    let upload = |((dtype, rows), file): (&(DType, usize), &Vec<u8>)| {
        DeviceMatrix::upload(&gpu, &staging, *dtype, (*rows, cols), file).expect("an upload")
    };
    let matrices: Vec<_> = parts.iter().zip(&files).map(upload).collect();
    let x = random.floats(3 * cols);
    let got = got(&gpu, &matrices.iter().collect::<Vec<_>>(), &x, false);
    for (((dtype, rows), file), got) in parts.iter().zip(&files).zip(&got) {
        let (off, largest) = distance(got, &wanted(*dtype, (*rows, cols), file, &x));
        assert!(off <= 4e-6 * largest, "{dtype} of {rows} rows: {off} of {largest} off");
    }
}

/// With a second row of 8 bits a product is nearly that of exact activations.
#[test]
fn a_second_row_of_8_bits_makes_products_nearly_exact() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let (mut random, rows, cols) = (Random(4), 50, 1024);
    let values = random.floats(rows * cols);
    let x = random.floats(5 * cols);
    let mut file = vec![0; rows * DType::Q8_0.row_bytes(cols).expect("whole blocks")];
    quantize_row(DType::Q8_0, &values, &mut file);
    let mut exact = vec![0.0f32; rows * cols];
    dequantize_row(DType::Q8_0, &file, &mut exact);
    let bytes: Vec<u8> = exact.iter().flat_map(|value| value.to_le_bytes()).collect();
    let matrix = DeviceMatrix::upload(&gpu, &staging, DType::Q8_0, (rows, cols), &file);
    let matrix = matrix.expect("an upload");
    let wanted = wanted(DType::F32, (rows, cols), &bytes, &x);
    let (once, largest) = distance(&got(&gpu, &[&matrix], &x, false)[0], &wanted);
    let (twice, _) = distance(&got(&gpu, &[&matrix], &x, true)[0], &wanted);
    assert!(once > 1e-4 * largest, "8 bits are seen: {once} of {largest}");
    assert!(twice < once / 50.0, "once {once}, twice {twice} of {largest} off");
}

#[test]
fn blocks_take_many_tiles_in_turn() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let mut random = Random(6);
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
        for (rows, cols) in [(4500, 256), (2200, 1280)] {
            let file = file_bytes(dtype, rows, cols, &mut random);
            let matrix = DeviceMatrix::upload(&gpu, &staging, dtype, (rows, cols), &file);
            let matrix = matrix.expect("an upload");
            let x = random.floats(8 * cols);
            for columns in [1, 8] {
                let x = &x[..columns * cols];
                let got = got(&gpu, &[&matrix], x, false).remove(0);
                let (off, largest) = distance(&got, &wanted(dtype, (rows, cols), &file, x));
                let shape = format!("{dtype} [{rows}, {cols}] × {columns}");
                assert!(off <= 4e-6 * largest, "{shape}: {off} of {largest} off");
            }
        }
    }
}

#[test]
fn gated_products_are_rounded_as_rows_are() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let mut random = Random(7);
    let dtypes = [DType::Q4_0, DType::Q6_K, DType::Q4_K, DType::Q8_0, DType::Q2_K, DType::IQ4_NL];
    // Pairs of tiles go round with few left over, which blocks share, or with many, or are fewer.
    for (dtype, rows) in
        cases(dtypes.into_iter().flat_map(|dtype| [4608, 3200, 1024].map(|rows| (dtype, rows))), 4)
    {
        let cols = 640;
        let cols = if dtype.row_bytes(cols).is_some() { cols } else { 768 };
        let matrices = [0, 1].map(|_| {
            let file = file_bytes(dtype, rows, cols, &mut random);
            DeviceMatrix::upload(&gpu, &staging, dtype, (rows, cols), &file).expect("an upload")
        });
        let bias = on_gpu(&gpu, &random.floats(rows));
        let counters = gpu.alloc(Gated::counter_bytes(rows)).expect("room");
        for columns in [1, 3, 8, 9, 40] {
            let values = on_gpu(&gpu, &random.floats(columns * cols));
            let is_narrow = columns <= gpu.narrow_max();
            let (eight_bits, halves) = (
                EightBitMemory::new(&gpu, columns, cols, true),
                gpu.alloc(half_bytes(columns, cols)).expect("room"),
            );
            let x = Columns {
                columns,
                cols,
                values: Some(values.span()),
                eight_bits: is_narrow.then(|| eight_bits.view()),
                halves: (!is_narrow).then(|| halves.span()),
            };
            gpu.round_rows(&round(&x)).expect("rounding");
            let [fused, apart] = [true, false].map(|fused| {
                let outs = [0, 1].map(|_| on_gpu(&gpu, &vec![f32::NAN; columns * rows]));
                let target = EightBitMemory::new(&gpu, columns, rows, true);
                let product = |i: usize| Product {
                    matrix: &matrices[i],
                    bias: (i == 0).then(|| bias.span()),
                    out: outs[i].span(),
                    stride: rows,
                };
                let gated = Gated {
                    gate: product(0),
                    up: product(1),
                    activation: Gate::Silu,
                    // Elsewhere than in the gate's place it is not done on the way.
                    out: Some(outs[usize::from(!fused)].span()),
                    eight_bits: Some(target.view()),
                    halves: None,
                    counters: counters.span(),
                };
                gpu.multiply_gated(None, &gated, &x).expect("a gated product");
                let values = from_gpu(&gpu, &outs[usize::from(!fused)], columns * rows);
                (values.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), target.bytes(&gpu))
            });
            assert!(fused == apart, "{dtype} [{rows}, {cols}] × {columns}");
        }
    }
}

/// Products of up to 128 columns divide what lies along rows between blocks, those of more don't:
/// the order of sums differs. Tensor cores add 16 products at a time, and cut a sum in its last
/// place.
#[test]
fn products_of_many_columns_agree_with_those_of_more_at_the_shapes_of_models() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let mut random = Random(8);
    let of_models = [
        (DType::Q4_0, 6144, 4096),
        (DType::Q4_0, 4096, 14336),
        (DType::Q4_0, 28672, 4096),
        (DType::Q6_K, 6144, 4096),
        (DType::INT4_128, 6144, 4096),
        (DType::E4M3_128, 6144, 4096),
    ];
    for (dtype, rows, cols) in cases(of_models, 3) {
        let file = file_bytes(dtype, 64, cols, &mut random).repeat(rows / 64);
        let matrix = DeviceMatrix::upload(&gpu, &staging, dtype, (rows, cols), &file);
        let matrix = matrix.expect("an upload");
        let x = random.floats(256 * cols);
        let more = got(&gpu, &[&matrix], &x, false).remove(0);
        for columns in [17, 40, 124, 128] {
            let some = got(&gpu, &[&matrix], &x[..columns * cols], false).remove(0);
            let (off, largest) = distance(&some, &more[..columns * rows]);
            let shape = format!("{dtype} [{rows}, {cols}] × {columns}");
            let bound = (cols / 16) as f32 * f32::EPSILON;
            assert!(off <= bound * largest, "{shape}: {off} of {largest} off");
        }
    }
}
