//! Row-wise passes on the GPU against the specification of the CPU kernels.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::{EightBitMemory, Random, distance, from_gpu, gpu, on_gpu, rounded, scalar};
use tandem_cpu_kernels::{DType, dequantize_row, quantize_row};
use tandem_kernels::{
    Added, DeviceMatrix, EmbedRows, Gate, Gpu, NormRows, RoundRows, RowNorm, Staging,
};

/// The values that a row in 8 bits stands for.
fn decoded(gpu: &Gpu, memory: &EightBitMemory, rows: usize, cols: usize) -> Vec<f32> {
    let (quants, scales) = memory.bytes(gpu);
    let scale = |group: usize| {
        f32::from_le_bytes(scales[8 * group..8 * group + 4].try_into().expect("four bytes"))
    };
    (0..rows * cols).map(|i| f32::from(quants[i]) * scale(i / 32)).collect()
}

#[test]
fn rounding_has_the_integers_of_the_specification() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(5);
    for (rows, cols) in [(1, 32), (3, 96), (7, 2048)] {
        let mut values = random.floats(rows * cols);
        values[5] = 0.0;
        values.iter_mut().take(32).for_each(|value| *value *= 1e-3);
        let memory = on_gpu(&gpu, &values);
        let eight_bits = EightBitMemory::new(&gpu, rows, cols, false);
        let (values_span, view) = (memory.span(), Some(eight_bits.view()));
        let pass = RoundRows {
            values: values_span,
            up: None,
            out: None,
            eight_bits: view,
            halves: None,
            rows,
            cols,
        };
        gpu.round_rows(&pass).expect("rounding");
        let (off, largest) =
            distance(&decoded(&gpu, &eight_bits, rows, cols), &rounded(&values, cols));
        assert!(off <= 1e-6 * largest, "[{rows}, {cols}]: {off} of {largest} off");
        let (quants, scales) = eight_bits.bytes(&gpu);
        for (group, quants) in quants.chunks_exact(32).enumerate() {
            for half in 0..2 {
                let at = 8 * group + 4 + 2 * half;
                let sum = i16::from_le_bytes([scales[at], scales[at + 1]]);
                let wanted: i16 = quants[16 * half..][..16].iter().map(|q| i16::from(*q)).sum();
                assert_eq!(sum, wanted, "sums of group {group}, half {half}");
            }
        }
    }
}

#[test]
fn a_group_that_is_not_finite_poisons_its_products_and_no_others() {
    let Some(gpu) = gpu() else { return };
    let mut values = vec![1.0f32; 96];
    values[40] = f32::NAN;
    let memory = on_gpu(&gpu, &values);
    let eight_bits = EightBitMemory::new(&gpu, 1, 96, false);
    let (values, view) = (memory.span(), Some(eight_bits.view()));
    let pass = RoundRows {
        values,
        up: None,
        out: None,
        eight_bits: view,
        halves: None,
        rows: 1,
        cols: 96,
    };
    gpu.round_rows(&pass).expect("rounding");
    let decoded = decoded(&gpu, &eight_bits, 1, 96);
    assert!(decoded[32..64].iter().all(|value| value.is_nan()));
    // Steps are cut by two bits.
    let is_one = |value: &f32| (value - 1.0).abs() < 1e-6;
    assert!(decoded[..32].iter().chain(&decoded[64..]).all(is_one));
}

#[test]
fn gates_are_activated_and_multiplied() {
    let Some(gpu) = gpu() else { return };
    let (mut random, rows, cols) = (Random(6), 3, 320);
    let gate: Vec<f32> = random.floats(rows * cols).iter().map(|x| 6.0 * x).collect();
    let up = random.floats(rows * cols);
    for (activation, formula) in [
        (Gate::Silu, (|x: f64| x / (1.0 + (-x).exp())) as fn(f64) -> f64),
        (Gate::GeluTanh, |x| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }),
    ] {
        let (values, up_memory) = (on_gpu(&gpu, &gate), on_gpu(&gpu, &up));
        let (values_span, up_span) = (values.span(), up_memory.span());
        let pass = RoundRows {
            values: values_span,
            up: Some((up_span, activation)),
            out: Some(values_span),
            eight_bits: None,
            halves: None,
            rows,
            cols,
        };
        gpu.round_rows(&pass).expect("a gate");
        let wanted = |(x, y): (&f32, &f32)| (formula(f64::from(*x)) * f64::from(*y)) as f32;
        let wanted: Vec<f32> = gate.iter().zip(&up).map(wanted).collect();
        let (off, largest) = distance(&from_gpu(&gpu, &values, rows * cols), &wanted);
        assert!(off <= 1e-6 * largest, "{activation:?}: {off} of {largest} off");
    }
}

#[test]
fn norms_add_what_is_pending_first() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(7);
    for (rows, cols) in [(1, 64), (4, 576), (2, 8192)] {
        for pending in 0..3 {
            let residual = random.floats(rows * cols);
            let added = random.floats(rows * cols);
            let (weight, added_weight) = (random.floats(cols), random.floats(cols));
            // By the specification.
            let mut sum = residual.clone();
            let mut wanted = residual.clone();
            for row in 0..rows {
                let part = row * cols..(row + 1) * cols;
                let mut addition = added[part.clone()].to_vec();
                if pending == 2 {
                    scalar().rms_norm_in_place(&mut addition, &added_weight, 1e-5);
                }
                for (sum, addition) in sum[part.clone()].iter_mut().zip(&addition) {
                    *sum += if pending == 0 { 0.0 } else { *addition };
                }
                wanted[part.clone()].copy_from_slice(&sum[part.clone()]);
                scalar().rms_norm_in_place(&mut wanted[part], &weight, 1e-6);
            }
            // On the GPU.
            let (residual, added) = (on_gpu(&gpu, &residual), on_gpu(&gpu, &added));
            let (weight, added_weight) = (on_gpu(&gpu, &weight), on_gpu(&gpu, &added_weight));
            let values = on_gpu(&gpu, &vec![f32::NAN; rows * cols]);
            let eight_bits = EightBitMemory::new(&gpu, rows, cols, true);
            let norm = RowNorm { weight: added_weight.span(), eps: 1e-5 };
            let added = Added { values: added.span(), norm: (pending == 2).then_some(norm) };
            let pass = NormRows {
                residual: residual.span(),
                added: (pending > 0).then_some(added),
                norm: RowNorm { weight: weight.span(), eps: 1e-6 },
                gather: None,
                values: Some(values.span()),
                eight_bits: Some(eight_bits.view()),
                halves: None,
                rows,
                cols,
            };
            gpu.norm_rows(&pass, rows).expect("a norm");
            let shape = format!("[{rows}, {cols}], pending {pending}");
            let (off, largest) = distance(&from_gpu(&gpu, &residual, rows * cols), &sum);
            assert!(off <= 2e-6 * largest, "{shape}: residual {off} of {largest} off");
            let got = from_gpu(&gpu, &values, rows * cols);
            let (off, largest) = distance(&got, &wanted);
            assert!(off <= 2e-6 * largest, "{shape}: norm {off} of {largest} off");
            let both = decoded(&gpu, &eight_bits, 2 * rows, cols);
            let (first, second) = both.split_at(rows * cols);
            let twice: Vec<f32> = first.iter().zip(second).map(|(a, b)| a + b).collect();
            let (off, largest) = distance(&twice, &got);
            assert!(off <= 4e-5 * largest, "{shape}: both rows {off} of {largest} off");
        }
    }
}

#[test]
fn gathered_rows_are_normed_and_leave_the_residual_as_it_is() {
    let Some(gpu) = gpu() else { return };
    let (mut random, rows, cols) = (Random(8), 5, 96);
    let residual = random.floats(rows * cols);
    let weight = vec![1.0f32; cols];
    let (memory, weight_memory) = (on_gpu(&gpu, &residual), on_gpu(&gpu, &weight));
    let wanted_rows = [4u32, 1];
    let gather = on_gpu(&gpu, &wanted_rows);
    let values = on_gpu(&gpu, &[f32::NAN; 2 * 96]);
    let pass = NormRows {
        residual: memory.span(),
        added: Some(Added { values: memory.span(), norm: None }),
        norm: RowNorm { weight: weight_memory.span(), eps: 1e-6 },
        gather: Some(gather.span()),
        values: Some(values.span()),
        eight_bits: None,
        halves: None,
        rows,
        cols,
    };
    gpu.norm_rows(&pass, 2).expect("a norm");
    assert_eq!(from_gpu(&gpu, &memory, rows * cols), residual);
    let mut wanted = Vec::new();
    for row in wanted_rows {
        let mut values: Vec<f32> =
            residual[row as usize * cols..][..cols].iter().map(|x| x + x).collect();
        scalar().rms_norm_in_place(&mut values, &weight, 1e-6);
        wanted.extend(values);
    }
    let (off, largest) = distance(&from_gpu(&gpu, &values, 2 * cols), &wanted);
    assert!(off <= 2e-6 * largest, "{off} of {largest} off");
}

#[test]
fn rows_of_every_type_are_looked_up() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let (mut random, table_rows) = (Random(9), 37);
    let numbers = [36u32, 0, 17, 17, 33];
    let rows = on_gpu(&gpu, &numbers);
    for dtype in DType::ALL {
        for cols in [320, 768] {
            let Some(row_bytes) = dtype.row_bytes(cols) else { continue };
            let mut file = vec![0; table_rows * row_bytes];
            quantize_row(dtype, &random.floats(table_rows * cols), &mut file);
            let table = DeviceMatrix::upload(&gpu, &staging, dtype, (table_rows, cols), &file);
            let table = table.expect("an upload");
            let out = on_gpu(&gpu, &vec![f32::NAN; numbers.len() * cols]);
            let (tokens, rows, span) = (numbers.len(), Some(rows.span()), out.span());
            let pass = EmbedRows { table: &table, rows, tokens, scale: 3.0, out: span };
            gpu.embed_rows(&pass).expect("rows");
            let mut wanted = vec![0.0; tokens * cols];
            for (row, wanted) in numbers.iter().zip(wanted.chunks_exact_mut(cols)) {
                dequantize_row(dtype, &file[*row as usize * row_bytes..][..row_bytes], wanted);
                wanted.iter_mut().for_each(|value| *value *= 3.0);
            }
            let (off, largest) = distance(&from_gpu(&gpu, &out, tokens * cols), &wanted);
            assert!(off <= 1e-6 * largest, "{dtype} of {cols}: {off} of {largest} off");
        }
    }
}
