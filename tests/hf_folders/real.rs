//! SmolLM2 as Hugging Face folders, which `tests/convert_gguf_to_hf.py` makes of the GGUF file. No
//! published AWQ, GPTQ or FP8 checkpoint is used: the script follows their published layouts.

use super::stage::{Model, model_path, options, plan_tokens, run, score_next};
use tandem::formats::Checkpoint;
use tandem::request::{AddSpecial, ParseSpecial};
use tandem::step::StepPlan;
use tandem::tokenizer::Tokenizer;
use tandem::units::TokenId;

const CHUNK_TOKENS: usize = 256;
const CHUNKS: usize = 4;

fn open(name: &str) -> Option<Model> {
    let path = model_path(&format!("hf-smollm2-135m/{name}"))?;
    Some(Model::open(Checkpoint::open(&path).unwrap()))
}

fn tokenizer(model: &Model) -> Tokenizer {
    Tokenizer::from_metadata(model.checkpoint.metadata()).unwrap()
}

fn shakespeare() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/shakespeare-120k.txt");
    std::fs::read_to_string(path).unwrap()
}

/// What greedy decoding gives.
fn greedy(model: &Model, prompt: &str, count: usize) -> Vec<TokenId> {
    let tokenizer = tokenizer(model);
    let mut tokens = tokenizer.encode(prompt, AddSpecial::ModelDefault, ParseSpecial::No).unwrap();
    let first = tokens.len();
    let mut stage = model.stage(&options(2, 256));
    let mut done = 0;
    for _ in 0..count {
        let mut plan = StepPlan::default();
        let last = tokens.len() - 1;
        // The target is any token: the most likely one is asked for beside it.
        let mut followed = tokens.clone();
        followed.push(TokenId(0));
        plan_tokens(&mut plan, (1, 0), &tokens, done..tokens.len(), |position| {
            score_next(&followed, 1)(position).filter(|_| position == last)
        });
        done = tokens.len();
        tokens.push(run(&mut stage, &plan).rows[0].top[0].id);
    }
    tokens.split_off(first)
}

/// Perplexity of a text, and how far the log-probability of each token is from another model's.
fn scores(model: &Model) -> Vec<f64> {
    let text = shakespeare();
    let tokens = tokenizer(model).encode(&text, AddSpecial::No, ParseSpecial::No).unwrap();
    let mut stage = model.stage(&options(2, CHUNK_TOKENS));
    let mut scores = Vec::new();
    for chunk in tokens.chunks_exact(CHUNK_TOKENS).take(CHUNKS) {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (1, 0), chunk, 0..CHUNK_TOKENS, score_next(chunk, 0));
        let rows = run(&mut stage, &plan).rows;
        scores.extend(rows.iter().map(|row| f64::from(row.token.logprob)));
    }
    scores
}

fn perplexity(scores: &[f64]) -> f64 {
    (-scores.iter().sum::<f64>() / scores.len() as f64).exp()
}

#[test]
fn f16_and_bf16_folders_answer_as_the_gguf_file_of_the_same_weights() {
    for name in ["f16", "bf16"] {
        let Some(folder) = open(name) else { return };
        let Some(gguf) = open(&format!("{name}.gguf")) else { return };
        for prompt in ["The capital of France is", "def fibonacci(n):\n", "1, 1, 2, 3, 5, 8,"] {
            assert_eq!(greedy(&folder, prompt, 32), greedy(&gguf, prompt, 32), "{name} {prompt:?}");
        }
    }
}

#[test]
fn the_tokens_of_tokenizer_json_are_those_of_the_gguf_vocabulary() {
    let (Some(folder), Some(gguf)) = (open("f16"), open("f16.gguf")) else { return };
    let (ours, theirs) = (tokenizer(&folder), tokenizer(&gguf));
    let text = shakespeare();
    let odd = "  a\n\n\n b\t\tc 12345 don't WON'T <|im_start|>user\nhi<|im_end|> é日本🦙 \u{a0}x";
    for text in [text.as_str(), odd, "", " "] {
        for parse in [ParseSpecial::No, ParseSpecial::Yes] {
            let encode = |tokenizer: &Tokenizer| {
                tokenizer.encode(text, AddSpecial::ModelDefault, parse).unwrap()
            };
            let ids = encode(&ours);
            assert!(ids == encode(&theirs), "{:?}", text.chars().take(40).collect::<String>());
            assert_eq!(ours.decode(&ids), theirs.decode(&ids));
        }
    }
    assert_eq!(ours.end_tokens(), theirs.end_tokens());
    assert_eq!((ours.bos(), ours.eos()), (theirs.bos(), theirs.eos()));
}

/// Mean distance of log-probabilities.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64
}

/// Each quantised folder has a twin in f32 of the very numbers that its bits stand for, computed by
/// the script before it packs them: against that only activations are rounded, and of FP8 nothing.
/// That rounding may cost no more than it costs the GGUF file in Q4_1, whose numbers the floats
/// are. What the script's plain rounding of weights costs is its own affair.
#[test]
fn quantised_folders_score_a_text_as_their_weights_do_in_floats() {
    let Some(floats) = open("f16") else { return };
    let Some(q4_1) = Model::fetched("SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    let exact = scores(&floats);
    let usual = distance(&scores(&q4_1), &exact);
    println!("f16: perplexity {:.3}; Q4_1 is {usual:.4} nats from it", perplexity(&exact));
    for (name, off_max) in [("fp8", 1e-4), ("fp8-block", 1e-4), ("awq", usual), ("gptq", usual)] {
        let (folder, twin) = (open(name), open(&format!("{name}-floats")));
        let (Some(folder), Some(twin)) = (folder, twin) else { return };
        let (ours, theirs) = (scores(&folder), scores(&twin));
        let off = distance(&ours, &theirs);
        let (perplexity, wanted) = (perplexity(&ours), perplexity(&theirs));
        println!("{name}: perplexity {perplexity:.3}, its twin {wanted:.3}, {off:.4} nats between");
        assert!((perplexity / wanted - 1.0).abs() < 0.01, "{name}: {perplexity}, {wanted}");
        assert!(off <= off_max, "{name}: {off} nats from its own weights, allowed {off_max}");
    }
}
