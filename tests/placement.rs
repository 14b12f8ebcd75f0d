//! What lies where, on machines of every size, for a tiny model and real figures of memory.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "placement/cuts.rs"]
mod cuts;
#[path = "placement/full.rs"]
mod full;
#[path = "placement/gpu.rs"]
mod gpu;
#[path = "placement/gpu_rows.rs"]
mod gpu_rows;
#[path = "placement/nodes.rs"]
mod nodes;
#[path = "placement/predict.rs"]
mod predict;
#[path = "placement/predict_cpu.rs"]
mod predict_cpu;
#[path = "placement/several.rs"]
mod several;
#[path = "placement/spill.rs"]
mod spill;
#[path = "support/tiny_model.rs"]
mod tiny_model;
#[path = "placement/width.rs"]
mod width;
#[path = "placement/workers.rs"]
mod workers;

use proptest::prelude::*;
use std::path::Path;
use std::sync::OnceLock;
use tandem::config::Config;
use tandem::executor::{
    KvOptions, KvTiers, PoolOptions, Stage, StageOptions, StepPasses, TierOptions,
};
use tandem::formats::Checkpoint;
use tandem::hardware::HardwareProfile;
use tandem::model::ModelSpec;
use tandem::placement::Placement;
use tandem::request::RequestError;
use tandem::tensor::KvDType;
use tandem::units::ByteSize;
use tandem_cpu_kernels::Isa;
use tiny_model::{Family, TinyModel};

fn checkpoint(family: Family) -> Checkpoint {
    let bytes = TinyModel::new(family).gguf().bytes();
    Checkpoint::from_bytes(Path::new("tiny.gguf"), &bytes).unwrap()
}

fn spec_of(family: Family) -> ModelSpec {
    ModelSpec::from_checkpoint(&checkpoint(family)).unwrap()
}

fn spec() -> ModelSpec {
    spec_of(Family::Llama)
}

fn machine(available_bytes: u64) -> HardwareProfile {
    static HERE: OnceLock<HardwareProfile> = OnceLock::new();
    let here = HERE.get_or_init(HardwareProfile::detect);
    HardwareProfile { memory_available_bytes: available_bytes, ..here.clone() }
}

#[test]
fn a_large_machine_holds_the_whole_context_and_more() {
    let spec = spec();
    let placement = Placement::plan(&spec, &machine(64 << 30), &Config::default()).unwrap();
    assert_eq!(placement.context_tokens, spec.context_tokens_max);
    assert!(placement.device_blocks * placement.block_tokens >= 8 * placement.context_tokens);
    assert!(placement.notes.is_empty(), "{:?}", placement.notes);
}

#[test]
fn a_small_machine_gets_a_shorter_context_and_is_told() {
    let spec = spec();
    let config = Config::default();
    let all = Placement::plan(&spec, &machine(64 << 30), &config).unwrap();
    let fixed = all.stages[0].weight_bytes + all.stages[0].activation_bytes;
    let half_context = spec.kv_bytes_per_token(KvDType::F16) * spec.context_tokens_max as u64 / 2;
    let available = (fixed + half_context) * 16 / 15 + 1;
    let placement = Placement::plan(&spec, &machine(available), &config).unwrap();
    assert!(placement.context_tokens < spec.context_tokens_max);
    assert!(placement.notes.iter().any(|note| note.contains("memory holds")));
}

#[test]
fn what_does_not_fit_is_refused_with_figures() {
    let refused = Placement::plan(&spec(), &machine(1 << 20), &Config::default());
    let Err(RequestError::InsufficientMemory { device, need, free, suggest }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(device, "host memory");
    assert!(need > free && free < 1 << 20 && !suggest.is_empty());
}

#[test]
fn a_context_that_was_asked_for_is_never_shortened() {
    let mut config = Config::default();
    // With the last, bytes of blocks do not fit 64 bits.
    for tokens in [100_000_000, i64::MAX as usize, usize::MAX] {
        config.model.context_tokens = tokens;
        let refused = Placement::plan(&spec(), &machine(1 << 30), &config);
        assert!(matches!(refused, Err(RequestError::InsufficientMemory { .. })), "{tokens}");
    }
}

#[test]
fn the_executor_takes_what_was_planned() {
    for family in [Family::Llama, Family::Mixtral, Family::Qwen3Moe] {
        for dtype in KvDType::ON_CPU {
            takes_what_was_planned(family, dtype);
        }
    }
}

#[test]
fn a_plan_shows_how_much_of_the_weights_a_token_goes_through() {
    let spec = spec_of(Family::Mixtral);
    let placement = Placement::plan(&spec, &machine(4 << 30), &Config::default()).unwrap();
    let stage = &placement.stages[0];
    assert_eq!(
        (stage.expert_bytes, stage.active_expert_bytes * 2),
        (spec.expert_bytes(), stage.expert_bytes)
    );
    let row = placement.explain().into_iter().find(|row| row.what == "experts").unwrap();
    let active = ByteSize(spec.active_expert_bytes());
    assert_eq!(row.bytes, spec.expert_bytes());
    assert_eq!(row.why, format!("of the weights; a token goes through {active}"));
    let dense = Placement::plan(&self::spec(), &machine(4 << 30), &Config::default()).unwrap();
    assert!(dense.explain().iter().all(|row| row.what != "experts"));
}

#[test]
fn a_plan_shows_the_tiers_behind_the_kv_store() {
    let mut config = Config::default();
    config.kv.swap_bytes = ByteSize(10 << 20);
    let rows = |config: &Config| {
        let placement = Placement::plan(&spec(), &machine(4 << 30), config).unwrap();
        let swap = placement.explain().into_iter().filter(|row| row.what == "KV swap");
        let rows: Vec<_> = swap.map(|row| (row.device, row.bytes)).collect();
        (rows, placement)
    };
    let (without, placement) = rows(&config);
    assert_eq!(without, [("host".to_owned(), placement.host_kv_bytes)]);
    config.kv.disk_bytes = ByteSize(64 << 20);
    let (with, placement) = rows(&config);
    assert_eq!(placement.disk_kv_bytes, placement.disk_blocks as u64 * placement.block_bytes());
    assert!((63 << 20..=64 << 20).contains(&placement.disk_kv_bytes));
    assert_eq!(with[1], ("disk".to_owned(), placement.disk_kv_bytes));
    assert_eq!(with[0], without[0]);
    assert!(placement.notes.iter().all(|note| !note.contains("kv.disk_bytes")));
    config.kv.disk_bytes = ByteSize(900 << 40);
    let (_, placement) = rows(&config);
    assert_eq!(placement.disk_blocks, 1 << 20);
    assert!(placement.notes.iter().any(|note| note.contains("kv.disk_bytes")));
}

fn takes_what_was_planned(family: Family, dtype: KvDType) {
    let (checkpoint, spec) = (checkpoint(family), spec_of(family));
    let mut config = Config::default();
    config.kv.dtype = dtype;
    let placement = Placement::plan(&spec, &machine(4 << 30), &config).unwrap();
    let options = StageOptions {
        part: None,
        pool: PoolOptions {
            threads: placement.workers.threads,
            cores: Vec::new(),
            nodes: Default::default(),
            spin_us: 0,
        },
        isa: Some(Isa::for_workers(placement.workers.threads)),
        huge_pages: false,
        kv: KvOptions {
            block_tokens: placement.block_tokens,
            dtype: placement.kv_dtype,
            device_blocks: placement.device_blocks,
        },
        step_tokens_max: placement.step_tokens_max,
        passes: StepPasses::ByCost,
        spill_streamed: None,
    };
    let stage = Stage::load(checkpoint.into(), spec.into(), &options, &mut |_| {}).unwrap();
    let (memory, planned) = (stage.memory(), &placement.stages[0]);
    assert_eq!(memory.kv_bytes as u64, planned.kv_bytes);
    let disk_folder = std::env::temp_dir();
    let tiers = TierOptions { host_blocks: placement.host_blocks, disk_blocks: 0, disk_folder };
    let tiers = KvTiers::new(stage.kv(), &tiers).unwrap().bytes();
    assert_eq!(tiers.host as u64, placement.host_kv_bytes);
    let near = |real: usize, planned: u64| {
        let ratio = real as f64 / planned as f64;
        assert!((0.9..=1.1).contains(&ratio), "{real} bytes, planned {planned}");
    };
    near(memory.weight_bytes, planned.weight_bytes);
    near(memory.activation_bytes, planned.activation_bytes);
}

proptest! {
    #[test]
    fn no_machine_is_overcommitted(
        available in 1u64 << 16..1 << 34,
        cache in 0u64..1 << 32,
        swap in 0u64..1 << 32,
    ) {
        let mut config = Config::default();
        config.kv.cache_bytes = ByteSize(cache);
        config.kv.swap_bytes = ByteSize(swap);
        let spec = spec();
        if let Ok(placement) = Placement::plan(&spec, &machine(available), &config) {
            prop_assert!(placement.device_bytes() <= available);
            let tokens = placement.device_blocks * placement.block_tokens;
            prop_assert!(tokens >= placement.context_tokens);
        }
    }
}
