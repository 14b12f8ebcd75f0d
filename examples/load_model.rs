//! What loading a model costs: time, memory while it lasts and after, and the first steps beside
//! later ones.
//!
//! `cargo run --release --example load_model -- FILE [threads] [prompt tokens]`
//!
//! Memory is the process's: `VmHWM` is the most that was ever resident, `RssAnon` what the process
//! allocated, `RssFile` pages of the model's file that are mapped.
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tandem::executor::{KvOptions, PoolOptions, Stage, StageOptions, StepPasses};
use tandem::formats::Checkpoint;
use tandem::model::ModelSpec;
use tandem::step::{LogitsRow, LogitsTask, PlannedSequence, StepOutput, StepPlan};
use tandem::tensor::KvDType;
use tandem::units::{BlockId, SequenceId, StepId, TokenId};

const BLOCK_TOKENS: usize = 32;
const BLOCKS: usize = 64;
const PROMPTS: usize = 4;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().expect("a GGUF file");
    let number = |at: usize, default: usize| {
        arguments.get(at).map_or(default, |text| text.parse().expect("a number"))
    };
    let (threads, prompt) = (number(1, 2), number(2, 64));
    let options = StageOptions {
        part: None,
        pool: PoolOptions {
            threads,
            cores: (0..threads).collect(),
            nodes: Default::default(),
            spin_us: 50,
        },
        isa: None,
        huge_pages: true,
        kv: KvOptions { block_tokens: BLOCK_TOKENS, dtype: KvDType::F16, device_blocks: BLOCKS },
        step_tokens_max: 512,
        passes: StepPasses::ByCost,
        spill_streamed: None,
    };
    let checkpoint = Arc::new(Checkpoint::open(Path::new(path)).expect("a checkpoint"));
    let spec = Arc::new(ModelSpec::from_checkpoint(&checkpoint).expect("a model"));
    report("opened");
    let started = Instant::now();
    let mut stage = Stage::load(checkpoint, spec.clone(), &options, &mut |_| {}).expect("a stage");
    let (seconds, bytes) = (started.elapsed().as_secs_f64(), spec.weight_bytes());
    let gigabytes = bytes as f64 / 1e9;
    println!("{gigabytes:.3} GB in {seconds:.3} s, {:.2} GB/s", gigabytes / seconds);
    report("loaded");
    let started = Instant::now();
    stage.warm_up(options.huge_pages()).expect("a step");
    println!("warm-up {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    for number in 0..PROMPTS {
        println!(
            "prompt {number} of {prompt} tokens: {:.1} ms",
            step(&mut stage, number, 0, prompt)
        );
        let at = prompt;
        println!("  next token: {:.1} ms", step(&mut stage, number, at, at + 1));
    }
    report("after requests");
}

/// Milliseconds of a step on the tokens `start .. end` of a sequence with KV blocks of its own.
fn step(stage: &mut Stage, sequence: usize, start: usize, end: usize) -> f64 {
    let blocks = BLOCKS / PROMPTS;
    let id = SequenceId(sequence as u64);
    let first_block = (sequence * blocks) as u32;
    let plan = StepPlan {
        step: StepId(1),
        tokens: (start..end).map(|token| TokenId(100 + token as u32)).collect(),
        sequences: vec![PlannedSequence {
            id,
            tokens: 0..end - start,
            position_start: start,
            block_table: 0..blocks,
        }],
        block_tables: (first_block..first_block + blocks as u32).map(BlockId).collect(),
        logits: vec![LogitsRow {
            sequence: id,
            row: end - start - 1,
            position: end,
            task: LogitsTask::Score { target: TokenId(7), top_logprobs: 0 },
        }],
        ..StepPlan::default()
    };
    let started = Instant::now();
    stage.run(&plan, &mut StepOutput::default()).expect("a step");
    started.elapsed().as_secs_f64() * 1e3
}

fn report(when: &str) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = |field: &str| {
        let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0)
    };
    let [peak, anonymous, file] =
        ["VmHWM:", "RssAnon:", "RssFile:"].map(|field| line(field) * 1024.0 / 1e6);
    println!("{when}: peak {peak:.0} MB, anonymous {anonymous:.0} MB, file {file:.0} MB");
}
