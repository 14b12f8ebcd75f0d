//! What a stage takes of a GPU's memory against what was planned, row by row, and what the driver
//! takes beside that.

use super::stage::{Model, options, plan_tokens, score_next};
use super::tiny_model::{Family, Output, TinyModel};
use super::{random_tokens, step, turn};
use std::sync::{Arc, OnceLock};
use tandem::actors::{on_gpus, parts_of};
use tandem::config::Config;
use tandem::executor::{
    CpuPool, ExecutorError, GpuStage, GpuWeights, KvOptions, StageMemory, StageOptions, StagePart,
    VramPlan, WeightSource, WeightsRequest,
};
use tandem::hardware::HardwareProfile;
use tandem::model::{ModelSpec, SyntheticModel};
use tandem::placement::{KERNELS_BYTES, Placement};
use tandem::request::RequestError;
use tandem::step::StepPlan;
use tandem::tensor::{DType, KvDType};
use tandem::units::ByteSize;
use tandem_kernels::driver;

/// Free bytes of the first GPU, if there is one.
fn free() -> Option<i64> {
    turn::take_turn();
    let Ok(driver) = driver() else {
        assert!(std::env::var_os("TANDEM_REQUIRE_GPU").is_none(), "a GPU is required");
        println!("skipped: no GPU");
        return None;
    };
    Some(driver.device(0).unwrap().memory_free_bytes as i64)
}

fn config(limit: u64) -> Config {
    let mut config = Config::default();
    config.gpu.device = "0".into();
    config.gpu.vram_limit = ByteSize(limit);
    config.kv.swap_bytes = ByteSize(0);
    config
}

fn place(spec: &ModelSpec, config: &Config) -> Result<Placement, RequestError> {
    // Asking the driver takes a third of a second.
    static HARDWARE: OnceLock<HardwareProfile> = OnceLock::new();
    Placement::plan(spec, HARDWARE.get_or_init(HardwareProfile::detect), config)
}

/// How a stage of a placement is made.
fn options_of(placement: &Placement) -> StageOptions {
    let kv = KvOptions {
        block_tokens: placement.block_tokens,
        dtype: placement.kv_dtype,
        device_blocks: placement.device_blocks,
    };
    StageOptions { kv, step_tokens_max: placement.step_tokens_max, ..options(4, 0) }
}

fn load(
    (source, spec): (WeightSource, &Arc<ModelSpec>),
    placement: &Placement,
    plan: VramPlan,
) -> Result<Arc<GpuWeights>, ExecutorError> {
    let options = options_of(placement);
    let request = WeightsRequest {
        source,
        spec: Arc::clone(spec),
        part: StagePart::whole(spec.layers.len()),
        isa: options.isa,
        huge_pages: options.huge_pages(),
    };
    let mut pool = CpuPool::new(&options.pool).unwrap();
    let parts = on_gpus(&parts_of(spec, placement));
    let mut loaded =
        GpuWeights::load_planned((&parts, &[plan]), &request, Some(&mut pool), &mut |_| {})?;
    Ok(loaded.pop().unwrap())
}

/// Every row is what was planned, to the byte; but planes of keys and values start at round places.
fn assert_as_planned(memory: StageMemory, placement: &Placement) {
    let stage = &placement.stages[0];
    let ring_bytes = stage.spill.as_ref().map_or(0, |spill| spill.ring_bytes);
    let got = [memory.weight_bytes, memory.activation_bytes, memory.ring_bytes];
    let planned = [stage.weight_bytes, stage.activation_bytes, ring_bytes];
    assert_eq!(got.map(|bytes| bytes as u64), planned, "{}", placement.model);
    let planes = 2 * 256 * stage.layers.len() as u64;
    let kv_bytes = memory.kv_bytes as u64;
    assert!((stage.kv_bytes..stage.kv_bytes + planes).contains(&kv_bytes), "{kv_bytes}");
    assert!(memory.graph_bytes as u64 <= stage.graph_bytes - KERNELS_BYTES);
}

/// The largest limit, in MiB, with which something is spilled.
fn spilling_limit(spec: &ModelSpec) -> u64 {
    let is_spilled = |limit: &u64| {
        place(spec, &config(limit << 20)).is_ok_and(|placement| placement.spill.is_some())
    };
    (100..600).rev().find(is_spilled).unwrap()
}

#[test]
fn a_stage_takes_what_was_planned() {
    if free().is_none() {
        return;
    }
    let large = |family| TinyModel { layers: 24, n_ff: 4096, ..TinyModel::new(family) };
    for (model, dtype, is_limited) in [
        (TinyModel::new(Family::Llama), KvDType::F16, false),
        (TinyModel::new(Family::Gemma3), KvDType::Q8_0, false),
        (TinyModel::new(Family::Qwen3Moe), KvDType::Fp8E4m3, false),
        (TinyModel { output: Output::Own, ..TinyModel::new(Family::Qwen2) }, KvDType::Bf16, false),
        (large(Family::Llama).dtype(DType::Q4_K), KvDType::F16, true),
        (large(Family::Llama).dtype(DType::BF16), KvDType::F16, true),
    ] {
        let model = Model::from_bytes(&model.gguf().bytes());
        let limit = if is_limited { spilling_limit(&model.spec) << 20 } else { 1 << 30 };
        let mut config = config(limit);
        config.kv.dtype = dtype;
        let placement = place(&model.spec, &config).unwrap();
        assert_eq!(placement.spill.is_some(), is_limited, "{:?}", placement.notes);
        let plan = VramPlan::of(&placement.stages[0]);
        let from = || (model.checkpoint.clone().into(), &model.spec);
        let weights = load(from(), &placement, plan).unwrap();
        let options = options_of(&placement);
        let mut stage = GpuStage::start(Arc::clone(&weights), &options).unwrap();
        assert_as_planned(stage.memory(), &placement);
        let tokens = random_tokens(&mut 7, 40, model.spec.vocab_size);
        for _ in 0..3 {
            let mut plan = StepPlan::default();
            plan_tokens(&mut plan, (0, 0), &tokens, 0..40, score_next(&tokens, 0));
            step(&mut stage, &plan);
        }
        assert_as_planned(stage.memory(), &placement);
        drop(stage);
        // As after a crash; then with more than was planned.
        let again = GpuStage::start(Arc::clone(&weights), &options).unwrap();
        assert_as_planned(again.memory(), &placement);
        drop(again);
        let mut more = options.clone();
        more.kv.device_blocks = (plan.usable_bytes / placement.block_bytes()) as usize;
        let refused = GpuStage::start(Arc::clone(&weights), &more).map(drop).unwrap_err();
        assert!(matches!(refused, ExecutorError::Vram(_)), "{refused}");
        GpuStage::start(weights, &options).unwrap();
        let less = VramPlan { usable_bytes: placement.device_bytes() - 1, ..plan };
        let refused = load(from(), &placement, less).map(drop).unwrap_err();
        assert!(matches!(refused, ExecutorError::Vram(_)), "{refused}");
    }
}

#[test]
fn the_driver_takes_no_more_for_kernels_and_recorded_steps_than_was_planned() {
    for (family, layers, dtype) in [
        (Family::Llama, 2, DType::Q4_0),
        (Family::Llama, 32, DType::Q4_0),
        (Family::Llama, 80, DType::Q6_K),
        (Family::Gemma3, 48, DType::Q4_K),
        (Family::Mixtral, 32, DType::Q4_0),
        (Family::Qwen3Moe, 48, DType::BF16),
    ] {
        let Some(before) = free() else { return };
        let model = TinyModel { layers, ..TinyModel::new(family) }.dtype(dtype);
        let model = Model::from_bytes(&model.gguf().bytes());
        let mut config = config(8 << 30);
        config.kv.cache_bytes = ByteSize(1);
        let placement = place(&model.spec, &config).unwrap();
        let from = (model.checkpoint.clone().into(), &model.spec);
        let weights = load(from, &placement, VramPlan::of(&placement.stages[0])).unwrap();
        let mut stage = GpuStage::start(weights, &options_of(&placement)).unwrap();
        let tokens = random_tokens(&mut 7, 200, model.spec.vocab_size);
        let own = stage.memory().total() as i64;
        let opened = before - free().unwrap() - own;
        let mut most = 0;
        // The third step of a shape is recorded.
        for count in (0..3).flat_map(|_| 1..=128).chain([200]) {
            let mut plan = StepPlan::default();
            plan_tokens(&mut plan, (0, 0), &tokens, 0..count, score_next(&tokens, 0));
            step(&mut stage, &plan);
            most = most.max(stage.memory().graph_bytes);
        }
        let taken = before - free().unwrap() - own;
        let planned = placement.stages[0].graph_bytes as i64;
        let name = format!("{family:?} of {layers} layers, {dtype}");
        println!(
            "{name}: {opened} at first, {taken} with records that are counted as {most}, planned \
             {planned}"
        );
        assert!(most > 0, "{name}: nothing was recorded");
        assert!(taken <= planned, "{name}: {taken} bytes, planned {planned}");
    }
}

#[test]
fn the_driver_takes_little_more_than_large_models_ask_for() {
    for name in ["llama-8b:q4_k_m", "llama-1b:bf16", "qwen3-30b-a3b:q4_0"] {
        let Some(before) = free() else { return };
        let spec = Arc::new(name.parse::<SyntheticModel>().unwrap().spec());
        let placement = place(&spec, &config(0)).unwrap();
        let source = WeightSource::Random { seed: 1 };
        let weights = load((source, &spec), &placement, VramPlan::of(&placement.stages[0]));
        let stage = GpuStage::start(weights.unwrap(), &options_of(&placement)).unwrap();
        assert_as_planned(stage.memory(), &placement);
        let own = stage.memory().total() as i64;
        let more = before - free().unwrap() - own;
        println!("{name}: {more} more than {own}");
        assert!(more <= placement.margin_bytes as i64, "{name}: {more} more than {own}");
    }
}
