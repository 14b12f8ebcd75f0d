//! The interpreter on a GPU against the one on the CPU: the same program, plans and weights. Skips
//! where there is no GPU; `TANDEM_REQUIRE_GPU` makes that a failure.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "support/reference.rs"]
mod reference;
#[path = "executor_gpu/sampling.rs"]
mod sampling;
#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use reference::Reference;
use stage::{Model, options, plan_tokens, run, score_next};
use std::sync::Arc;
use tandem::executor::{
    ExecutorError, GpuStage, GpuStageOptions, GpuWeights, Program, StageOptions, StagePart,
    WeightsRequest,
};
use tandem::step::{BlockCopy, RowOutput, StepOutput, StepPlan, Tier};
use tandem::tensor::{DType, KvDType};
use tandem::units::{BlockId, TokenId};
use tiny_model::{Family, TinyModel, split_mix};

/// Most likely tokens that are compared beside the target.
const TOP: usize = 10;

/// How many nats apart the two interpreters may be, on average: with float weights, where only the
/// order of sums differs, and with real quantised ones. There activations are rounded to 8 bits, of
/// which some fall to the other side and move all that follow.
const EXACT: f64 = 1e-3;
const ROUNDED: f64 = 0.03;

/// Mean and largest distance in nats from plain f32 that rounding activations may cause in random
/// models: what the CPU is held to as well (`executor_reference.rs`).
const FROM_REFERENCE: (f64, f64) = (0.04, 0.3);

/// The model on the first GPU, if there is one.
fn on_gpu(model: &Model, options: &StageOptions) -> Option<GpuStage> {
    let request = WeightsRequest {
        source: model.checkpoint.clone().into(),
        spec: model.spec.clone(),
        part: StagePart::whole(model.spec.layers.len()),
        isa: None,
        huge_pages: options.huge_pages(),
    };
    match GpuWeights::load(0, &request, None, &mut |_| {}) {
        Ok(weights) => {
            let options =
                GpuStageOptions { kv: options.kv, step_tokens_max: options.step_tokens_max };
            Some(GpuStage::start(Arc::new(weights), &options).unwrap())
        }
        Err(ExecutorError::Gpu(error)) if std::env::var_os("TANDEM_REQUIRE_GPU").is_none() => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn random_tokens(seed: &mut u64, count: usize, vocab: usize) -> Vec<TokenId> {
    (0..count).map(|_| TokenId((split_mix(seed) % vocab as u64) as u32)).collect()
}

fn step(stage: &mut GpuStage, plan: &StepPlan) -> Vec<RowOutput> {
    let mut output = StepOutput::default();
    stage.run(plan, &mut output).unwrap();
    assert!(output.failures.is_empty(), "{:?}", output.failures);
    output.rows
}

/// Mean and largest difference of the target's log-probability.
fn distance(a: &[RowOutput], b: &[RowOutput]) -> (f64, f64) {
    assert_eq!(a.len(), b.len(), "rows");
    let off = a.iter().zip(b).map(|(a, b)| {
        assert_eq!((a.sequence, a.position), (b.sequence, b.position));
        f64::from(a.token.logprob - b.token.logprob).abs()
    });
    let off: Vec<f64> = off.collect();
    (off.iter().sum::<f64>() / off.len() as f64, off.iter().copied().fold(0.0, f64::max))
}

/// Two sequences on both devices, in one wide step and then some narrow ones.
fn agree(model: &Model, bound: f64) {
    let options = options(2, 1024);
    let Some(mut gpu) = on_gpu(model, &options) else { return };
    let mut cpu = model.stage(&options);
    let mut seed = 3;
    let vocab = model.spec.vocab_size;
    let sequences = [90, 41].map(|length| random_tokens(&mut seed, length, vocab));
    for (start, end) in [(0, 30), (30, 31), (31, 32), (32, 36), (36, 90)] {
        let mut plan = StepPlan::default();
        for (id, tokens) in sequences.iter().enumerate() {
            let range = start.min(tokens.len())..end.min(tokens.len());
            if !range.is_empty() {
                let next = score_next(tokens, TOP);
                plan_tokens(&mut plan, (id as u64, 4 * id as u32), tokens, range, next);
            }
        }
        let (mean, most) = distance(&step(&mut gpu, &plan), &run(&mut cpu, &plan).rows);
        let name = &model.spec.name;
        println!("{name}: tokens {start}..{end}: {mean:.6} nats apart, at most {most:.6}");
        assert!(mean <= bound, "{name}: {mean} nats apart in {start}..{end}, allowed {bound}");
    }
}

/// Whether weights of a type have kernels on a GPU.
fn is_on_gpu(dtype: DType) -> bool {
    tandem_kernels::DeviceMatrix::supports(dtype)
}

#[test]
fn float_models_of_every_family_and_type_agree_with_the_cpu() {
    for family in Family::ALL.into_iter().filter(|family| !family.has_experts()) {
        for dtype in
            DType::ALL.into_iter().filter(|dtype| is_on_gpu(*dtype) && !dtype.is_quantized())
        {
            let model = TinyModel::new(family).dtype(dtype);
            agree(&Model::from_bytes(&model.gguf().bytes()), EXACT);
        }
    }
}

/// One sequence in narrow and wide steps against plain loops over f32.
fn near_reference(model: &Model, name: &str) {
    let Some(mut gpu) = on_gpu(model, &options(1, 512)) else { return };
    let tokens = random_tokens(&mut 11, 300, model.spec.vocab_size);
    let mut rows = Vec::new();
    for range in [0..30, 30..31, 31..32, 32..40, 40..150, 150..300] {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (1, 0), &tokens, range, score_next(&tokens, TOP));
        rows.extend(step(&mut gpu, &plan));
    }
    let part = StagePart::whole(model.spec.layers.len());
    let program = Program::lower(&model.spec, &part).unwrap();
    assert_eq!(rows.len(), tokens.len() - 1);
    let (mean, most) = Reference::new(&model.checkpoint, &program).distance(&tokens, &rows);
    println!("{name}: {mean:.6} nats from exact, at most {most:.6}");
    let (mean_max, most_max) = FROM_REFERENCE;
    assert!(mean < mean_max && most < most_max, "{name}: {mean} nats from exact, at most {most}");
}

#[test]
fn quantised_models_of_every_family_and_type_stay_near_the_reference() {
    for family in Family::ALL.into_iter().filter(|family| !family.has_experts()) {
        for dtype in
            DType::ALL.into_iter().filter(|dtype| is_on_gpu(*dtype) && dtype.is_quantized())
        {
            let model = Model::from_bytes(&TinyModel::new(family).dtype(dtype).gguf().bytes());
            near_reference(&model, &format!("{family:?} {dtype}"));
        }
    }
}

#[test]
fn a_real_model_agrees_with_the_cpu() {
    let Some(model) = Model::fetched("SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    agree(&model, ROUNDED);
}

/// All bits of what a token's logits gave.
fn bits(rows: &[RowOutput]) -> Vec<(usize, Vec<(TokenId, u32)>)> {
    let of = |row: &RowOutput| {
        let all = std::iter::once(&row.token).chain(&row.top);
        (row.position, all.map(|token| (token.id, token.logprob.to_bits())).collect())
    };
    rows.iter().map(of).collect()
}

#[test]
fn a_token_has_the_same_bits_alone_and_in_any_batch_of_a_class_of_widths() {
    // How many tokens come at once alone, and together: of any three all steps are of one class, up
    // to 8 tokens or from 9 to 128.
    let classes = [(8, [1, 2, 2]), (1, [1, 1, 1]), (120, [9, 16, 33])];
    let families = Family::ALL.into_iter().filter(|family| !family.has_experts());
    for (family, (at_once, chunks)) in
        families.flat_map(|family| classes.map(|class| (family, class)))
    {
        let model = Model::from_bytes(&TinyModel::new(family).gguf().bytes());
        let options = options(1, 2048);
        let Some(mut gpu) = on_gpu(&model, &options) else { return };
        let mut seed = 5;
        let vocab = model.spec.vocab_size;
        let sequences = [120, 77, 40].map(|length| random_tokens(&mut seed, length, vocab));
        let tokens = &sequences[0];
        let mut wanted = Vec::new();
        for start in (0..120).step_by(at_once) {
            let mut alone = StepPlan::default();
            let range = start..start + at_once;
            plan_tokens(&mut alone, (0, 20), tokens, range, score_next(tokens, TOP));
            wanted.extend(bits(&step(&mut gpu, &alone)));
        }
        let mut got = Vec::new();
        let mut done = [0; 3];
        while done[0] < 120 {
            let mut plan = StepPlan::default();
            for (id, tokens) in sequences.iter().enumerate() {
                let chunk = chunks[split_mix(&mut seed) as usize % 3];
                let range = done[id]..tokens.len().min(done[id] + chunk);
                done[id] = range.end;
                if !range.is_empty() {
                    let next = score_next(tokens, TOP);
                    plan_tokens(&mut plan, (id as u64, 4 * id as u32), tokens, range, next);
                }
            }
            let rows = step(&mut gpu, &plan);
            got.extend(rows.into_iter().filter(|row| row.sequence.0 == 0));
        }
        assert_eq!(bits(&got), wanted, "{family:?}, {at_once} at once");
    }
}

#[test]
fn blocks_keep_their_keys_and_values_through_both_tiers() {
    let model = Model::from_bytes(&TinyModel::new(Family::Qwen3).gguf().bytes());
    let options = options(1, 512);
    let Some(mut gpu) = on_gpu(&model, &options) else { return };
    let tokens = random_tokens(&mut 9, 50, model.spec.vocab_size);
    let mut whole = StepPlan::default();
    plan_tokens(&mut whole, (0, 0), &tokens, 0..50, score_next(&tokens, TOP));
    let wanted = bits(&step(&mut gpu, &whole));
    let mut first = StepPlan::default();
    plan_tokens(&mut first, (1, 4), &tokens, 0..33, |_| None);
    step(&mut gpu, &first);
    // Blocks 4 and 5 go to the host, inside it, and come back as 8 and 9, one of them by a detour.
    let mut second = StepPlan::default();
    let mut copy = |from: (Tier, u32), to: (Tier, u32)| {
        let end = |(tier, block)| (tier, BlockId(block));
        second.copies.push(BlockCopy { from: end(from), to: end(to) });
    };
    copy((Tier::Device, 4), (Tier::Host, 0));
    copy((Tier::Device, 5), (Tier::Host, 1));
    copy((Tier::Host, 0), (Tier::Host, 2));
    copy((Tier::Host, 2), (Tier::Device, 10));
    copy((Tier::Device, 10), (Tier::Device, 8));
    copy((Tier::Host, 1), (Tier::Device, 9));
    plan_tokens(&mut second, (1, 8), &tokens, 33..50, score_next(&tokens, TOP));
    assert_eq!(bits(&step(&mut gpu, &second)), wanted[33..]);
}

#[test]
fn what_has_no_kernels_is_refused_by_name() {
    let experts = Model::from_bytes(&TinyModel::new(Family::Mixtral).gguf().bytes());
    let error = GpuWeights::supports(&experts.spec).unwrap_err().to_string();
    assert_eq!(error, "a mixture of experts on a GPU is not supported by this version");
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    GpuWeights::supports(&model.spec).unwrap();
    let mut options = options(1, 512);
    let Some(stage) = on_gpu(&model, &options) else { return };
    options.kv.dtype = KvDType::Q8_0;
    let with = GpuStageOptions { kv: options.kv, step_tokens_max: 64 };
    let error = GpuStage::start(stage.weights().clone(), &with).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("kv.dtype"), "{error}");
}

#[test]
fn a_plan_that_does_not_add_up_is_refused_and_nothing_is_lost() {
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    let Some(mut gpu) = on_gpu(&model, &options(1, 512)) else { return };
    let tokens = random_tokens(&mut 1, 10, model.spec.vocab_size);
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, (0, 0), &tokens, 0..10, score_next(&tokens, TOP));
    let wanted = bits(&step(&mut gpu, &plan));
    let mut bad = plan.clone();
    bad.block_tables[0] = BlockId(1000);
    let error = gpu.run(&bad, &mut StepOutput::default()).unwrap_err();
    assert!(matches!(error, ExecutorError::InvalidPlan { .. }), "{error}");
    let mut bad = plan.clone();
    bad.copies.push(BlockCopy { from: (Tier::Host, BlockId(99)), to: (Tier::Device, BlockId(0)) });
    let error = gpu.run(&bad, &mut StepOutput::default()).unwrap_err();
    assert!(matches!(error, ExecutorError::InvalidPlan { .. }), "{error}");
    assert_eq!(bits(&step(&mut gpu, &plan)), wanted);
}
