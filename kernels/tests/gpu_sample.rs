//! Measures of rows of logits on the GPU against f64.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::{Random, gpu, on_gpu};
use tandem_kernels::RowMeasures;

#[test]
fn rows_have_the_best_token_and_the_log_sum_of_exact_arithmetic() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(8);
    for (rows, vocab, softcap) in [(1, 5, None), (3, 32_000, None), (2, 151_937, Some(2.0f32))] {
        let mut logits: Vec<f32> =
            random.floats(rows * vocab).iter().map(|logit| 9.0 * logit).collect();
        // The same largest logit twice: the first counts.
        for row in logits.chunks_exact_mut(vocab) {
            row[vocab - 1] = 9.5;
            row[vocab / 2] = 9.5;
        }
        let memory = on_gpu(&gpu, &logits);
        let mut measures = RowMeasures::new(&gpu, rows).expect("memory");
        gpu.measure_rows(memory.span(), (rows, vocab), softcap, &measures).expect("a launch");
        let got: Vec<_> = measures.wait(&gpu, rows).expect("measures").collect();
        for (row, got) in logits.chunks_exact(vocab).zip(got) {
            let got = got.expect("finite logits");
            let capped = |logit: f32| match softcap {
                Some(cap) => f64::from(cap) * (f64::from(logit) / f64::from(cap)).tanh(),
                None => f64::from(logit),
            };
            let log_sum = row.iter().map(|logit| capped(*logit).exp()).sum::<f64>().ln();
            assert_eq!(got.best as usize, vocab / 2);
            assert!((f64::from(got.log_sum) - log_sum).abs() < 1e-5, "{got:?}: {log_sum}");
            let logprob = capped(9.5) - log_sum;
            assert!((f64::from(got.best_logprob) - logprob).abs() < 1e-5, "{got:?}: {logprob}");
        }
    }
}

#[test]
fn a_row_that_is_not_finite_has_no_measure_and_its_neighbours_have() {
    let Some(gpu) = gpu() else { return };
    let vocab = 1000;
    let mut logits = Random(9).floats(3 * vocab);
    logits[vocab + 77] = f32::NAN;
    let memory = on_gpu(&gpu, &logits);
    let mut measures = RowMeasures::new(&gpu, 3).expect("memory");
    gpu.measure_rows(memory.span(), (3, vocab), None, &measures).expect("a launch");
    let got = measures.wait(&gpu, 3).expect("measures");
    let finite: Vec<bool> = got.map(|measure| measure.is_some()).collect();
    assert_eq!(finite, [true, false, true]);
}
