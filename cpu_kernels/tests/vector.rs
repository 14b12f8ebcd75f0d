//! Row-wise kernels against f64 arithmetic, on every instruction set of this machine.

use proptest::prelude::*;
use tandem_cpu_kernels::{Isa, Kernels};

fn kernels() -> Vec<&'static Kernels> {
    Isa::available().map(|isa| Kernels::for_isa(isa).expect("an available set")).collect()
}

fn assert_close(isa: Isa, got: &[f32], wanted: &[f64], relative: f64, absolute: f64) {
    assert_eq!(got.len(), wanted.len());
    for (i, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let error = (f64::from(*got) - wanted).abs();
        let bound = absolute + relative * wanted.abs();
        assert!(error <= bound, "{isa} element {i}: got {got:e}, want {wanted:e}");
    }
}

/// Evenly spaced values over a range, ends included.
fn sweep(low: f32, high: f32, n: usize) -> Vec<f32> {
    (0..n).map(|i| low + (high - low) * i as f32 / (n - 1) as f32).collect()
}

fn row(max: f32) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(-max..max, 1..300)
}

proptest! {
    #[test]
    fn norms_match_f64(x in row(30.0), eps in 1e-6f32..1e-4, seed in 0.1f32..2.0) {
        let weight: Vec<f32> = (0..x.len()).map(|i| (i as f32 * seed).sin() + 1.0).collect();
        let squares: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
        let root = (squares / x.len() as f64 + f64::from(eps)).sqrt();
        let wanted: Vec<f64> =
            x.iter().zip(&weight).map(|(x, w)| f64::from(*x) / root * f64::from(*w)).collect();
        for kernels in kernels() {
            let mut out = vec![0.0; x.len()];
            kernels.rms_norm(&x, &weight, eps, &mut out);
            assert_close(kernels.isa(), &out, &wanted, 1e-6, 1e-30);
            let mut twice = [x.clone(), x.clone()].concat();
            kernels.rms_norm_in_place(&mut twice, &weight, eps);
            prop_assert_eq!(&twice[..x.len()], &out[..]);
            prop_assert_eq!(&twice[x.len()..], &out[..]);
        }
    }

    #[test]
    fn additions_and_scaling_are_exact(x in row(1e3), factor in -8.0f32..8.0) {
        for kernels in kernels() {
            let mut sum = [x.clone(), x.clone()].concat();
            kernels.add_bias(&mut sum, &x);
            kernels.scale(&mut sum, factor);
            let wanted: Vec<f32> = x.iter().chain(&x).map(|v| (v + v) * factor).collect();
            prop_assert_eq!(&sum, &wanted);
            let mut sum = x.clone();
            kernels.add(&mut sum, &x);
            let wanted: Vec<f32> = x.iter().map(|v| v + v).collect();
            prop_assert_eq!(&sum, &wanted);
        }
    }

    #[test]
    fn gated_activations_match_f64(gate in row(20.0), factor in -3.0f32..3.0) {
        let up: Vec<f32> = gate.iter().map(|v| (v * factor).cos()).collect();
        check_gated(&gate, &up);
    }

    #[test]
    fn softmax_and_log_sum_exp_match_f64(row in row(40.0), mask in 0usize..7) {
        let mut row = row;
        if mask > 0 {
            row.iter_mut().skip(1).step_by(mask).for_each(|v| *v = f32::NEG_INFINITY);
        }
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps: Vec<f64> = row.iter().map(|v| f64::from(v - max).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let wanted: Vec<f64> = exps.iter().map(|e| e / sum).collect();
        let first = row.iter().position(|v| *v == max);
        let specified = Kernels::specification(Isa::Scalar);
        let below = specified.sum_exp_below(&row, max);
        // Each term is within 2e-7; lanes of 64 terms are added up in f32.
        prop_assert!((below / sum - 1.0).abs() < 4e-6, "{below}, not {sum}");
        for kernels in kernels() {
            prop_assert_eq!(kernels.sum_exp_below(&row, max), specified.sum_exp_below(&row, max));
            prop_assert_eq!(kernels.largest_finite(&row), specified.largest_finite(&row));
            let finite = row.iter().all(|v| v.is_finite()).then_some(max);
            prop_assert_eq!(kernels.largest_finite(&row), finite);
            let log_sum = kernels.log_sum_exp(&row);
            assert_close(kernels.isa(), &[log_sum], &[f64::from(max) + sum.ln()], 2e-7, 2e-7);
            prop_assert_eq!(kernels.argmax(&row), first);
            let mut probabilities = row.clone();
            kernels.softmax_in_place(&mut probabilities).expect("a finite row");
            assert_close(kernels.isa(), &probabilities, &wanted, 1e-6, 2e-35);
        }
    }
}

fn check_gated(gate: &[f32], up: &[f32]) {
    let pairs = || gate.iter().zip(up).map(|(g, u)| (f64::from(*g), f64::from(*u)));
    let silu: Vec<f64> = pairs().map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let gelu: Vec<f64> = pairs()
        .map(|(g, u)| {
            let tanh = (root * (g + 0.044715 * g * g * g)).tanh();
            // (1 + tanh)/2 cancels for very negative arguments even in f64.
            let half = if tanh < -0.999 {
                1.0 / (1.0 + (-2.0 * root * (g + 0.044715 * g * g * g)).exp())
            } else {
                0.5 * (1.0 + tanh)
            };
            g * half * u
        })
        .collect();
    for kernels in kernels() {
        let mut out = gate.to_vec();
        kernels.swiglu(&mut out, up);
        assert_close(kernels.isa(), &out, &silu, 6e-7, 1e-33);
        let mut out = gate.to_vec();
        kernels.geglu(&mut out, up);
        // The exponent of GELU is rounded to f32: its error grows with its size.
        assert_close(kernels.isa(), &out, &gelu, 2e-5, 1e-33);
        let within = gate.iter().filter(|g| g.abs() < 3.0).count();
        let near: (Vec<f32>, Vec<f64>) = gate
            .iter()
            .zip(out.iter().zip(&gelu))
            .filter(|(g, _)| g.abs() < 3.0)
            .map(|(_, (out, gelu))| (*out, *gelu))
            .unzip();
        assert_eq!(near.0.len(), within);
        assert_close(kernels.isa(), &near.0, &near.1, 2e-6, 1e-33);
    }
}

#[test]
fn exponentials_are_within_two_units_in_the_last_place() {
    let row = sweep(-79.9, 0.0, 200_000);
    for kernels in kernels() {
        let mut out = row.clone();
        let wanted: Vec<f64> = row.iter().map(|v| f64::from(*v).exp()).collect();
        let sum: f64 = wanted.iter().sum();
        kernels.softmax_in_place(&mut out).expect("a finite row");
        let wanted: Vec<f64> = wanted.iter().map(|v| v / sum).collect();
        // Two units of e^x, half a unit of 1/sum, half a unit of the product.
        assert_close(kernels.isa(), &out, &wanted, 3.0 * 1.2e-7, 1e-37);
    }
}

#[test]
fn soft_caps_match_f64_from_tiny_to_huge() {
    for cap in [1.0f32, 30.0, 50.0] {
        let mut x = sweep(-12.0 * cap, 12.0 * cap, 100_001);
        x.extend(sweep(-cap / 100.0, cap / 100.0, 1001));
        x.extend([1e-20, -1e-20, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY]);
        let cap64 = f64::from(cap);
        let wanted: Vec<f64> = x.iter().map(|v| cap64 * (f64::from(*v) / cap64).tanh()).collect();
        for kernels in kernels() {
            let mut out = x.clone();
            kernels.softcap(&mut out, cap);
            assert_close(kernels.isa(), &out, &wanted, 5e-7, 1e-30);
            let mut nan = vec![f32::NAN; 3];
            kernels.softcap(&mut nan, cap);
            assert!(nan.iter().all(|v| v.is_nan()));
        }
    }
}

#[test]
fn extreme_gates_stay_finite_and_nan_stays_nan() {
    let gate = sweep(-200.0, 200.0, 1001);
    let up = vec![1.0; gate.len()];
    for kernels in kernels() {
        for op in [Kernels::swiglu, Kernels::geglu] {
            let mut out = gate.clone();
            op(kernels, &mut out, &up);
            assert!(out.iter().all(|v| v.is_finite()), "{}", kernels.isa());
            assert_eq!(out.last(), Some(&200.0));
            assert!(out[0].abs() < 1e-30);
            let mut nan = vec![f32::NAN; 17];
            op(kernels, &mut nan, &up[..17]);
            assert!(nan.iter().all(|v| v.is_nan()), "{}", kernels.isa());
        }
    }
}

#[test]
fn rows_without_probabilities_are_reported_and_left_alone() {
    let bad: [&[f32]; 4] =
        [&[], &[f32::NEG_INFINITY; 20], &[1.0, f32::NAN, 3.0], &[0.0, 1.0, f32::INFINITY, 2.0]];
    for kernels in kernels() {
        for row in bad {
            assert!(!kernels.log_sum_exp(row).is_finite(), "{} {row:?}", kernels.isa());
            assert_eq!(kernels.largest_finite(row), None, "{} {row:?}", kernels.isa());
            let mut copy = row.to_vec();
            assert!(kernels.softmax_in_place(&mut copy).is_err());
            let bits = |row: &[f32]| row.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&copy), bits(row));
        }
        for at in 0..70 {
            let mut row = vec![1.0; 70];
            row[at] = f32::NAN;
            assert_eq!(kernels.argmax(&row), None, "{} NaN at {at}", kernels.isa());
            assert!(kernels.log_sum_exp(&row).is_nan());
            row[at] = 2.0;
            assert_eq!(kernels.argmax(&row), Some(at), "{}", kernels.isa());
        }
        assert_eq!(kernels.argmax(&[]), None);
        assert_eq!(kernels.argmax(&[3.0, 7.0, 7.0]), Some(1));
    }
}
