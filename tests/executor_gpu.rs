//! The interpreter on a GPU against the one on the CPU: the same program, plans and weights. Skips
//! where there is no GPU; `TANDEM_REQUIRE_GPU` makes that a failure.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "support/golden.rs"]
mod answers;
#[path = "executor_gpu/golden.rs"]
mod golden;
#[path = "support/hf_folder.rs"]
mod hf_folder;
#[path = "support/hf_layers.rs"]
mod hf_layers;
#[path = "executor_gpu/kv.rs"]
mod kv;
#[path = "executor_gpu/memory.rs"]
mod memory;
#[path = "support/reference.rs"]
mod reference;
#[path = "executor_gpu/runs.rs"]
mod runs;
#[path = "executor_gpu/sampling.rs"]
mod sampling;
#[path = "executor_gpu/spilled.rs"]
mod spilled;
#[path = "executor_gpu/spilled_stages.rs"]
mod spilled_stages;
#[path = "support/stage.rs"]
mod stage;
#[path = "executor_gpu/stages.rs"]
mod stages;
#[path = "executor_gpu/tiers.rs"]
mod swapped;
#[path = "support/tiers.rs"]
mod tiers;
#[path = "support/tiny_model.rs"]
mod tiny_model;
#[path = "executor_gpu/together.rs"]
mod together;
#[path = "support/turn.rs"]
mod turn;

use hf_folder::{Folder, Format};
use reference::{Reference, distance_from};
use stage::{Model, options, plan_tokens, run, score_next};
use std::sync::Arc;
use std::time::Duration;
use tandem::executor::{
    CpuPool, ExecutorError, GpuStage, GpuWeights, Program, StageOptions, StagePart, WeightsRequest,
};
use tandem::formats::Checkpoint;
use tandem::step::{RowOutput, StepOutput, StepPlan, Tier};
use tandem::tensor::{DType, KvDType};
use tandem::units::{BlockId, TokenId};
use tandem_kernels::GpuError;
use tiers::copy;
use tiny_model::{Family, TinyModel, split_mix};

/// Most likely tokens that are compared beside the target.
const TOP: usize = 10;

/// How many nats apart the two interpreters may be, on average: with float weights, where only the
/// order of sums differs; and with e4m3 ones, which wide steps multiply as f16. Quantised ones
/// round activations in ways of their own, and are compared with exact answers.
const EXACT: f64 = 1e-3;
const HALVES: f64 = FROM_REFERENCE.0 / 8.0;

/// Mean and largest distance in nats from plain f32 that rounding activations may cause in random
/// models: what the CPU is held to as well (`executor_reference.rs`). An f16 is off by an eighth of
/// what 8 bits are, at most.
const FROM_REFERENCE: (f64, f64) = (0.04, 0.3);

fn with(dtype: KvDType, mut options: StageOptions) -> StageOptions {
    options.kv.dtype = dtype;
    options
}

/// The model on the first GPU, if there is one; all of it, or what `options.part` says.
fn on_gpu(model: &Model, options: &StageOptions) -> Option<GpuStage> {
    let weights = load(model, options)?;
    Some(GpuStage::start(Arc::new(weights), options).unwrap())
}

/// Its weights.
fn load(model: &Model, options: &StageOptions) -> Option<GpuWeights> {
    turn::take_turn();
    load_now(model, options)
}

/// The same without a turn, for a test that has one.
fn load_now(model: &Model, options: &StageOptions) -> Option<GpuWeights> {
    let whole = StagePart::whole(model.spec.layers.len());
    let request = WeightsRequest {
        source: model.checkpoint.clone().into(),
        spec: model.spec.clone(),
        part: options.part.clone().unwrap_or(whole),
        isa: options.isa,
        huge_pages: options.huge_pages(),
    };
    let mut pool = CpuPool::new(&options.pool).unwrap();
    match GpuWeights::load(0, &request, Some(&mut pool), &mut |_| {}) {
        Ok(weights) => {
            weights.limit_waits(Duration::from_secs(10));
            Some(weights)
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
fn agree(model: &Model, dtype: KvDType, bound: f64) {
    let options = with(dtype, options(2, 1024));
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
        println!("{name}, {dtype}: tokens {start}..{end}: {mean:.6} nats apart, at most {most:.6}");
        assert!(mean <= bound, "{name}: {mean} nats apart in {start}..{end}, allowed {bound}");
    }
}

#[test]
fn float_models_of_every_family_and_type_agree_with_the_cpu() {
    for family in Family::ALL {
        for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_quantized()) {
            let model = TinyModel::new(family).dtype(dtype);
            // What wide steps multiply as f16 is rounded, which may swap experts.
            let is_rounded = family.has_experts() && dtype.block_elements() > 1;
            let model = if is_rounded { model.with_all_experts() } else { model };
            let bound = if dtype.block_elements() == 1 { EXACT } else { HALVES };
            agree(&Model::from_bytes(&model.gguf().bytes()), KvDType::F16, bound);
        }
    }
}

/// One sequence in narrow and wide steps against plain loops over f32.
fn near_reference(model: &Model, name: &str) {
    let Some(mut gpu) = on_gpu(model, &options(1, 512)) else { return };
    stays_near(&mut gpu, &exact(model), name);
}

/// Tokens of the sequence that is held against the reference, and their exact logits.
fn exact(model: &Model) -> (Vec<TokenId>, Vec<Vec<f32>>) {
    let tokens = random_tokens(&mut 11, 300, model.spec.vocab_size);
    let part = StagePart::whole(model.spec.layers.len());
    let program = Program::lower(&model.spec, &part).unwrap();
    let logits = Reference::new(&model.checkpoint, &program).logits(&tokens);
    (tokens, logits)
}

fn stays_near(gpu: &mut GpuStage, (tokens, logits): &(Vec<TokenId>, Vec<Vec<f32>>), name: &str) {
    let mut rows = Vec::new();
    for range in [0..30, 30..31, 31..32, 32..40, 40..150, 150..300] {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (1, 0), tokens, range, score_next(tokens, TOP));
        rows.extend(step(gpu, &plan));
    }
    assert_eq!(rows.len(), tokens.len() - 1);
    let (mean, most) = distance_from(logits, &rows);
    println!("{name}: {mean:.6} nats from exact, at most {most:.6}");
    let (mean_max, most_max) = FROM_REFERENCE;
    assert!(mean < mean_max && most < most_max, "{name}: {mean} nats from exact, at most {most}");
}

#[test]
fn quantised_models_of_every_family_and_type_stay_near_the_reference() {
    for family in Family::ALL {
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
            let model = TinyModel::new(family).dtype(dtype);
            // As of the CPU (`executor_reference.rs`): rounding may swap experts.
            let model = if family.has_experts() { model.with_all_experts() } else { model };
            let model = Model::from_bytes(&model.gguf().bytes());
            near_reference(&model, &format!("{family:?} {dtype}"));
        }
    }
}

#[test]
fn folders_of_awq_gptq_and_fp8_answer_as_files_do() {
    for (dtype, format) in [
        (DType::INT4_128, Format::Awq),
        (DType::INT4_64, Format::Gptq),
        (DType::INT4_32, Format::GptqV2),
        (DType::E4M3_128, Format::Fp8),
        (DType::E4M3_32, Format::Fp8),
    ] {
        for family in [Family::Llama, Family::Qwen2, Family::Mixtral] {
            let model = TinyModel::new(family).dtype(dtype);
            let mut model = if family.has_experts() { model.with_all_experts() } else { model };
            model.embedding_dtype = DType::BF16;
            let folder = Folder::new(&model, &model.gguf(), format).write();
            let model = Model::open(Checkpoint::open(folder.path()).unwrap());
            if dtype.is_quantized() {
                near_reference(&model, &format!("{family:?} {dtype} as {format:?}"));
            } else {
                agree(&model, KvDType::F16, HALVES);
            }
        }
    }
}

/// A position, and all bits of what its logits gave.
type Bits = (usize, Vec<(TokenId, u32)>);

fn bits(rows: &[RowOutput]) -> Vec<Bits> {
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
    for (family, (at_once, chunks)) in
        Family::ALL.into_iter().flat_map(|family| classes.map(|class| (family, class)))
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
fn times_of_ops_add_up_to_those_of_the_steps_and_change_no_bit() {
    let model = Model::from_bytes(&TinyModel::new(Family::Gemma3).gguf().bytes());
    let Some(mut gpu) = on_gpu(&model, &options(1, 1024)) else { return };
    let tokens = random_tokens(&mut 4, 340, model.spec.vocab_size);
    let plans = [0..300, 300..301, 301..302, 302..303, 303..339].map(|range| {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (0, 0), &tokens, range, score_next(&tokens, TOP));
        plan
    });
    let wanted = plans.each_ref().map(|plan| bits(&step(&mut gpu, plan)));
    assert_eq!(gpu.take_op_times(), None);
    gpu.start_op_times().unwrap();
    let mut took_ns = 0.0;
    for (plan, wanted) in plans.iter().zip(&wanted) {
        let mut output = StepOutput::default();
        gpu.run(plan, &mut output).unwrap();
        assert_eq!(&bits(&output.rows), wanted);
        took_ns += 1e3 * output.duration_us as f64;
    }
    let times = gpu.take_op_times().unwrap();
    println!("{times:#?}");
    let names: Vec<_> = times.iter().map(|time| time.op).collect();
    for name in ["inputs", "embed", "attention", "down", "logits, sampling", "host"] {
        assert_eq!(names.iter().filter(|other| **other == name).count(), 1, "{name}: {names:?}");
    }
    // Ops that are no kernel of their own take no time; reading the marks is no part of a step.
    assert!(times.iter().all(|time| time.work_ns >= 0.0 && time.wait_ns == 0.0));
    let sum: f64 = times.iter().map(|time| time.work_ns).sum();
    assert!(sum > 0.3 * took_ns && sum < 1.1 * took_ns, "{sum} of {took_ns}");
    let again = plans.each_ref().map(|plan| bits(&step(&mut gpu, plan)));
    assert_eq!(again, wanted);
}

#[test]
fn a_step_that_the_gpu_does_not_finish_in_its_time_is_the_last_one() {
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    let Some(mut gpu) = on_gpu(&model, &options(1, 512)) else { return };
    let tokens = random_tokens(&mut 4, 512, model.spec.vocab_size);
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, (0, 0), &tokens, 0..512, score_next(&tokens, 0));
    step(&mut gpu, &plan);
    gpu.weights().limit_waits(Duration::ZERO);
    // No step takes no time at all, but one may be done before anybody looks.
    let mut run = || gpu.run(&plan, &mut StepOutput::default());
    let hung = (0..100).find_map(|_| run().err()).unwrap();
    assert!(matches!(hung, ExecutorError::Gpu(GpuError::Hung { .. })), "{hung}");
    let error = run().unwrap_err();
    assert!(matches!(error, ExecutorError::GpuStageFailed { .. }), "{error}");
    let options = StageOptions { step_tokens_max: 64, ..options(1, 512) };
    let error = GpuStage::start(Arc::clone(gpu.weights()), &options).map(|_| ()).unwrap_err();
    assert!(matches!(error, ExecutorError::Gpu(GpuError::Hung { .. })), "{error}");
}

#[test]
fn what_has_no_kernels_is_refused_by_name() {
    let odd = TinyModel { n_ff: 40, ..TinyModel::new(Family::Mixtral) };
    let odd = Model::from_bytes(&odd.gguf().bytes());
    let error = GpuWeights::supports(&odd.spec).unwrap_err().to_string();
    let name = "blk.0.ffn_gate_exps.weight";
    assert!(error.starts_with(&format!("{name} of Q8_0 with experts of 40 rows")), "{error}");
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    GpuWeights::supports(&model.spec).unwrap();
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
    bad.copies.push(copy((Tier::Host, 0), (Tier::Device, 0)));
    let error = gpu.run(&bad, &mut StepOutput::default()).unwrap_err();
    assert!(matches!(error, ExecutorError::InvalidPlan { .. }), "{error}");
    assert_eq!(bits(&step(&mut gpu, &plan)), wanted);
}
