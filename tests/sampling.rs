//! The sampler against the same chain done the slow way, and against chance.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "sampling/oracle.rs"]
mod oracle;
#[path = "sampling/shortlist.rs"]
mod shortlist;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tandem::request::{DryParams, SamplingParams};
use tandem::sampling::{Sampler, uniform};
use tandem::units::TokenId;

/// Random logits, spread so that near-ties are rare: a normal-like sum of uniforms.
fn logits(vocab_size: usize, seed: u64, spread: f32) -> Vec<f32> {
    let normal = |at: u64| (0..6).map(|part| uniform(seed, 6 * at + part)).sum::<f64>() - 3.0;
    (0..vocab_size as u64).map(|at| spread * normal(at) as f32).collect()
}

fn any_params() -> impl Strategy<Value = SamplingParams> {
    let off = |on: BoxedStrategy<f32>, off: f32| prop_oneof![Just(off), on];
    let truncation = (
        prop_oneof![Just(0usize), 1usize..80],
        off((0.05f32..0.99).boxed(), 1.0),
        off((0.001f32..0.5).boxed(), 0.0),
        off((0.05f32..0.99).boxed(), 1.0),
    );
    let penalties = (
        off((0.5f32..2.0).boxed(), 1.0),
        off((-2.0f32..2.0).boxed(), 0.0),
        off((-2.0f32..2.0).boxed(), 0.0),
        proptest::option::of(0usize..30),
        proptest::collection::vec((0u32..300, -10.0f32..10.0), 0..4),
    );
    let dry = (off((0.1f32..2.0).boxed(), 0.0), 1.0f32..3.0, 1usize..4, 0u32..12);
    let heat = (prop_oneof![Just(0.0f32), 0.2f32..3.0], any::<u64>());
    (truncation, penalties, dry, heat).prop_map(|(truncation, penalties, dry, heat)| {
        let (top_k, top_p, min_p, typical_p) = truncation;
        let (repetition, frequency, presence, penalty_last_n, bias) = penalties;
        let (multiplier, base, allowed_length, breaker) = dry;
        SamplingParams {
            temperature: heat.0,
            top_k,
            top_p,
            min_p,
            typical_p,
            repetition_penalty: repetition,
            frequency_penalty: frequency,
            presence_penalty: presence,
            penalty_last_n,
            dry: DryParams { multiplier, base, allowed_length, ..DryParams::default() },
            dry_breaker_tokens: vec![TokenId(breaker)],
            logit_bias: bias.into_iter().map(|(id, bias)| (TokenId(id), bias)).collect(),
            seed: Some(heat.1),
            top_logprobs: 5,
        }
    })
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
    logits.iter().map(|logit| f64::from(*logit) - largest - sum.ln()).collect()
}

proptest! {
    // A fixed seed: f32 and f64 may disagree on which side of a bound a token falls, about once in
    // 10^6 rows.
    #![proptest_config(ProptestConfig {
        cases: 600,
        rng_seed: RngSeed::Fixed(2022),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_chain_agrees_with_sorting_everything(
        params in any_params(),
        vocab_size in 1usize..400,
        seed in any::<u64>(),
        history in proptest::collection::vec(0u32..12, 0..60),
        prompt_tokens in 0usize..40,
    ) {
        let history: Vec<TokenId> = history.into_iter().map(TokenId).collect();
        let original = logits(vocab_size, seed, 4.0);
        let own = log_softmax(&original);
        let penalised = oracle::penalised(&original, &params, &history, prompt_tokens);
        let distribution = oracle::distribution(&penalised, &params);
        let mut sampler = Sampler::new(vocab_size);
        for position in 0..8 {
            let mut row = original.clone();
            let sampled =
                sampler.sample(&mut row, &params, &history, prompt_tokens, position).unwrap();
            let number = uniform(params.seed.unwrap(), position as u64);
            let (wanted, distance) = oracle::draw(&distribution, number);
            let id = sampled.token.id.index();
            // Where f32 and f64 may round to different sides of a bound, either side is right.
            prop_assert!(id == wanted || distance < 1e-5, "{id} for {wanted}, {distance}");
            prop_assert!((f64::from(sampled.token.logprob) - own[id]).abs() < 1e-4);
            let mut best: Vec<usize> = (0..vocab_size).collect();
            best.sort_by(|a, b| original[*b].total_cmp(&original[*a]).then(a.cmp(b)));
            best.truncate(5);
            let top: Vec<usize> = sampled.top.iter().map(|token| token.id.index()).collect();
            prop_assert_eq!(top, best);
            for token in sampled.top {
                prop_assert!((f64::from(token.logprob) - own[token.id.index()]).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn scores_are_the_log_softmax(seed in any::<u64>(), vocab_size in 1usize..3000) {
        let row = logits(vocab_size, seed, 8.0);
        let target = TokenId((seed % vocab_size as u64) as u32);
        let scored = Sampler::new(vocab_size).score(&row, target, 20).unwrap();
        let own = log_softmax(&row);
        prop_assert_eq!(scored.token.id, target);
        prop_assert!((f64::from(scored.token.logprob) - own[target.index()]).abs() < 2e-5);
        prop_assert_eq!(scored.top.len(), vocab_size.min(20));
    }
}

/// Pearson's statistic over many draws; `params` decides which tokens can come.
fn chi_square(row: &[f32], params: &SamplingParams, draws: usize) -> (f64, usize) {
    let penalised: Vec<f64> = row.iter().map(|logit| f64::from(*logit)).collect();
    let distribution = oracle::distribution(&penalised, params);
    let mut sampler = Sampler::new(row.len());
    let mut counts = vec![0usize; row.len()];
    for position in 0..draws {
        let mut row = row.to_vec();
        let sampled = sampler.sample(&mut row, params, &[], 0, position).unwrap();
        counts[sampled.token.id.index()] += 1;
    }
    let drawn: usize = distribution.iter().map(|(id, _)| counts[*id]).sum();
    assert_eq!(drawn, draws, "nothing outside the distribution is drawn");
    let statistic = distribution.iter().map(|(id, share)| {
        let expected = share * draws as f64;
        (counts[*id] as f64 - expected).powi(2) / expected
    });
    (statistic.sum(), distribution.len() - 1)
}

#[test]
fn draws_follow_the_distribution() {
    let row = logits(40, 7, 1.0);
    let plain = SamplingParams { seed: Some(11), ..SamplingParams::default() };
    let cases = [
        plain.clone(),
        SamplingParams { temperature: 0.5, ..plain.clone() },
        SamplingParams { temperature: 2.0, top_k: 10, ..plain.clone() },
        SamplingParams { top_p: 0.7, ..plain.clone() },
        SamplingParams { min_p: 0.2, seed: Some(12), ..plain.clone() },
        SamplingParams { typical_p: 0.6, ..plain },
    ];
    for params in cases {
        let (statistic, freedom) = chi_square(&row, &params, 40_000);
        // Mean k and variance 2k: beyond 4 deviations comes by chance less than once in 10^4, and
        // the seeds are fixed.
        let bound = freedom as f64 + 4.0 * (2.0 * freedom as f64).sqrt();
        assert!(statistic < bound, "{statistic} for {freedom} degrees of freedom: {params:?}");
    }
}

#[test]
fn random_numbers_depend_on_seed_and_position_alone_and_are_uniform() {
    let mut buckets = [0usize; 64];
    for position in 0..64_000 {
        let number = uniform(3, position);
        assert!((0.0..1.0).contains(&number));
        assert_eq!(number, uniform(3, position));
        buckets[(number * 64.0) as usize] += 1;
    }
    let statistic: f64 =
        buckets.iter().map(|count| (*count as f64 - 1000.0).powi(2) / 1000.0).sum();
    assert!(statistic < 63.0 + 4.0 * (2.0f64 * 63.0).sqrt(), "{statistic}");
    // Neighbouring seeds and positions share no numbers.
    let mut numbers: Vec<u64> =
        (0..100).flat_map(|seed| (0..100).map(move |at| uniform(seed, at).to_bits())).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 10_000);
}

#[test]
fn a_seed_gives_the_same_tokens_whatever_came_before() {
    let row = logits(1000, 5, 2.0);
    let params = SamplingParams { seed: Some(42), top_p: 0.9, ..SamplingParams::default() };
    let sample = |sampler: &mut Sampler, position| {
        let sampled = sampler.sample(&mut row.clone(), &params, &[], 0, position).unwrap();
        sampled.token.id
    };
    let mut sampler = Sampler::new(1000);
    let forward: Vec<TokenId> = (0..50).map(|at| sample(&mut sampler, at)).collect();
    let backward: Vec<TokenId> =
        (0..50).rev().map(|at| sample(&mut Sampler::new(1000), at)).collect();
    assert!(forward.iter().eq(backward.iter().rev()));
    let other = SamplingParams { seed: Some(43), ..params.clone() };
    let others: Vec<TokenId> = (0..50)
        .map(|at| sampler.sample(&mut row.clone(), &other, &[], 0, at).unwrap().token.id)
        .collect();
    assert_ne!(forward, others);
}

#[test]
fn numbers_that_are_not_finite_are_refused_with_the_token() {
    let mut sampler = Sampler::new(100);
    for (value, at) in [(f32::NAN, 3), (f32::INFINITY, 99), (f32::NEG_INFINITY, 0)] {
        let mut row = logits(100, 1, 1.0);
        row[at] = value;
        let error = sampler.score(&row, TokenId(5), 0).unwrap_err();
        assert_eq!((error.token, error.value.to_bits()), (TokenId(at as u32), value.to_bits()));
        let greedy = SamplingParams::greedy();
        assert!(sampler.sample(&mut row, &greedy, &[], 0, 0).is_err());
    }
}

#[test]
fn greedy_takes_the_first_of_equals_and_heeds_bias() {
    let mut sampler = Sampler::new(50);
    let greedy = SamplingParams::greedy();
    let mut row = vec![1.0; 50];
    row[7] = 2.0;
    row[9] = 2.0;
    let sampled = sampler.sample(&mut row.clone(), &greedy, &[], 0, 0).unwrap();
    assert_eq!(sampled.token.id, TokenId(7));
    let biased =
        SamplingParams { logit_bias: vec![(TokenId(7), -100.0), (TokenId(1000), 100.0)], ..greedy };
    let again = sampler.sample(&mut row, &biased, &[], 0, 0).unwrap();
    assert_eq!(again.token.id, TokenId(9));
    assert_eq!(again.token.logprob, sampled.token.logprob, "the model's own distribution");
}

#[test]
fn extremes_stay_finite() {
    let mut sampler = Sampler::new(300);
    let history: Vec<TokenId> = (0..2000).map(|at| TokenId(at % 3)).collect();
    let params = SamplingParams {
        temperature: 1e-30,
        repetition_penalty: 100.0,
        dry: DryParams { multiplier: 100.0, base: 100.0, ..DryParams::default() },
        typical_p: 0.01,
        top_p: f32::MIN_POSITIVE,
        seed: Some(0),
        ..SamplingParams::default()
    };
    params.validate().unwrap();
    let mut row = logits(300, 2, 1e30);
    let sampled = sampler.sample(&mut row, &params, &history, 10, 0).unwrap();
    assert!(row.iter().all(|logit| logit.is_finite()));
    assert!(sampled.token.logprob <= 0.0);
}
