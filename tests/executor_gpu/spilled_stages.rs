//! Models cut into stages of which each has spilled weights: the CPU serves all of them, and each
//! has a ring of its own. On one GPU two stages have a stream each, as those of two GPUs do.

use super::spilled::layers;
use super::stage::{Model, options, plan_tokens, score_next};
use super::stages::{answers, ordinals, plans, run, run_whole};
use super::tiny_model::{Family, Output, TinyModel};
use super::{TOP, bits, load, on_gpu, random_tokens};
use std::sync::Arc;
use std::time::Duration;
use tandem::executor::{
    CpuPool, ExecutorError, GpuPipeline, GpuStage, GpuWeights, PartWeights, SpilledLayers,
    StageOptions, StagePart, WeightsRequest,
};
use tandem::step::{StepOutput, StepPlan};
use tandem::tensor::DType;
use tandem_kernels::PeerCopies;

/// Stages on these GPUs, cut before these layers.
type Cut<'a> = (&'a [usize], &'a [usize]);

fn with_share(streamed: u8) -> StageOptions {
    StageOptions { spill_streamed: Some(streamed), ..options(2, 1024) }
}

/// The parts of a model, each without what is spilled of its layers.
fn parts(model: &Model, cuts: &[usize], spilled: &SpilledLayers) -> Vec<StagePart> {
    let parts = StagePart::cut(model.spec.layers.len(), cuts);
    let without = |part: StagePart| {
        let of = |all: &[usize]| {
            let some = all.iter().copied().filter(|layer| part.layers.contains(layer));
            some.collect::<Vec<_>>()
        };
        let mine = layers(&of(&spilled.feed_forward), &of(&spilled.attention));
        if mine.is_empty() { part } else { part.without(mine) }
    };
    parts.into_iter().map(without).collect()
}

fn weights(model: &Model, (on, cuts): Cut<'_>, spilled: &SpilledLayers) -> Vec<Arc<GpuWeights>> {
    super::turn::take_turn();
    let options = with_share(0);
    let request = WeightsRequest {
        source: model.checkpoint.clone().into(),
        spec: model.spec.clone(),
        part: StagePart::whole(model.spec.layers.len()),
        isa: options.isa,
        huge_pages: options.huge_pages(),
    };
    let parts: Vec<_> = on.iter().copied().zip(parts(model, cuts, spilled)).collect();
    let mut pool = CpuPool::new(&options.pool).unwrap();
    let (mut last, mut total) = (0, 0);
    let mut report = |progress: tandem::executor::LoadProgress| {
        assert!(progress.done_bytes >= last && progress.done_bytes <= progress.total_bytes);
        (last, total) = (progress.done_bytes, progress.total_bytes);
    };
    let weights = GpuWeights::load_parts(&parts, &request, Some(&mut pool), &mut report).unwrap();
    assert_eq!(last, total);
    weights[0].limit_waits(Duration::from_secs(10));
    weights
}

fn start(weights: &[Arc<GpuWeights>], streamed: u8) -> GpuPipeline {
    GpuPipeline::start(weights, &with_share(streamed), PeerCopies::Allowed).unwrap()
}

/// The same model on one GPU, with the same weights spilled.
fn whole(model: &Model, spilled: &SpilledLayers, streamed: u8) -> Option<GpuStage> {
    let part = StagePart::spilling(model.spec.layers.len(), spilled.clone());
    on_gpu(model, &StageOptions { part: Some(part), ..with_share(streamed) })
}

/// Wide steps of a prompt that nobody waits for, and steps of all other kinds.
fn all_plans(vocab: usize) -> Vec<StepPlan> {
    let tokens = random_tokens(&mut 12, 900, vocab);
    let mut all = Vec::new();
    for (start, end) in [(0, 300), (300, 580), (580, 880)] {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (0, 0), &tokens, start..end, |_| None);
        all.push(plan);
    }
    let mut last = StepPlan::default();
    plan_tokens(&mut last, (0, 0), &tokens, 880..900, score_next(&tokens, TOP));
    all.push(last);
    all.extend(plans(vocab));
    all
}

#[test]
fn stages_that_spill_answer_with_the_bits_of_the_whole() {
    let all = [0, 1, 2, 3];
    let own = Output::Own;
    let models = [
        (TinyModel::new(Family::Llama).dtype(DType::Q4_0), layers(&all, &all)),
        (TinyModel::new(Family::Qwen2).dtype(DType::Q4_K), layers(&[0, 2, 3], &[1])),
        (TinyModel::new(Family::Gemma3).dtype(DType::Q8_0), layers(&[1, 2], &[0, 3])),
        (TinyModel::new(Family::Qwen3Moe).dtype(DType::Q4_0), layers(&all, &[])),
        // One stage spills nothing, whichever way the model is cut.
        (TinyModel { output: own, ..TinyModel::new(Family::Qwen3) }, layers(&[3], &[])),
        (TinyModel { output: own, ..TinyModel::new(Family::Llama) }, layers(&[0], &[0])),
        // Rows that lie as in the file.
        (TinyModel::new(Family::Llama).dtype(DType::BF16), layers(&[0, 1, 3], &[2, 3])),
        (TinyModel::new(Family::Qwen2).dtype(DType::E4M3_128), layers(&all, &[0, 2])),
    ];
    for (model, spilled) in models {
        let name = format!("{:?} {}: {spilled:?}", model.family, model.dtype);
        let model = Model::from_bytes(&TinyModel { layers: 4, ..model }.gguf().bytes());
        let plans = all_plans(model.spec.vocab_size);
        for streamed in [0, 100] {
            let Some(mut whole) = whole(&model, &spilled, streamed) else { return };
            let wanted = bits(&answers(&plans, |plan| run_whole(&mut whole, plan)));
            for on in ordinals() {
                for cut in 1..4 {
                    let weights = weights(&model, (&on, &[cut]), &spilled);
                    let mut stages = start(&weights, streamed);
                    let got = bits(&answers(&plans, |plan| run(&mut stages, plan)));
                    assert!(got == wanted, "{name}, {streamed} %, cut before {cut} on {on:?}");
                }
            }
        }
    }
}

#[test]
fn stages_whose_weights_can_not_stream_answer_with_the_bits_of_the_whole() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Llama).dtype(DType::Q4_0) };
    let model = Model::from_bytes(&model.gguf().bytes());
    let spilled = layers(&[0, 1, 2, 3], &[0, 2]);
    let part = StagePart::spilling(model.spec.layers.len(), spilled.clone());
    let options = StageOptions { part: Some(part), ..with_share(100) };
    let Some(mut whole) = load(&model, &options) else { return };
    whole.forgo_streams();
    let mut whole = GpuStage::start(Arc::new(whole), &options).unwrap();
    let plans = all_plans(model.spec.vocab_size);
    let wanted = bits(&answers(&plans, |plan| run_whole(&mut whole, plan)));
    for on in ordinals() {
        let mut weights = weights(&model, (&on, &[2]), &spilled);
        weights.iter_mut().for_each(|part| Arc::get_mut(part).unwrap().forgo_streams());
        let mut stages = start(&weights, 100);
        let got = bits(&answers(&plans, |plan| run(&mut stages, plan)));
        assert!(got == wanted, "on {on:?}");
    }
}

#[test]
fn shares_of_the_stages_are_those_of_the_whole_where_they_are_cut_alike() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Llama).dtype(DType::Q4_0) };
    let model = Model::from_bytes(&model.gguf().bytes());
    // Of two layers the CPU computes the first and the GPU the second, in both halves.
    let spilled = layers(&[0, 1, 2, 3], &[0, 1, 2, 3]);
    let Some(mut whole) = whole(&model, &spilled, 50) else { return };
    let plans = all_plans(model.spec.vocab_size);
    let wanted = bits(&answers(&plans, |plan| run_whole(&mut whole, plan)));
    for on in ordinals() {
        let mut stages = start(&weights(&model, (&on, &[2]), &spilled), 50);
        let got = bits(&answers(&plans, |plan| run(&mut stages, plan)));
        assert!(got == wanted, "on {on:?}");
    }
}

#[test]
fn more_than_two_stages_spill_and_activations_cross_through_host_memory() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Qwen3).dtype(DType::Q4_0) };
    let model = Model::from_bytes(&model.gguf().bytes());
    let spilled = layers(&[0, 2, 3], &[1, 2]);
    let plans = all_plans(model.spec.vocab_size);
    for streamed in [0, 100] {
        let Some(mut whole) = whole(&model, &spilled, streamed) else { return };
        let wanted = bits(&answers(&plans, |plan| run_whole(&mut whole, plan)));
        for [first, second] in ordinals() {
            for (on, cuts) in [
                (vec![first, second, first], vec![1, 2]),
                (vec![second, first, second, first], vec![1, 2, 3]),
            ] {
                let weights = weights(&model, (&on, &cuts), &spilled);
                for copies in [PeerCopies::Off, PeerCopies::Allowed] {
                    let mut stages =
                        GpuPipeline::start(&weights, &with_share(streamed), copies).unwrap();
                    let got = bits(&answers(&plans, |plan| run(&mut stages, plan)));
                    assert!(got == wanted, "{streamed} % on {on:?}, {copies:?}");
                }
            }
        }
    }
}

#[test]
fn stages_that_spill_are_replaced_in_the_middle_of_a_prompt() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Llama).dtype(DType::Q4_0) };
    let model = Model::from_bytes(&model.gguf().bytes());
    let spilled = layers(&[0, 1, 2, 3], &[3]);
    for on in ordinals() {
        let weights = weights(&model, (&on, &[2]), &spilled);
        let plans = all_plans(model.spec.vocab_size);
        for streamed in [0, 100] {
            let mut stages = start(&weights, streamed);
            let wanted = bits(&answers(&plans, |plan| run(&mut stages, plan)));
            for steps in 1..4 {
                // Weights are on their way that nobody has waited for.
                plans[..steps].iter().for_each(|plan| drop(run(&mut stages, plan)));
                drop(stages);
                stages = start(&weights, streamed);
            }
            assert!(bits(&answers(&plans, |plan| run(&mut stages, plan))) == wanted, "{on:?}");
        }
    }
}

#[test]
fn a_gpu_that_does_not_answer_ends_all_waits_of_stages_that_spill() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Llama).dtype(DType::Q4_0) };
    let model = Model::from_bytes(&model.gguf().bytes());
    let spilled = layers(&[0, 1, 2, 3], &[0, 1, 2, 3]);
    for on in ordinals() {
        for streamed in [0, 50, 100] {
            let weights = weights(&model, (&on, &[2]), &spilled);
            let mut stages = start(&weights, streamed);
            let tokens = random_tokens(&mut 4, 200, model.spec.vocab_size);
            let mut plan = StepPlan::default();
            plan_tokens(&mut plan, (0, 0), &tokens, 0..200, score_next(&tokens, 0));
            run(&mut stages, &plan);
            weights[0].limit_waits(Duration::ZERO);
            let failed = (0..100).find_map(|_| stages.run(&plan, &mut StepOutput::default()).err());
            assert!(failed.is_some(), "{streamed} % on {on:?}");
            let error = stages.run(&plan, &mut StepOutput::default()).unwrap_err();
            assert!(matches!(error, ExecutorError::GpuStageFailed { .. }), "{error}");
            drop(stages);
            // What is registered stays so where a GPU is lost, so other tests may not get it.
            weights.into_iter().for_each(std::mem::forget);
        }
    }
}

#[test]
fn weights_that_stages_have_spilled_are_held_once() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Llama).dtype(DType::Q4_0) };
    let model = Model::from_bytes(&model.gguf().bytes());
    let spilled = layers(&[1, 2, 3], &[2]);
    let Some(whole) = whole(&model, &spilled, 0) else { return };
    for on in ordinals() {
        for cut in 1..4 {
            let weights = weights(&model, (&on, &[cut]), &spilled);
            let host: usize = weights.iter().map(|part| part.spilled_bytes()).sum();
            assert_eq!(host, whole.weights().spilled_bytes(), "cut before {cut}");
            let has_spilled = |part: &StagePart| matches!(part.weights, PartWeights::Without(_));
            let parts = parts(&model, &[cut], &spilled);
            assert_eq!(
                parts.iter().filter(|part| has_spilled(part)).count(),
                1 + usize::from(cut > 1)
            );
        }
    }
}
