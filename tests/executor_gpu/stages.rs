//! Models cut into stages: two of them on one GPU, whose streams wait for each other as those of
//! two GPUs do, and on two GPUs where there are two. `TANDEM_REQUIRE_GPUS=2` makes it a failure
//! that there is one.

use super::stage::{Model, options, plan_tokens, score_next};
use super::tiny_model::{Family, Output, TinyModel};
use super::turn::take_turn;
use super::{TOP, bits, on_gpu, random_tokens};
use std::sync::Arc;
use std::time::Duration;
use tandem::executor::{
    CpuPool, ExecutorError, GpuPipeline, GpuStage, GpuWeights, StageOptions, StagePart,
    WeightsRequest,
};
use tandem::step::{BlockCopy, LogitsTask, RowOutput, StepOutput, StepPlan, Tier};
use tandem::tensor::DType;
use tandem::units::{BlockId, TokenId};
use tandem_kernels::{GpuError, PeerCopies, driver};

/// GPUs of the stages: twice the first, and the first two.
pub fn ordinals() -> Vec<[usize; 2]> {
    take_turn();
    let count = driver().and_then(|driver| driver.device_count()).unwrap_or(0);
    let required = std::env::var("TANDEM_REQUIRE_GPUS").ok().and_then(|count| count.parse().ok());
    assert!(count >= required.unwrap_or(0), "{count} GPUs, {required:?} are required");
    match count {
        0 => Vec::new(),
        1 => {
            println!("skipped: two GPUs");
            vec![[0, 0]]
        }
        _ => vec![[0, 0], [0, 1]],
    }
}

fn weights(
    model: &Model,
    (ordinals, cuts): (&[usize], &[usize]),
    options: &StageOptions,
) -> Vec<Arc<GpuWeights>> {
    let layers = model.spec.layers.len();
    let request = WeightsRequest {
        source: model.checkpoint.clone().into(),
        spec: model.spec.clone(),
        part: StagePart::whole(layers),
        isa: options.isa,
        huge_pages: options.huge_pages(),
    };
    let parts: Vec<_> = ordinals.iter().copied().zip(StagePart::cut(layers, cuts)).collect();
    let mut pool = CpuPool::new(&options.pool).unwrap();
    let mut last = 0;
    let mut report = |progress: tandem::executor::LoadProgress| {
        assert!(progress.done_bytes >= last && progress.done_bytes <= progress.total_bytes);
        last = progress.done_bytes;
    };
    let weights = GpuWeights::load_parts(&parts, &request, Some(&mut pool), &mut report).unwrap();
    weights[0].limit_waits(Duration::from_secs(10));
    weights
}

fn pipeline(
    model: &Model,
    (ordinals, cuts): (&[usize], &[usize]),
    options: &StageOptions,
    copies: PeerCopies,
) -> GpuPipeline {
    let weights = weights(model, (ordinals, cuts), options);
    GpuPipeline::start(&weights, options, copies).unwrap()
}

pub fn run(stages: &mut GpuPipeline, plan: &StepPlan) -> Vec<RowOutput> {
    let mut output = StepOutput::default();
    stages.run(plan, &mut output).unwrap();
    assert!(output.failures.is_empty() && output.refusal.is_none(), "{output:?}");
    output.rows
}

pub fn run_whole(stage: &mut GpuStage, plan: &StepPlan) -> Vec<RowOutput> {
    let mut output = StepOutput::default();
    stage.run(plan, &mut output).unwrap();
    output.rows
}

/// Steps of every class of widths: launched, recorded and replayed ones, single tokens, wide ones
/// that nobody waits for, and two sequences at once.
pub fn plans(vocab: usize) -> Vec<StepPlan> {
    let mut seed = 8;
    let [first, second] = [600, 40].map(|count| random_tokens(&mut seed, count, vocab));
    let nothing = |_| None::<LogitsTask>;
    let mut plans = Vec::new();
    let mut one = |range: std::ops::Range<usize>, is_wanted: bool| {
        let mut plan = StepPlan::default();
        if is_wanted {
            plan_tokens(&mut plan, (0, 0), &first, range, score_next(&first, TOP));
        } else {
            plan_tokens(&mut plan, (0, 0), &first, range, nothing);
        }
        plans.push(plan);
    };
    // A prompt in steps without logits, one after the other, and its end.
    for (start, end) in [(0, 150), (150, 300), (300, 301), (301, 330), (330, 360), (360, 390)] {
        one(start..end, false);
    }
    one(390..420, true);
    (420..430).for_each(|at| one(at..at + 1, true));
    (430..470).step_by(8).for_each(|at| one(at..at + 8, true));
    one(470..590, true);
    for at in 0..5 {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (0, 0), &first, 590 + at..591 + at, score_next(&first, TOP));
        let range = 8 * at..8 * at + 8;
        plan_tokens(&mut plan, (1, 20), &second, range, score_next(&second, TOP));
        plans.push(plan);
    }
    plans
}

pub fn answers(plans: &[StepPlan], run: impl FnMut(&StepPlan) -> Vec<RowOutput>) -> Vec<RowOutput> {
    plans.iter().flat_map(run).collect()
}

#[test]
fn a_model_cut_anywhere_answers_with_the_bits_of_the_whole() {
    let families = Family::ALL.map(|family| (family, DType::Q8_0, Output::Tied));
    let own =
        [(Family::Llama, DType::Q4_0, Output::Own), (Family::Llama, DType::BF16, Output::Own)];
    for (family, dtype, output) in families.into_iter().chain(own) {
        let model = TinyModel { layers: 4, output, ..TinyModel::new(family).dtype(dtype) };
        let model = Model::from_bytes(&model.gguf().bytes());
        let options = options(1, 1024);
        let Some(mut whole) = on_gpu(&model, &options) else { return };
        let plans = plans(model.spec.vocab_size);
        let wanted = bits(&answers(&plans, |plan| run_whole(&mut whole, plan)));
        for ordinals in ordinals() {
            for cut in 1..4 {
                let mut cut_up =
                    pipeline(&model, (&ordinals, &[cut]), &options, PeerCopies::Allowed);
                let got = bits(&answers(&plans, |plan| run(&mut cut_up, plan)));
                assert_eq!(got, wanted, "{family:?} {dtype} on {ordinals:?} cut before {cut}");
            }
        }
    }
}

#[test]
fn activations_may_cross_through_host_memory_and_more_than_two_stages() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Gemma3) };
    let model = Model::from_bytes(&model.gguf().bytes());
    let options = options(1, 1024);
    let Some(mut whole) = on_gpu(&model, &options) else { return };
    let plans = plans(model.spec.vocab_size);
    let wanted = bits(&answers(&plans, |plan| run_whole(&mut whole, plan)));
    for [first, second] in ordinals() {
        for (on, cuts) in [
            (vec![first, second], vec![2]),
            (vec![first, second, first], vec![1, 2]),
            (vec![second, first, second, first], vec![1, 2, 3]),
        ] {
            for copies in [PeerCopies::Off, PeerCopies::Allowed] {
                let mut cut_up = pipeline(&model, (&on, &cuts), &options, copies);
                let got = bits(&answers(&plans, |plan| run(&mut cut_up, plan)));
                assert_eq!(got, wanted, "on {on:?} cut before {cuts:?}, {copies:?}");
            }
        }
    }
}

#[test]
fn blocks_are_copied_in_all_stages() {
    let model = Model::from_bytes(&TinyModel::new(Family::Qwen3).gguf().bytes());
    let options = options(1, 512);
    for ordinals in ordinals() {
        let mut stages = pipeline(&model, (&ordinals, &[1]), &options, PeerCopies::Allowed);
        let tokens = random_tokens(&mut 9, 50, model.spec.vocab_size);
        let mut all = StepPlan::default();
        plan_tokens(&mut all, (0, 0), &tokens, 0..50, score_next(&tokens, TOP));
        let wanted = bits(&run(&mut stages, &all));
        let mut first = StepPlan::default();
        plan_tokens(&mut first, (1, 4), &tokens, 0..33, |_| None);
        run(&mut stages, &first);
        let mut second = StepPlan::default();
        let copy = |from: (Tier, u32), to: (Tier, u32)| BlockCopy {
            from: (from.0, BlockId(from.1)),
            to: (to.0, BlockId(to.1)),
        };
        second.copies.push(copy((Tier::Device, 4), (Tier::Device, 8)));
        second.copies.push(copy((Tier::Device, 5), (Tier::Device, 9)));
        plan_tokens(&mut second, (1, 8), &tokens, 33..50, score_next(&tokens, TOP));
        assert_eq!(bits(&run(&mut stages, &second)), wanted[33..], "{ordinals:?}");
    }
}

#[test]
fn new_stages_on_the_same_weights_answer_the_same() {
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    let options = options(1, 1024);
    for ordinals in ordinals() {
        let weights = weights(&model, (&ordinals, &[1]), &options);
        let plans = plans(model.spec.vocab_size);
        let start = || GpuPipeline::start(&weights, &options, PeerCopies::Allowed).unwrap();
        let mut stages = start();
        let wanted = bits(&answers(&plans, |plan| run(&mut stages, plan)));
        // One dies in the middle of a prompt, with a step under way that nobody has waited for.
        run(&mut stages, &plans[0]);
        drop(stages);
        let mut stages = start();
        assert_eq!(bits(&answers(&plans, |plan| run(&mut stages, plan))), wanted, "{ordinals:?}");
        let memory = stages.memory();
        for (stage, part) in memory.iter().zip(&weights) {
            assert_eq!(stage.weight_bytes, part.bytes());
            assert!(stage.kv_bytes > 0 && stage.activation_bytes > 0);
        }
    }
}

#[test]
fn a_bad_plan_is_refused_before_any_stage_has_begun() {
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    let options = options(1, 512);
    for ordinals in ordinals() {
        let mut stages = pipeline(&model, (&ordinals, &[1]), &options, PeerCopies::Allowed);
        let tokens = random_tokens(&mut 1, 10, model.spec.vocab_size);
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (0, 0), &tokens, 0..10, score_next(&tokens, TOP));
        let wanted = bits(&run(&mut stages, &plan));
        let mut bad = plan.clone();
        bad.tokens[0] = TokenId(1_000_000);
        let error = stages.run(&bad, &mut StepOutput::default()).unwrap_err();
        assert!(matches!(error, ExecutorError::InvalidPlan { .. }), "{error}");
        assert_eq!(bits(&run(&mut stages, &plan)), wanted);
        // A part alone has no beginning, or no end.
        let weights = weights(&model, (&ordinals, &[1]), &options);
        let error = GpuStage::start(weights[1].clone(), &options).map(|_| ()).unwrap_err();
        assert!(matches!(error, ExecutorError::Unsupported { .. }), "{error}");
    }
}

#[test]
fn a_gpu_that_does_not_answer_ends_all_stages_and_is_named() {
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    let options = options(1, 512);
    for ordinals in ordinals() {
        let weights = weights(&model, (&ordinals, &[1]), &options);
        let start = || GpuPipeline::start(&weights, &options, PeerCopies::Allowed);
        let mut stages = start().unwrap();
        let tokens = random_tokens(&mut 4, 512, model.spec.vocab_size);
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (0, 0), &tokens, 0..512, score_next(&tokens, 0));
        run(&mut stages, &plan);
        weights[0].limit_waits(Duration::ZERO);
        let hung = (0..100).find_map(|_| stages.run(&plan, &mut StepOutput::default()).err());
        let ExecutorError::Gpu(hung @ GpuError::Hung { ordinal, .. }) = hung.unwrap() else {
            panic!("another failure")
        };
        assert!(ordinals.contains(&ordinal), "{hung}");
        let error = stages.run(&plan, &mut StepOutput::default()).unwrap_err();
        assert!(matches!(error, ExecutorError::GpuStageFailed { .. }), "{error}");
        // Whichever of the two it was, neither is used any more.
        let error = start().map(|_| ()).unwrap_err();
        assert!(matches!(&error, ExecutorError::Gpu(again) if *again == hung), "{error}");
    }
}

#[test]
fn many_streams_after_a_single_token_have_the_bits_of_before() {
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    let options = options(1, 151 * 32);
    let Some(mut whole) = on_gpu(&model, &options) else { return };
    let tokens = random_tokens(&mut 6, 152, model.spec.vocab_size);
    // More streams than rows of logits exist at once.
    let mut many = StepPlan::default();
    for stream in 0..150 {
        let pair = &tokens[stream..stream + 2];
        plan_tokens(&mut many, (stream as u64, stream as u32), pair, 0..1, score_next(pair, TOP));
    }
    let mut single = StepPlan::default();
    plan_tokens(&mut single, (150, 150), &tokens, 0..1, score_next(&tokens, TOP));
    let wanted = bits(&run_whole(&mut whole, &many));
    assert_eq!(wanted.len(), 150);
    for _ in 0..3 {
        assert_eq!(bits(&run_whole(&mut whole, &many)), wanted);
        run_whole(&mut whole, &single);
    }
}
