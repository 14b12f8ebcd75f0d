//! Choices from the most likely tokens alone, against those from the whole row.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tandem::request::SamplingParams;
use tandem::sampling::{Sampler, Shortlist};
use tandem::units::TokenId;

/// Tokens at most `below` nats below the best, as a device lists them: ascending by id, with how
/// far the others lie below it at least.
fn listed(row: &[f32], below: f32) -> (Vec<(TokenId, f32)>, f32) {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let all = (0u32..).map(TokenId).zip(row.iter().copied());
    let (listed, others): (Vec<_>, Vec<_>) = all.partition(|(_, logit)| largest - logit <= below);
    let others = others.iter().map(|(_, logit)| largest - logit).fold(f32::INFINITY, f32::min);
    (listed, others)
}

/// Σ exp(logit − largest).
fn total(row: &[f32]) -> f64 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().map(|logit| f64::from(logit - largest).exp()).sum()
}

proptest! {
    // A fixed seed: this test's sum and the sampler's may differ on which side of top-p's bound a
    // token falls, about once in 10^6 rows.
    #![proptest_config(ProptestConfig {
        cases: 400,
        rng_seed: RngSeed::Fixed(2023),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_a_shortlist_decides_is_what_the_row_decides(
        params in super::any_params(),
        vocab_size in 1usize..3000,
        seed in any::<u64>(),
        below in prop_oneof![Just(1e9f32), 0.0f32..12.0],
    ) {
        let params = SamplingParams {
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            dry: Default::default(),
            logit_bias: Vec::new(),
            ..params
        };
        let row = super::logits(vocab_size, seed, 3.0);
        let (tokens, others_below) = listed(&row, below);
        let list = Shortlist { tokens: &tokens, others_below, total: total(&row) };
        let mut sampler = Sampler::new(vocab_size);
        for position in 0..8 {
            let whole = sampler.sample(&mut row.clone(), &params, &[], 0, position).unwrap();
            if !params.takes_best() {
                let chosen = sampler.choose_listed(&list, &params, position);
                let has_top_k = params.top_k > 0 && params.top_k < vocab_size;
                let is_decided = if has_top_k {
                    tokens.len() >= params.top_k
                } else {
                    params.truncates() && params.typical_p == 1.0 && tokens.len() == vocab_size
                };
                prop_assert!(chosen.is_some() || !is_decided, "{} tokens", tokens.len());
                prop_assert_eq!(chosen.unwrap_or(whole.token.id), whole.token.id);
            }
            let log_sum = whole.top[0].logprob;
            let log_sum = row[whole.top[0].id.index()] - log_sum;
            match list.top(params.top_logprobs, (vocab_size, log_sum)) {
                Some(top) => {
                    let ids = |top: &[tandem::step::TokenLogprob]| -> Vec<TokenId> {
                        top.iter().map(|token| token.id).collect()
                    };
                    prop_assert_eq!(ids(&top), ids(&whole.top));
                }
                None => prop_assert!(tokens.len() < params.top_logprobs.min(vocab_size)),
            }
        }
    }
}

#[test]
fn a_list_that_reaches_the_mass_or_the_smallest_share_decides() {
    let row = super::logits(2000, 4, 3.0);
    let mut sampler = Sampler::new(row.len());
    let nucleus = SamplingParams { top_p: 0.8, seed: Some(1), ..SamplingParams::default() };
    let likely = SamplingParams { min_p: 0.02, seed: Some(2), ..SamplingParams::default() };
    for (params, too_few, enough) in [(nucleus, 0.1, 11.0), (likely, 3.0, 4.0)] {
        for (below, is_decided) in [(too_few, false), (enough, true)] {
            let (tokens, others_below) = listed(&row, below);
            assert!(tokens.len() < row.len());
            let list = Shortlist { tokens: &tokens, others_below, total: total(&row) };
            let chosen = sampler.choose_listed(&list, &params, 0);
            assert_eq!(chosen.is_some(), is_decided, "{params:?} of {} tokens", tokens.len());
        }
    }
}
