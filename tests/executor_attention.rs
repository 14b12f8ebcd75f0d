//! Attention as the executor deals it out: long contexts give the same bits on any number of
//! workers, alone and in company.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use stage::{Model, options, plan_tokens, run, score_next};
use tandem::executor::{Stage, StageOptions};
use tandem::step::{RowOutput, StepPlan};
use tandem::units::TokenId;
use tiny_model::{Family, TinyModel, split_mix};

/// Long enough that one head is work for several workers.
const LONG: usize = 1700;
const STEP_TOKENS: usize = 512;

fn random_tokens(seed: u64, count: usize, vocab: usize) -> Vec<TokenId> {
    let mut seed = seed;
    (0..count).map(|_| TokenId((split_mix(&mut seed) % vocab as u64) as u32)).collect()
}

type Bits = (usize, Vec<(TokenId, u32)>);

fn bits(row: &RowOutput) -> Bits {
    let all = std::iter::once(&row.token).chain(&row.top);
    (row.position, all.map(|token| (token.id, token.logprob.to_bits())).collect())
}

/// Which other sequences decode beside the long one.
#[derive(Clone, Copy, Debug)]
enum Company {
    Nobody,
    /// One of 60 tokens, one that starts.
    Short,
}

/// The last tokens' logits of a long sequence whose prompt was computed in whole steps.
fn decode_long(stage: &mut Stage, tokens: &[TokenId], company: Company) -> Vec<Bits> {
    let prompt = tokens.len() - 5;
    for start in (0..prompt).step_by(STEP_TOKENS) {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (1, 0), tokens, start..prompt.min(start + STEP_TOKENS), |_| None);
        run(stage, &plan);
    }
    let mut rows = Vec::new();
    for position in prompt..tokens.len() - 1 {
        let mut plan = StepPlan::default();
        if let Company::Short = company {
            let own = position - prompt..position - prompt + 1;
            plan_tokens(&mut plan, (7, 60), &tokens[9..], own, |_| None);
        }
        let next = score_next(tokens, 10);
        plan_tokens(&mut plan, (1, 0), tokens, position..position + 1, next);
        if let Company::Short = company {
            plan_tokens(&mut plan, (8, 61), &tokens[50..], 0..60, |_| None);
        }
        rows.extend(run(stage, &plan).rows.iter().map(bits));
    }
    rows
}

fn check(model: &Model, variant: impl Fn(usize) -> StageOptions) {
    let tokens = random_tokens(3, LONG, model.spec.vocab_size);
    let wanted = decode_long(&mut model.stage(&variant(1)), &tokens, Company::Nobody);
    assert_eq!(wanted.len(), 4);
    for threads in 1..=4 {
        let mut stage = model.stage(&variant(threads));
        for company in [Company::Nobody, Company::Short] {
            let got = decode_long(&mut stage, &tokens, company);
            assert!(got == wanted, "{}: {threads} workers, {company:?}", model.spec.name);
        }
    }
}

#[test]
fn long_contexts_have_the_same_bits_on_any_number_of_workers() {
    // Llama has two KV heads, Gemma one, and layers with a window.
    for family in [Family::Llama, Family::Gemma3] {
        let model = Model::from_bytes(&TinyModel::new(family).gguf().bytes());
        check(&model, |threads| options(threads, 2100));
    }
}
