//! How often the workers of a step meet, and that saving barriers changes no bit of any result.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use stage::{Model, options, plan_tokens, run, score_next};
use std::ops::Range;
use tandem::executor::{Stage, StageOptions, StagePart, StepPasses, handoff};
use tandem::step::{RowOutput, StepPlan};
use tandem::tensor::KvDType;
use tandem::units::TokenId;
use tiny_model::{Family, TinyModel, split_mix};

const ALL_PASSES: [StepPasses; 3] = [StepPasses::OnePerOp, StepPasses::ByCost, StepPasses::Fewest];

fn tiny(family: Family) -> Model {
    Model::from_bytes(&TinyModel::new(family).gguf().bytes())
}

fn with(passes: StepPasses, threads: usize) -> StageOptions {
    StageOptions { passes, ..options(threads, 2048) }
}

fn tokens(seed: u64, count: usize) -> Vec<TokenId> {
    let mut seed = seed;
    (0..count).map(|_| TokenId((split_mix(&mut seed) % 256) as u32)).collect()
}

/// A step with the given positions of sequences 0 ..; all of their logits are wanted.
fn step(sequences: &[Vec<TokenId>], ranges: &[(usize, Range<usize>)]) -> StepPlan {
    let mut plan = StepPlan::default();
    for (id, range) in ranges {
        let place = (*id as u64, *id as u32 * 8);
        let tokens = &sequences[*id];
        plan_tokens(&mut plan, place, tokens, range.clone(), score_next(tokens, 20));
    }
    plan
}

/// Steps of every kind: a prompt of several tiles, short chunks, decoding alone and in company,
/// decoding beside a prompt, more rows of logits than a tile.
fn steps() -> Vec<StepPlan> {
    let sequences: Vec<_> = (0..6).map(|id| tokens(id + 1, 120)).collect();
    let decode = |at: usize| (0..6).map(|id| (id, at..at + 1)).collect::<Vec<_>>();
    let mut steps = vec![
        vec![(0, 0..70)],
        vec![(1, 0..16), (2, 0..3)],
        vec![(0, 70..71)],
        vec![(1, 16..70), (0, 71..72), (2, 3..4)],
        vec![(2, 4..70), (3, 0..70), (4, 0..70), (5, 0..70)],
        vec![(0, 72..75), (1, 70..75)],
        (2..6).map(|id| (id, 70..75)).collect(),
    ];
    steps.extend((75..80).map(decode));
    steps.push(vec![(3, 80..96), (4, 80..81)]);
    steps.iter().map(|ranges| step(&sequences, ranges)).collect()
}

fn rows(stage: &mut Stage, plans: &[StepPlan]) -> Vec<Vec<RowOutput>> {
    plans.iter().map(|plan| run(stage, plan).rows).collect()
}

#[test]
fn no_saved_barrier_changes_a_bit() {
    let plans = steps();
    for family in Family::ALL {
        let model = tiny(family);
        let wanted = rows(&mut model.stage(&with(StepPasses::OnePerOp, 1)), &plans);
        for passes in ALL_PASSES {
            for threads in 1..=4 {
                let got = rows(&mut model.stage(&with(passes, threads)), &plans);
                assert!(got == wanted, "{family:?}, {passes:?}, {threads} threads");
            }
        }
    }
}

#[test]
fn heads_that_are_no_whole_groups_have_the_same_bits_too() {
    let plans = steps();
    for (n_heads, n_kv_heads, head_dim) in [(8, 8, 16), (8, 4, 20), (4, 1, 96)] {
        let model = TinyModel { n_heads, n_kv_heads, head_dim, ..TinyModel::new(Family::Qwen3) };
        let model = Model::from_bytes(&model.gguf().bytes());
        for dtype in KvDType::ON_CPU {
            let options = |passes, threads| {
                let mut options = with(passes, threads);
                options.kv.dtype = dtype;
                options
            };
            let wanted = rows(&mut model.stage(&options(StepPasses::OnePerOp, 2)), &plans);
            for passes in ALL_PASSES {
                let got = rows(&mut model.stage(&options(passes, 3)), &plans);
                assert!(got == wanted, "heads of {head_dim}, {passes:?}, {dtype}");
            }
        }
    }
}

#[test]
fn stages_that_hand_over_have_the_same_bits_too() {
    let model = tiny(Family::Gemma3);
    let plans = steps();
    let wanted = rows(&mut model.stage(&with(StepPasses::OnePerOp, 1)), &plans);
    for passes in ALL_PASSES {
        let [mut first, mut last] = StagePart::split(model.spec.layers.len(), 3)
            .map(|part| model.stage(&StageOptions { part: Some(part), ..with(passes, 2) }));
        let (to_last, from_first) = handoff(2, 512, model.spec.embedding_dim);
        first.set_outlet(to_last);
        last.set_inlet(from_first);
        let got = std::thread::scope(|scope| {
            scope.spawn(|| plans.iter().for_each(|plan| drop(run(&mut first, plan))));
            rows(&mut last, &plans)
        });
        assert!(got == wanted, "{passes:?}");
    }
}

/// Barriers of a step on a stage of two workers.
fn barriers(stage: &mut Stage, plan: &StepPlan) -> u64 {
    let before = stage.barriers();
    run(stage, plan);
    stage.barriers() - before
}

/// Barriers of a layer and those of a step besides, from models of two and three layers.
fn barriers_per_layer(family: Family, passes: StepPasses, plans: &[StepPlan]) -> (u64, u64) {
    let [two, three] = [2, 3].map(|layers| {
        let model = TinyModel { layers, ..TinyModel::new(family) };
        let mut stage = Model::from_bytes(&model.gguf().bytes()).stage(&with(passes, 2));
        plans.iter().map(|plan| barriers(&mut stage, plan)).last().unwrap()
    });
    (three - two, two - 2 * (three - two))
}

/// A prompt of sequences 0 .. `count`, and a step of `tokens` more of each.
fn prompt_and(count: usize, tokens: usize) -> [StepPlan; 2] {
    let sequences: Vec<_> = (0..count).map(|id| self::tokens(id as u64 + 1, 60)).collect();
    let all = |range: Range<usize>| (0..count).map(|id| (id, range.clone())).collect::<Vec<_>>();
    [step(&sequences, &all(0..20)), step(&sequences, &all(20..20 + tokens))]
}

#[test]
fn decoding_takes_five_barriers_per_dense_layer_and_prefill_eight() {
    let (one, four) = (prompt_and(1, 1), prompt_and(4, 1));
    let (short, wide) = (prompt_and(4, 8), prompt_and(5, 16));
    for (family, plans, passes, wanted) in [
        // One more in a step: the logits' products, before rows of them are sampled.
        (Family::Llama, &one[..], StepPasses::ByCost, (5, 1)),
        (Family::Llama, &four, StepPasses::ByCost, (5, 1)),
        (Family::Qwen3, &four, StepPasses::ByCost, (5, 1)),
        // One more where tokens are routed.
        (Family::Mixtral, &four, StepPasses::ByCost, (6, 1)),
        // 32 rows, of which one worker does 16 more than its half, cost no more than a barrier.
        (Family::Llama, &short, StepPasses::ByCost, (5, 1)),
        // 80 rows are shared out, with barriers after entering and selecting; three tiles of
        // logits take five.
        (Family::Llama, &wide, StepPasses::ByCost, (7, 7)),
        (Family::Llama, &wide, StepPasses::Fewest, (5, 5)),
        // Prompts whose tiles are too long to be rotated in copies.
        (Family::Llama, &wide[..1], StepPasses::ByCost, (8, 9)),
        (Family::Llama, &wide[..1], StepPasses::Fewest, (6, 7)),
        (Family::Mixtral, &wide[..1], StepPasses::ByCost, (10, 9)),
        (Family::Llama, &four, StepPasses::OnePerOp, (8, 3)),
        (Family::Mixtral, &four, StepPasses::OnePerOp, (10, 3)),
    ] {
        let got = barriers_per_layer(family, passes, plans);
        assert_eq!(got, wanted, "{family:?}, {passes:?}, {} plans", plans.len());
    }
}

#[test]
fn new_tokens_on_both_sides_of_a_cut_are_stored_by_those_who_read_them() {
    // Segments end at multiples of 256 positions; a single KV head is shared by all workers.
    let sequence = [tokens(9, 1700)];
    let prompt = (0..1533).step_by(500).map(|start| start..1533.min(start + 500));
    let steps = [1533..1538, 1538..1539, 1539..1555, 1555..1556];
    let plans: Vec<_> = prompt.chain(steps).map(|range| step(&sequence, &[(0, range)])).collect();
    let model = TinyModel { n_kv_heads: 1, ..TinyModel::new(Family::Qwen3) };
    let model = Model::from_bytes(&model.gguf().bytes());
    for dtype in KvDType::ON_CPU {
        let stage = |passes, threads| {
            let mut options = with(passes, threads);
            options.kv.dtype = dtype;
            model.stage(&options)
        };
        let wanted = rows(&mut stage(StepPasses::OnePerOp, 1), &plans);
        for threads in 2..=4 {
            let mut stage = stage(StepPasses::ByCost, threads);
            assert!(rows(&mut stage, &plans) == wanted, "{threads} threads, {dtype}");
            // Merging a divided item takes one more.
            let layers = model.spec.layers.len() as u64;
            assert_eq!(barriers(&mut stage, plans.last().unwrap()), 6 * layers + 1);
        }
    }
}
