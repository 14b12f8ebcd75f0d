//! Right answers: real models against an exact forward pass (all weights dequantised, all
//! arithmetic in 32-bit floats), with teacher forcing, and the perplexity of a text.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "support/stage.rs"]
mod stage;

use serde::Deserialize;
use stage::{Model, options, plan_tokens, run, score_next};
use std::path::Path;
use tandem::request::{AddSpecial, ParseSpecial};
use tandem::step::{RowOutput, StepPlan};
use tandem::tensor::KvDType;
use tandem::tokenizer::Tokenizer;
use tandem::units::TokenId;

#[derive(Deserialize)]
struct Golden {
    model: String,
    llama_cpp_mean_abs_dlogprob_from_exact: f64,
    cases: Vec<Case>,
}

/// A prompt and what greedy decoding gave, with the exact distribution of each step.
#[derive(Deserialize)]
struct Case {
    kind: String,
    prompt_tokens: Vec<TokenId>,
    ids: Vec<TokenId>,
    exact_logprobs: Vec<f64>,
    exact_top_ids: Vec<Vec<TokenId>>,
    exact_top_logprobs: Vec<Vec<f64>>,
}

/// How often the best token was the exact one where that leads clearly, and how far we are off.
#[derive(Default)]
struct Tally {
    steps: usize,
    clear: usize,
    same: usize,
    distance: f64,
}

/// An exact best token that leads by so many nats is clearly the best.
const CLEAR_LEAD: f64 = 0.3;

impl Tally {
    fn add(&mut self, case: &Case, step: usize, ours: &RowOutput) {
        self.steps += 1;
        self.distance += (f64::from(ours.token.logprob) - case.exact_logprobs[step]).abs();
        let exact = &case.exact_top_logprobs[step];
        if exact[0] - exact[1] > CLEAR_LEAD {
            self.clear += 1;
            self.same += usize::from(ours.top[0].id == case.exact_top_ids[step][0]);
        }
    }
}

/// `allowed` is how far off the answers may be, as a multiple of llama.cpp's distance.
fn check(file: &str, dtype: KvDType, allowed: f64) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(file);
    let golden: Golden = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let Some(model) = Model::fetched(&golden.model) else { return };
    let mut with = options(2, 512);
    with.kv.dtype = dtype;
    let mut stage = model.stage(&with);
    let mut tally = Tally::default();
    for case in &golden.cases {
        let mut tokens = case.prompt_tokens.clone();
        tokens.extend(&case.ids);
        let first = case.prompt_tokens.len() - 1;
        let next = score_next(&tokens, 10);
        let mut plan = StepPlan::default();
        let last = tokens.len() - 1;
        plan_tokens(&mut plan, (1, 0), &tokens, 0..last, |position| {
            next(position).filter(|_| position >= first)
        });
        let output = run(&mut stage, &plan);
        let before = tally.distance;
        for (step, row) in output.rows.iter().enumerate() {
            tally.add(case, step, row);
        }
        let distance = (tally.distance - before) / output.rows.len() as f64;
        println!(
            "{file} {dtype} {}: {} steps, {distance:.4} nats off",
            case.kind,
            output.rows.len()
        );
    }
    let distance = tally.distance / tally.steps as f64;
    let share = tally.same as f64 / tally.clear as f64;
    let bound = golden.llama_cpp_mean_abs_dlogprob_from_exact * allowed;
    println!(
        "{file} {dtype}: {}/{} clear steps ({:.2} %), {distance:.4} nats off (bound {bound})",
        tally.same,
        tally.clear,
        100.0 * share
    );
    assert!(share >= 0.995, "{file}: best token in {share} of clear steps");
    assert!(distance <= bound, "{file}: {distance} nats off, allowed {bound}");
}

#[test]
fn smollm2_is_as_near_to_exact_as_its_peer() {
    check("smollm2-135m.json", KvDType::F16, 1.0);
}

#[test]
fn gemma3_is_as_near_to_exact_as_its_peer() {
    check("gemma-3-270m.json", KvDType::F16, 1.0);
}

#[test]
fn qwen2_half_a_billion_is_as_near_to_exact_as_its_peer() {
    check("qwen2.5-coder-0.5b.json", KvDType::F16, 1.0);
}

#[test]
fn qwen2_one_and_a_half_billion_is_as_near_to_exact_as_its_peer() {
    check("qwen2.5-coder-1.5b.json", KvDType::F16, 1.0);
}

#[test]
fn smollm2_with_a_kv_cache_in_8_bits_is_as_near_to_exact_as_its_peer_without() {
    check("smollm2-135m.json", KvDType::Q8_0, 1.0);
}

#[test]
fn gemma3_with_a_kv_cache_in_8_bits_is_as_near_to_exact_as_its_peer_without() {
    check("gemma-3-270m.json", KvDType::Q8_0, 1.0);
}

#[test]
fn qwen2_with_a_kv_cache_in_8_bits_keeps_its_clear_answers() {
    // Its keys have biases of a hundred times the other elements: 0.0392 nats off where keys are
    // not rotated, 0.0197 where they are.
    check("qwen2.5-coder-0.5b.json", KvDType::Q8_0, 1.6);
}

/// Tokens of a chunk, and how many chunks are scored.
const CHUNK_TOKENS: usize = 512;
const CHUNKS: usize = 16;

/// Ours must be as near to the exact one, that of the same weights in F32, as llama.cpp's is, whose
/// own rounding is half a percent away from it.
///
/// llama.cpp's method: chunks of 512 tokens, each of its own, BOS in place of the first token if
/// the model adds one, and only the second half of each chunk scored.
fn check_perplexity(file: &str, exact: f64, peer: f64) {
    let Some(model) = Model::fetched(file) else { return };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/shakespeare-120k.txt");
    let text = std::fs::read_to_string(path).unwrap();
    let tokenizer = Tokenizer::from_metadata(model.checkpoint.metadata()).unwrap();
    let tokens = tokenizer.encode(&text, AddSpecial::ModelDefault, ParseSpecial::No).unwrap();
    let mut stage = model.stage(&options(2, CHUNK_TOKENS));
    let (mut nats, mut scored) = (0.0, 0);
    for chunk in tokens.chunks_exact(CHUNK_TOKENS).take(CHUNKS) {
        let mut chunk = chunk.to_vec();
        if tokenizer.adds_bos() {
            chunk[0] = tokenizer.bos().unwrap();
        }
        let next = score_next(&chunk, 0);
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (1, 0), &chunk, 0..CHUNK_TOKENS, |position| {
            next(position).filter(|_| position >= CHUNK_TOKENS / 2)
        });
        for row in run(&mut stage, &plan).rows {
            nats -= f64::from(row.token.logprob);
            scored += 1;
        }
    }
    let perplexity = (nats / f64::from(scored)).exp();
    println!("{file}: perplexity {perplexity:.3} over {scored}, exact {exact}, llama.cpp {peer}");
    let off = (perplexity - exact).abs();
    assert!(off <= (peer - exact).abs(), "{file}: {perplexity}, exact {exact}, llama.cpp {peer}");
    // Which rounds activations to 8 bits, as the kernels do that are not asked for by name.
    if std::env::var_os("TANDEM_TEST_ISA").is_none() {
        assert!((perplexity / peer - 1.0).abs() < 0.005, "{file}: {perplexity}, llama.cpp {peer}");
    }
}

#[test]
fn smollm2_finds_shakespeare_as_surprising_as_its_peer() {
    check_perplexity("SmolLM2-135M-Instruct.Q4_1.gguf", 108.789, 109.40);
}

#[test]
fn gemma3_finds_shakespeare_as_surprising_as_its_peer() {
    check_perplexity("gemma-3-270m-q4_k_m.gguf", 117.976, 118.47);
}
