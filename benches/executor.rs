//! Tokens per second of a real model, and what share of the DRAM read roof of the same run a
//! decode reaches. `cargo bench --bench executor -- [MODEL.gguf] [threads]`
//!
//! A decode reads every weight once per step, so `weight bytes · tokens/s` against the roof says
//! how much of the machine a step leaves unused.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark's report")]

#[path = "../tests/support/stage.rs"]
mod stage;

use stage::{Model, options, plan_tokens, run};
use std::sync::Arc;
use std::time::Instant;
use tandem::executor::{CpuPool, Stage};
use tandem::formats::Checkpoint;
use tandem::request::SamplingParams;
use tandem::step::{LogitsTask, StepPlan};
use tandem::units::TokenId;

const PROMPT_TOKENS: usize = 256;
const DECODE_STEPS: usize = 64;
/// Far more than the caches hold.
const ROOF_BYTES: usize = 512 << 20;
const PASSES: usize = 5;

fn main() {
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let cores = std::thread::available_parallelism().unwrap().get();
    let threads = arguments.get(1).map_or(cores, |text| text.parse().unwrap());
    let model = match arguments.first() {
        Some(path) => Some(Model::open(Checkpoint::open(path.as_ref()).unwrap())),
        None => Model::fetched("SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    let Some(model) = model else { return };
    let mut options = options(threads, 64 * 512);
    options.pool.cores = (0..threads).collect();
    let started = Instant::now();
    let mut stage = model.stage(&options);
    let memory = stage.memory();
    println!(
        "{}: {} threads, loaded in {:.2} s, {:.1} MB of weights, {:.1} MB of activations",
        model.spec.name,
        threads,
        started.elapsed().as_secs_f64(),
        memory.weight_bytes as f64 / 1e6,
        memory.activation_bytes as f64 / 1e6,
    );
    let roof = read_roof(threads);
    println!("read roof {:.1} GB/s", roof / 1e9);
    for tokens in [32, PROMPT_TOKENS, 512] {
        let seconds = best((0..PASSES).map(|_| prefill(&mut stage, tokens)));
        println!("prefill {tokens:4} tokens: {:8.1} tokens/s", tokens as f64 / seconds);
    }
    for (width, context) in [(1, 64), (1, 400), (2, 64), (4, 64), (8, 64), (16, 64), (64, 64)] {
        let seconds = best((0..PASSES).map(|_| decode(&mut stage, width, context)));
        let steps = DECODE_STEPS as f64 / seconds;
        let share = 100.0 * steps * stage.weights().bytes_per_token() as f64 / roof;
        println!(
            "decode batch {width:3} at {context:3}: {:8.1} tokens/s, {steps:7.1} steps/s = \
             {share:5.1} % of the roof",
            steps * width as f64
        );
    }
}

fn best(seconds: impl Iterator<Item = f64>) -> f64 {
    seconds.fold(f64::INFINITY, f64::min)
}

fn tokens(count: usize) -> Vec<TokenId> {
    (0..count).map(|index| TokenId((index * 7919 % 20_000) as u32 + 100)).collect()
}

fn sample() -> LogitsTask {
    let params = Arc::new(SamplingParams::greedy());
    LogitsTask::Sample { params, history: 0..0, prompt_tokens: 0 }
}

fn prefill(stage: &mut Stage, count: usize) -> f64 {
    let tokens = tokens(count);
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, (1, 0), &tokens, 0..count, |position| {
        (position + 1 == count).then(sample)
    });
    let started = Instant::now();
    run(stage, &plan);
    started.elapsed().as_secs_f64()
}

/// Seconds of [`DECODE_STEPS`] steps of `width` sequences that are `context` tokens long at first.
/// What lies in the KV store does not change how long it takes.
fn decode(stage: &mut Stage, width: usize, context: usize) -> f64 {
    let tokens = tokens(context + DECODE_STEPS);
    let started = Instant::now();
    for step in 0..DECODE_STEPS {
        let mut plan = StepPlan::default();
        let position = context + step;
        for id in 0..width {
            let blocks = (id as u64, id as u32 * 16);
            plan_tokens(&mut plan, blocks, &tokens, position..position + 1, |_| Some(sample()));
        }
        run(stage, &plan);
    }
    started.elapsed().as_secs_f64()
}

/// Bytes per second that all threads together read from DRAM.
fn read_roof(threads: usize) -> f64 {
    let words = vec![1_u64; ROOF_BYTES / size_of::<u64>()];
    let options = tandem::executor::PoolOptions {
        threads,
        cores: Vec::new(),
        nodes: Default::default(),
        spin_us: 50,
    };
    let mut pool = CpuPool::new(&options).unwrap();
    let mut pass = || {
        let started = Instant::now();
        pool.run(&|worker| {
            let own = &words[worker.share(words.len(), 64)];
            let mut sums = [0_u64; 64];
            for chunk in own.chunks_exact(64) {
                for (sum, word) in sums.iter_mut().zip(chunk) {
                    *sum = sum.wrapping_add(*word);
                }
            }
            std::hint::black_box(sums);
        })
        .unwrap();
        started.elapsed().as_secs_f64()
    };
    ROOF_BYTES as f64 / best((0..PASSES).map(|_| pass()))
}
