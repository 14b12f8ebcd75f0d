//! Batch invariance: a token's logits have the same bits whatever else is in the step, however
//! the prompt is chunked and however many threads run, on every instruction set.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use stage::{Model, options, plan_tokens, run, score_next};
use std::ops::Range;
use tandem::executor::{Stage, StageOptions};
use tandem::step::{RowOutput, StepPlan};
use tandem::tensor::DType;
use tandem::units::TokenId;
use tandem_cpu_kernels::Isa;
use tiny_model::{Family, TinyModel, split_mix};

fn tiny(model: &TinyModel) -> Model {
    Model::from_bytes(&model.gguf().bytes())
}

/// Most likely tokens that are compared beside the target.
const TOP: usize = 20;

/// What one token's logits gave, with all bits.
type Bits = (usize, Vec<(TokenId, u32)>);

fn assert_same(got: &[Bits], wanted: &[Bits], name: &str) {
    assert_eq!(got.len(), wanted.len(), "{name}");
    let other = got.iter().zip(wanted).find(|(got, wanted)| got != wanted);
    assert!(other.is_none(), "{name}: first difference: {other:?}");
}

fn bits(row: &RowOutput) -> Bits {
    let all = std::iter::once(&row.token).chain(&row.top);
    (row.position, all.map(|token| (token.id, token.logprob.to_bits())).collect())
}

fn random_tokens(seed: &mut u64, count: usize, vocab: usize) -> Vec<TokenId> {
    (0..count).map(|_| TokenId((split_mix(seed) % vocab as u64) as u32)).collect()
}

/// All tokens of a sequence in one step of its own.
fn alone(stage: &mut Stage, tokens: &[TokenId], blocks: (u64, u32)) -> Vec<RowOutput> {
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, blocks, tokens, 0..tokens.len(), score_next(tokens, TOP));
    run(stage, &plan).rows
}

/// Several sequences in random chunks, a random choice of them in each step; the first sequence's
/// rows are returned.
fn together(stage: &mut Stage, sequences: &[Vec<TokenId>], seed: &mut u64) -> Vec<RowOutput> {
    let mut done = vec![0; sequences.len()];
    let mut rows = Vec::new();
    while done[0] < sequences[0].len() {
        let mut plan = StepPlan::default();
        let mut order: Vec<usize> = (0..sequences.len()).collect();
        let turn = split_mix(seed) as usize % sequences.len();
        order.rotate_left(turn);
        for id in order {
            let chunk = [0, 1, 1, 2, 5, 16, 33, 70][split_mix(seed) as usize % 8];
            let range: Range<usize> = done[id]..sequences[id].len().min(done[id] + chunk);
            if range.is_empty() {
                continue;
            }
            done[id] = range.end;
            let tokens = &sequences[id];
            plan_tokens(
                &mut plan,
                (id as u64, id as u32 * 8),
                tokens,
                range,
                score_next(tokens, TOP),
            );
        }
        if !plan.tokens.is_empty() {
            let output = run(stage, &plan);
            rows.extend(output.rows.into_iter().filter(|row| row.sequence.0 == 0));
        }
    }
    rows
}

fn check(model: &Model, lengths: &[usize], variants: &[StageOptions]) {
    let mut seed = 7;
    let vocab = model.spec.vocab_size;
    let sequences: Vec<_> =
        lengths.iter().map(|length| random_tokens(&mut seed, *length, vocab)).collect();
    let mut stage = model.stage(&variants[0]);
    let wanted: Vec<_> = alone(&mut stage, &sequences[0], (0, 0)).iter().map(bits).collect();
    assert_eq!(wanted.len(), lengths[0] - 1);
    for variant in variants {
        let mut stage = model.stage(variant);
        let threads = variant.pool.threads;
        // Other KV blocks than the first time, and a used store.
        let _ = alone(&mut stage, &sequences[1], (5, 1));
        let again: Vec<_> = alone(&mut stage, &sequences[0], (0, 3)).iter().map(bits).collect();
        let name = format!("{}, {threads} threads, {:?}", model.spec.name, variant.isa);
        assert_same(&again, &wanted, &format!("{name}, alone"));
        let got: Vec<_> = together(&mut stage, &sequences, &mut seed).iter().map(bits).collect();
        assert_same(&got, &wanted, &format!("{name}, together"));
    }
}

fn threads(counts: &[usize]) -> Vec<StageOptions> {
    counts.iter().map(|threads| options(*threads, 2048)).collect()
}

#[test]
fn tiny_models_of_every_family_are_batch_invariant() {
    for family in Family::ALL {
        let model = tiny(&TinyModel::new(family));
        check(&model, &[120, 40, 77], &threads(&[1, 2, 3]));
    }
}

#[test]
fn tiny_models_of_every_type_are_batch_invariant() {
    for dtype in DType::ALL {
        let model = tiny(&TinyModel::new(Family::Llama).dtype(dtype));
        check(&model, &[40, 33], &threads(&[2]));
    }
}

#[test]
fn experts_are_batch_invariant_however_many_tokens_they_get() {
    let experts = |family, dtype, [n_experts, used, n_ff]: [usize; 3]| TinyModel {
        n_experts,
        n_experts_used: used,
        n_ff,
        ..TinyModel::new(family).dtype(dtype)
    };
    for model in [
        experts(Family::Mixtral, DType::Q4_K, [2, 1, 256]),
        experts(Family::Qwen3Moe, DType::Q8_0, [40, 8, 96]),
        // Experts whose rows are no whole groups of the interleaved layout.
        experts(Family::Mixtral, DType::Q8_0, [3, 3, 40]),
        experts(Family::Qwen3Moe, DType::F32, [5, 1, 7]),
    ] {
        check(&tiny(&model), &[300, 45, 150], &threads(&[1, 2, 5]));
    }
}

#[test]
fn every_instruction_set_is_batch_invariant() {
    for isa in Isa::available() {
        let variant = StageOptions { isa: Some(isa), ..options(2, 2048) };
        for family in Family::ALL {
            for dtype in [DType::Q4_K, DType::F16] {
                let model = tiny(&TinyModel::new(family).dtype(dtype));
                check(&model, &[40, 9], std::slice::from_ref(&variant));
            }
        }
        // So many tokens that tiles take them in two halves.
        let variants =
            [1, 3].map(|threads| StageOptions { isa: Some(isa), ..options(threads, 2048) });
        check(&tiny(&TinyModel::new(Family::Llama).dtype(DType::Q4_0)), &[300, 45], &variants);
    }
}

#[test]
fn smollm2_is_batch_invariant() {
    let Some(model) = Model::fetched("SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    check(&model, &[100, 40, 60], &threads(&[1, 2]));
}
