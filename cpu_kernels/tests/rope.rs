//! Rotary embedding: the frequencies against their formulas, the rotation against f64.

use proptest::prelude::*;
use tandem_cpu_kernels::rope::RopeError;
use tandem_cpu_kernels::{
    Isa, Kernels, RopeFrequencies, RopeParams, RopeRow, RopeScaling, RopeStyle,
};

fn plain(dims: usize, base: f64) -> RopeParams<'static> {
    RopeParams { dims, base, scaling: RopeScaling::None, frequency_factors: None }
}

fn frequencies(params: &RopeParams<'_>) -> RopeFrequencies {
    RopeFrequencies::new(params).expect("good parameters")
}

/// The pair of elements that angle `i` turns.
fn pair(style: RopeStyle, i: usize, dims: usize) -> (usize, usize) {
    match style {
        RopeStyle::Interleaved => (2 * i, 2 * i + 1),
        RopeStyle::HalfSplit => (i, i + dims / 2),
    }
}

proptest! {
    #[test]
    fn rotation_matches_f64_and_leaves_the_rest(
        pairs in 1usize..70,
        unturned in 0usize..20,
        position in 0usize..200_000,
        style in prop_oneof![Just(RopeStyle::Interleaved), Just(RopeStyle::HalfSplit)],
    ) {
        let (dims, head_dim) = (2 * pairs, 2 * pairs + unturned);
        let frequencies = frequencies(&plain(dims, 10_000.0));
        let (mut cos, mut sin) = (vec![0.0; pairs], vec![0.0; pairs]);
        frequencies.fill(position, &mut cos, &mut sin);
        let x: Vec<f32> = (0..3 * head_dim).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let mut wanted: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
        for head in wanted.chunks_exact_mut(head_dim) {
            for (i, radians) in frequencies.radians().iter().enumerate() {
                let (s, c) = (position as f64 * radians).sin_cos();
                let (first, second) = pair(style, i, dims);
                let (a, b) = (head[first], head[second]);
                (head[first], head[second]) = (a * c - b * s, b * c + a * s);
            }
        }
        for isa in Isa::available() {
            let kernels = Kernels::for_isa(isa).expect("an available set");
            let mut got = x.clone();
            kernels.rope(&mut got, head_dim, RopeRow { cos: &cos, sin: &sin }, style);
            for (i, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
                prop_assert!((f64::from(*got) - wanted).abs() < 1e-6, "{} element {}", isa, i);
            }
        }
    }
}

#[test]
fn frequencies_fall_geometrically() {
    let frequencies = frequencies(&plain(64, 500_000.0));
    assert_eq!(frequencies.pairs(), 32);
    for (i, radians) in frequencies.radians().iter().enumerate() {
        assert!((radians - 500_000f64.powf(-(i as f64) / 32.0)).abs() < 1e-15);
    }
}

#[test]
fn angles_are_exact_far_into_the_context() {
    let frequencies = frequencies(&plain(4, 10_000.0));
    let (mut cos, mut sin) = ([0.0; 4], [0.0; 4]);
    frequencies.fill(999_999, &mut cos, &mut sin);
    assert_eq!(cos[0], 999_999f64.cos() as f32);
    assert_eq!(sin[2], 1e6f64.sin() as f32);
    assert_eq!(sin[3], (1e6f64 * 10_000f64.powf(-0.5)).sin() as f32);
}

#[test]
fn linear_scaling_and_factors_divide_the_frequencies() {
    let factors = [1.0f32, 2.0, 4.0, 8.0];
    let scaled = frequencies(&RopeParams {
        scaling: RopeScaling::Linear { factor: 4.0 },
        frequency_factors: Some(&factors),
        ..plain(8, 10_000.0)
    });
    let base = frequencies(&plain(8, 10_000.0));
    for ((scaled, base), factor) in scaled.radians().iter().zip(base.radians()).zip(factors) {
        assert!((scaled - base / f64::from(factor) / 4.0).abs() < 1e-18);
    }
}

/// Qwen2.5 with its documented long-context setting. The ends of the ramp were worked out by hand:
/// pair 23.6 turns 32 times in 32768 tokens and pair 39.6 once, so the ramp runs from 23 to 40.
#[test]
fn yarn_keeps_fast_pairs_and_interpolates_slow_ones() {
    let yarn = |attention_factor| RopeParams {
        scaling: RopeScaling::Yarn {
            factor: 4.0,
            original_context_tokens: 32_768.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor,
        },
        ..plain(128, 1_000_000.0)
    };
    let (stretched, base) = (frequencies(&yarn(None)), frequencies(&plain(128, 1_000_000.0)));
    for (i, (got, base)) in stretched.radians().iter().zip(base.radians()).enumerate() {
        let ramp = ((i as f64 - 23.0) / 17.0).clamp(0.0, 1.0);
        let wanted = base * (1.0 - ramp) + base / 4.0 * ramp;
        assert!((got / wanted - 1.0).abs() < 1e-12, "pair {i}: {got} instead of {wanted}");
    }
    let (mut cos, mut sin) = (vec![0.0; 64], vec![0.0; 64]);
    stretched.fill(0, &mut cos, &mut sin);
    assert_eq!(cos[5], (0.1 * 4f64.ln() + 1.0) as f32);
    frequencies(&yarn(Some(1.0))).fill(0, &mut cos, &mut sin);
    assert_eq!((cos[5], sin[5]), (1.0, 0.0));
}

#[test]
fn bad_parameters_are_named() {
    let refuse = |params: RopeParams<'_>| RopeFrequencies::new(&params).expect_err("a refusal");
    assert_eq!(refuse(plain(7, 1e4)), RopeError::OddDims { got: 7 });
    assert_eq!(refuse(plain(8, 0.0)), RopeError::NotPositive { field: "base", got: 0.0 });
    let few = RopeParams { frequency_factors: Some(&[1.0]), ..plain(8, 1e4) };
    assert_eq!(refuse(few), RopeError::FactorCount { wanted: 4, got: 1 });
    let linear = RopeParams { scaling: RopeScaling::Linear { factor: -1.0 }, ..plain(8, 1e4) };
    assert!(matches!(refuse(linear), RopeError::NotPositive { got: -1.0, .. }));
}
