//! What saved barriers save: the time of steps with one barrier per op, over that of steps that
//! save those which cost more than the work that replaces them, and that of steps that save all.
//! Where the last ratio is above the one before, `ELEMENTS_PER_WORKER` of `executor/passes.rs` is
//! too small for the machine. `cargo bench --bench passes -- [MODEL.gguf] [threads]`
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark's report")]

#[path = "../tests/support/stage.rs"]
mod stage;

use stage::{Model, options, plan_tokens, run};
use std::sync::Arc;
use std::time::Instant;
use tandem::executor::{Stage, StageOptions, StepPasses};
use tandem::formats::Checkpoint;
use tandem::request::SamplingParams;
use tandem::step::{LogitsTask, StepPlan};
use tandem::units::TokenId;

const ALL: [StepPasses; 3] = [StepPasses::OnePerOp, StepPasses::ByCost, StepPasses::Fewest];
/// Tokens in the store before each sequence's first step.
const CONTEXT: usize = 128;
/// Steps that one stage runs before the next has its turn: few, so that some turns are not
/// disturbed by other programs.
const STEPS: usize = 4;
const ROUNDS: usize = 60;

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
    let mut options = options(threads, 64 * 256);
    options.pool.cores = (0..threads).collect();
    let weights = model.stage(&options).weights().clone();
    let mut stages = ALL.map(|passes| {
        let options = StageOptions { passes, ..options.clone() };
        Stage::restart(weights.clone(), &options).unwrap()
    });
    println!("{}, {threads} threads, ratios of the best of {ROUNDS} times", model.spec.name);
    println!("| streams | barriers a step | by cost | fewest |\n|---|---|---|---|");
    for width in [1, 2, 4, 8, 12, 16, 32] {
        let plans: Vec<_> = (0..STEPS).map(|step| plan(width, CONTEXT + step)).collect();
        let best = times(&mut stages, &plans);
        let barriers = stages.each_mut().map(|stage| {
            let before = stage.barriers();
            run(stage, &plans[0]);
            stage.barriers() - before
        });
        let ratio = |other: usize| best[0] / best[other];
        println!("| {width} | {barriers:?} | {:.3} | {:.3} |", ratio(1), ratio(2));
    }
}

/// Seconds that each stage takes for the plans, the best of all rounds.
fn times(stages: &mut [Stage; 3], plans: &[StepPlan]) -> [f64; 3] {
    let mut best = [f64::INFINITY; 3];
    for _ in 0..ROUNDS {
        for (stage, best) in stages.iter_mut().zip(&mut best) {
            run(stage, &plans[0]);
            let started = Instant::now();
            plans.iter().for_each(|plan| drop(run(stage, plan)));
            *best = best.min(started.elapsed().as_secs_f64());
        }
    }
    best
}

fn plan(width: usize, position: usize) -> StepPlan {
    let params = Arc::new(SamplingParams::greedy());
    let tokens: Vec<_> = (0..=position).map(|index| TokenId(index as u32 * 7 + 100)).collect();
    let mut plan = StepPlan::default();
    for id in 0..width {
        let blocks = (id as u64, id as u32 * 8);
        plan_tokens(&mut plan, blocks, &tokens, position..position + 1, |_| {
            let params = params.clone();
            Some(LogitsTask::Sample { params, history: 0..0, prompt_tokens: 0 })
        });
    }
    plan
}
