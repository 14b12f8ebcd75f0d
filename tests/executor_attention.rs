//! Attention as the executor deals it out: long contexts give the same bits on any number of
//! workers, alone and in company, with keys and values of 16 and of 8 bits.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiers.rs"]
mod tiers;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use stage::{Model, options, plan_tokens, run, score_next};
use tandem::executor::{Stage, StageOptions};
use tandem::step::{RowOutput, StepPlan, Tier};
use tandem::tensor::KvDType;
use tandem::units::TokenId;
use tandem_cpu_kernels::Isa;
use tiers::{moved, tiers};
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
        for dtype in KvDType::ON_CPU {
            check(&model, |threads| with(dtype, options(threads, 2100)));
        }
    }
}

fn with(dtype: KvDType, mut options: StageOptions) -> StageOptions {
    options.kv.dtype = dtype;
    options
}

/// Log-probabilities of every token of a sequence, in one step.
fn score(stage: &mut Stage, tokens: &[TokenId]) -> Vec<f32> {
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, (1, 0), tokens, 0..tokens.len(), score_next(tokens, 0));
    run(stage, &plan).rows.iter().map(|row| row.token.logprob).collect()
}

#[test]
fn eight_bits_stay_near_sixteen_in_half_the_memory() {
    for family in Family::ALL {
        let model = Model::from_bytes(&TinyModel::new(family).gguf().bytes());
        let tokens = random_tokens(11, 300, model.spec.vocab_size);
        for isa in Isa::available() {
            let options = StageOptions { isa: Some(isa), ..options(2, 512) };
            let mut sixteen = model.stage(&with(KvDType::F16, options.clone()));
            let mut eight = model.stage(&with(KvDType::Q8_0, options));
            let (wanted, got) = (score(&mut sixteen, &tokens), score(&mut eight, &tokens));
            let off = wanted.iter().zip(&got).map(|(a, b)| f64::from((a - b).abs()));
            let mean = off.sum::<f64>() / wanted.len() as f64;
            println!("{family:?} {isa}: {mean:.5} nats off");
            // Random weights amplify what real ones do not: see `golden.rs` for those.
            assert!(mean < 0.1, "{family:?} {isa}: {mean} nats off");
            assert_ne!(wanted, got, "{family:?} {isa}: 8 bits are not used");
            let ratio = eight.memory().kv_bytes as f64 / sixteen.memory().kv_bytes as f64;
            assert!((ratio - 8.5 / 16.0).abs() < 1e-9, "{family:?}: {ratio}");
        }
    }
}

#[test]
fn blocks_of_eight_bits_come_back_from_the_host_as_they_went() {
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    let tokens = random_tokens(5, 64, model.spec.vocab_size);
    let mut stage = model.stage(&with(KvDType::Q8_0, options(2, 512)));
    let last = |stage: &mut Stage, first_block: u32| {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (1, first_block), &tokens, 62..63, score_next(&tokens, 10));
        run(stage, &plan).rows.iter().map(bits).collect::<Vec<_>>()
    };
    let _ = score(&mut stage, &tokens[..63]);
    let wanted = last(&mut stage, 0);
    let folder = tempfile::TempDir::new().unwrap();
    let mut tiers = tiers(stage.kv(), folder.path());
    moved(
        &mut tiers,
        &[((Tier::Device, 0), (Tier::Host, 2)), ((Tier::Device, 1), (Tier::Host, 0))],
    );
    let other = random_tokens(6, 64, model.spec.vocab_size);
    let _ = score(&mut stage, &other);
    moved(
        &mut tiers,
        &[((Tier::Host, 2), (Tier::Device, 6)), ((Tier::Host, 0), (Tier::Device, 7))],
    );
    assert_eq!(last(&mut stage, 6), wanted);
}
