//! Which models are placed on a GPU, on machines whose GPUs are made up.

use super::{machine, spec, spec_of};
use crate::tiny_model::{Family, Output, TinyModel};
use proptest::prelude::*;
use std::path::Path;
use tandem::config::Config;
use tandem::executor::VramPlan;
use tandem::formats::Checkpoint;
use tandem::hardware::{Gpu, Gpus, HardwareProfile, MemoryHolder};
use tandem::model::{ExpertsSpec, FfnSpec, ModelSpec};
use tandem::placement::{Device, Placement};
use tandem::request::RequestError;
use tandem::tensor::{DType, KvDType};
use tandem::units::ByteSize;

pub const FREE: u64 = 8 << 30;

pub fn gpu(ordinal: usize, memory_free_bytes: u64) -> Gpu {
    Gpu {
        ordinal,
        name: "Fake 8".into(),
        pci_address: format!("0000:{ordinal:02x}:00.0"),
        numa_node: None,
        memory_total_bytes: 2 * memory_free_bytes,
        memory_free_bytes,
        compute_capability: "9.0".into(),
        multiprocessors: 8,
        holders: Vec::new(),
    }
}

pub fn with(devices: Vec<Gpu>) -> HardwareProfile {
    HardwareProfile { gpus: Gpus { devices, ..Gpus::default() }, ..machine(64 << 30) }
}

fn without() -> HardwareProfile {
    let absence = Some("no driver".into());
    HardwareProfile { gpus: Gpus { absence, ..Gpus::default() }, ..machine(64 << 30) }
}

pub fn config(device: &str) -> Config {
    let mut config = Config::default();
    config.gpu.device = device.into();
    config
}

/// The field, what came and what is allowed.
pub fn refusal(placed: Result<Placement, RequestError>) -> (String, String, String) {
    match placed {
        Err(RequestError::InvalidParams { field, got, allowed }) => (field, got, allowed),
        other => panic!("{other:?}"),
    }
}

#[test]
fn off_leaves_a_gpu_alone() {
    let spec = spec();
    let off = Placement::plan(&spec, &with(vec![gpu(0, FREE)]), &config("off")).unwrap();
    assert_eq!(off.device(), &Device::Cpu);
    assert!(off.notes.is_empty(), "{:?}", off.notes);
    assert_eq!(off.runs_on(), "the CPU: gpu.device is off");
    assert_eq!(off, Placement::plan(&spec, &without(), &config("off")).unwrap());
}

#[test]
fn auto_takes_the_first_gpu_if_the_model_fits() {
    let spec = spec();
    for first in [0, 3] {
        let hardware = with(vec![gpu(first, FREE), gpu(first + 1, 2 * FREE)]);
        let placement = Placement::plan(&spec, &hardware, &config("auto")).unwrap();
        assert_eq!(placement.device(), &Device::Gpu(first));
        assert_eq!(placement.memory_available_bytes, FREE);
        assert_eq!(placement.context_tokens, spec.context_tokens_max);
        assert!(placement.device_bytes() + placement.margin_bytes <= FREE);
        assert!(placement.notes.is_empty(), "{:?}", placement.notes);
    }
}

#[test]
fn a_refusal_names_who_else_holds_the_memory() {
    let holder = |pid, name: &str, bytes| MemoryHolder { pid, name: name.into(), bytes };
    let holders = vec![holder(7, "python3\n", Some(6 << 30)), holder(9, "", None)];
    for (holders, ending) in [
        (holders, "; its memory is also held by python3 (process 7, 6.00 GiB), (process 9)"),
        (Vec::new(), "(gpu.device = \"off\")"),
    ] {
        let hardware = with(vec![Gpu { holders, ..gpu(0, 1 << 20) }]);
        let refused = Placement::plan(&spec(), &hardware, &config("0")).unwrap_err().to_string();
        assert!(refused.contains("lacks memory") && refused.ends_with(ending), "{refused}");
    }
}

#[test]
fn a_gpu_without_kernels_is_not_taken() {
    for (capability, runs) in [("6.1", false), ("7.0", false), ("7.5", true), ("12.0", true)] {
        let old = Gpu { compute_capability: capability.into(), ..gpu(0, FREE) };
        let hardware = with(vec![old]);
        let placement = Placement::plan(&spec(), &hardware, &config("auto")).unwrap();
        assert_eq!(placement.device(), if runs { &Device::Gpu(0) } else { &Device::Cpu });
        if !runs {
            let why =
                format!("GPU 0 (Fake 8) has compute capability {capability}, the kernels need 7.5");
            assert_eq!(placement.notes, [format!("no GPU is used: {why}")]);
            assert!(refusal(Placement::plan(&spec(), &hardware, &config("0"))).2.contains(&why));
        }
    }
}

#[test]
fn an_index_takes_that_gpu() {
    let hardware = with(vec![gpu(0, 1 << 20), gpu(1, FREE)]);
    let placement = Placement::plan(&spec(), &hardware, &config("1")).unwrap();
    assert_eq!(placement.device(), &Device::Gpu(1));
}

#[test]
fn auto_without_a_gpu_takes_the_cpu_and_says_why_aloud_where_there_might_be_one() {
    let mut broken = without();
    broken.gpus.is_broken = true;
    let notes = vec!["no GPU is used: no driver".to_owned()];
    for (hardware, why, notes) in [
        (without(), "no driver", vec![]),
        (with(Vec::new()), "the driver shows none", vec![]),
        (broken, "no driver", notes),
    ] {
        let placement = Placement::plan(&spec(), &hardware, &config("auto")).unwrap();
        assert_eq!((placement.device(), &placement.notes), (&Device::Cpu, &notes));
        assert_eq!(placement.why_cpu.as_deref(), Some(why));
        assert_eq!(placement.runs_on(), format!("the CPU: {why}"));
    }
    let placement = Placement::plan(&spec(), &with(vec![gpu(1, FREE)]), &config("auto")).unwrap();
    assert_eq!((placement.why_cpu.as_deref(), placement.runs_on().as_str()), (None, "GPU 1"));
}

#[test]
fn a_gpu_that_is_not_there_is_refused_by_its_index() {
    for (hardware, why) in [
        (with(vec![gpu(0, FREE), gpu(1, FREE)]), "the driver shows 0, 1"),
        (without(), "no driver"),
    ] {
        let placed = Placement::plan(&spec(), &hardware, &config("7"));
        let (field, got, allowed) = refusal(placed);
        assert_eq!((field.as_str(), got.as_str()), ("gpu.device", "7"));
        assert!(allowed.starts_with("off or auto") && allowed.contains(why), "{allowed}");
    }
}

#[test]
fn a_limit_bounds_what_is_used_of_a_gpu() {
    let (spec, hardware) = (spec(), with(vec![gpu(0, FREE)]));
    let mut config = config("auto");
    config.kv.cache_bytes = ByteSize(FREE);
    for (limit, available) in [(0, FREE), (1 << 30, 1 << 30), (FREE, FREE), (2 * FREE, FREE)] {
        config.gpu.vram_limit = ByteSize(limit);
        let placement = Placement::plan(&spec, &hardware, &config).unwrap();
        assert_eq!(placement.device(), &Device::Gpu(0));
        assert_eq!(
            (placement.memory_available_bytes, placement.memory_free_bytes),
            (available, FREE)
        );
        // Blocks fill it up to the last.
        let taken = placement.device_bytes() + placement.margin_bytes;
        assert!(taken <= available && taken + placement.block_bytes() > available, "{taken}");
        let is_told = placement.notes.iter().any(|note| note.contains("gpu.vram_limit"));
        assert_eq!(is_told, limit > FREE, "{:?}", placement.notes);
    }
}

#[test]
fn what_a_gpu_does_not_hold_is_refused_with_figures() {
    let mut config = config("0");
    for (free, limit) in [(40 << 20, 0), (FREE, 40 << 20)] {
        config.gpu.vram_limit = ByteSize(limit);
        let refused = Placement::plan(&spec(), &with(vec![gpu(0, free)]), &config);
        let Err(RequestError::InsufficientMemory { device, need, free, suggest }) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(device, "GPU 0 (Fake 8)");
        assert!(need > free && free < 40 << 20, "{need} of {free}");
        assert!(suggest.contains("gpu.device = \"off\""), "{suggest}");
        assert_eq!(suggest.contains("gpu.vram_limit"), limit > 0, "{suggest}");
    }
    config.gpu.device = "auto".into();
    let placement = Placement::plan(&spec(), &with(vec![gpu(0, FREE)]), &config).unwrap();
    assert_eq!(placement.device(), &Device::Cpu);
    assert_eq!(placement.notes.len(), 1, "{:?}", placement.notes);
    let note = &placement.notes[0];
    assert!(note.starts_with("no GPU is used: GPU 0 (Fake 8) lacks memory"), "{note}");
}

/// Auto says why in a note and takes the CPU, an index is refused for the same reason.
fn runs_on_the_cpu_only(spec: &ModelSpec, change: impl Fn(&mut Config), why: &str) {
    let hardware = with(vec![gpu(0, FREE)]);
    let plan = |device: &str| {
        let mut config = config(device);
        change(&mut config);
        Placement::plan(spec, &hardware, &config)
    };
    let auto = plan("auto").unwrap();
    assert_eq!((auto.device(), auto.notes.len()), (&Device::Cpu, 1), "{:?}", auto.notes);
    assert!(auto.notes[0].starts_with("no GPU is used: "), "{:?}", auto.notes);
    let (field, got, allowed) = refusal(plan("0"));
    assert_eq!((field.as_str(), got.as_str()), ("gpu.device", "0"));
    for told in [&auto.notes[0], &allowed] {
        assert!(told.contains(why), "{told}");
    }
}

#[test]
fn what_has_no_kernels_on_a_gpu_runs_on_the_cpu() {
    let experts = |change: fn(&mut ExpertsSpec)| {
        let mut spec = spec_of(Family::Qwen3Moe);
        for layer in &mut spec.layers {
            let FfnSpec::Experts(experts) = &mut layer.ffn else { panic!("a dense layer") };
            change(experts);
        }
        spec
    };
    let many = experts(|experts| experts.n_experts = 512);
    runs_on_the_cpu_only(&many, |_| (), "3 of 512 experts");
    let odd = experts(|experts| experts.up.rows = 8 * 40);
    runs_on_the_cpu_only(&odd, |_| (), "with experts of 40 rows");
    for head_dim in [0, 12, 264, 512] {
        let mut spec = spec();
        spec.layers[1].attention.head_dim = head_dim;
        runs_on_the_cpu_only(&spec, |_| (), &format!("heads of {head_dim} elements"));
    }
    let mut wide = spec();
    wide.embedding_dim = (16 << 10) + 8;
    runs_on_the_cpu_only(&wide, |_| (), "embeddings of 16392");
    let mut odd = spec();
    odd.layers[0].attention.output.weight.cols = 100;
    runs_on_the_cpu_only(&odd, |_| (), "rows of 100 elements");
}

#[test]
fn weights_of_every_type_are_placed_on_a_gpu() {
    for dtype in DType::ALL {
        let mut spec = spec();
        spec.layers[0].attention.output.weight.dtype = dtype;
        let placement = Placement::plan(&spec, &with(vec![gpu(0, FREE)]), &config("0")).unwrap();
        assert_eq!(placement.device(), &Device::Gpu(0), "{dtype}");
    }
}

#[test]
fn keys_and_values_are_kept_as_asked_on_a_gpu() {
    let (spec, hardware) = (spec(), with(vec![gpu(0, FREE)]));
    for dtype in KvDType::ALL {
        let mut config = config("auto");
        config.kv.dtype = dtype;
        let placement = Placement::plan(&spec, &hardware, &config).unwrap();
        assert_eq!((placement.device(), placement.kv_dtype), (&Device::Gpu(0), dtype));
        let bytes = spec.kv_bytes_per_token(dtype) * placement.block_tokens as u64;
        assert_eq!(placement.block_bytes(), bytes);
        assert!(placement.notes.is_empty(), "{:?}", placement.notes);
        let rows = placement.explain();
        let row = rows.iter().find(|row| row.what == "KV cache").unwrap();
        assert!(row.why.ends_with(dtype.name()), "{}", row.why);
    }
}

#[test]
fn a_type_that_only_a_gpu_has_becomes_the_nearest_or_is_refused() {
    let spec = spec();
    for (dtype, taken) in [(KvDType::Bf16, KvDType::F16), (KvDType::Fp8E4m3, KvDType::Q8_0)] {
        let plan = |device: &str| {
            let mut config = config(device);
            config.kv.dtype = dtype;
            Placement::plan(&spec, &without(), &config)
        };
        let auto = plan("auto").unwrap();
        assert_eq!((auto.device(), auto.kv_dtype), (&Device::Cpu, taken));
        assert_eq!(auto.block_bytes(), spec.kv_bytes_per_token(taken) * auto.block_tokens as u64);
        let why = format!("kv.dtype is {dtype}, which only a GPU has: the CPU keeps {taken}");
        assert_eq!(auto.notes, [why]);
        let (field, got, allowed) = refusal(plan("off"));
        assert_eq!((field.as_str(), got.as_str()), ("kv.dtype", dtype.name()));
        assert!(allowed.starts_with("f16 or q8_0 on the CPU"), "{allowed}");
    }
}

fn spec_with(output: Output) -> ModelSpec {
    let mut model = TinyModel::new(Family::Llama);
    model.output = output;
    let bytes = model.gguf().bytes();
    ModelSpec::from_checkpoint(&Checkpoint::from_bytes(Path::new("tiny.gguf"), &bytes).unwrap())
        .unwrap()
}

#[test]
fn an_embedding_that_is_not_the_output_stays_with_the_host() {
    for (output, stays) in [(Output::Tied, false), (Output::Own, true)] {
        let spec = spec_with(output);
        let placement = Placement::plan(&spec, &with(vec![gpu(0, FREE)]), &config("auto")).unwrap();
        let left_out = if stays { spec.embedding.bytes() } else { 0 };
        // Vectors become f32, and matrices start at round places.
        let (least, got) = (spec.weight_bytes() - left_out, placement.stages[0].weight_bytes);
        assert!((least..least + least / 4).contains(&got), "{got} bytes for {least}");
    }
}

#[test]
fn an_explanation_adds_up_to_the_total_on_the_gpu() {
    let mut config = config("auto");
    for (limit, why) in [
        (0, "of 8.00 GiB free"),
        (1 << 30, "of 1.00 GiB that gpu.vram_limit allows; 8.00 GiB are free"),
    ] {
        config.gpu.vram_limit = ByteSize(limit);
        let placement = Placement::plan(&spec(), &with(vec![gpu(0, FREE)]), &config).unwrap();
        let rows = placement.explain();
        let (on_gpu, on_host): (Vec<_>, Vec<_>) =
            rows.iter().partition(|row| row.device == "gpu 0");
        let names: Vec<&str> = on_gpu.iter().map(|row| row.what.as_str()).collect();
        assert_eq!(
            names,
            ["weights", "KV cache", "activations", "graphs, kernels", "margin", "total"]
        );
        let (total, parts) = on_gpu.split_last().unwrap();
        assert_eq!(parts.iter().map(|row| row.bytes).sum::<u64>(), total.bytes);
        assert_eq!(total.why, why);
        assert_eq!(on_host.len(), 1);
        assert_eq!((on_host[0].what.as_str(), on_host[0].bytes), ("KV swap", 256 << 20));
    }
}

#[test]
fn words_for_a_gpu_are_read_and_others_refused() {
    for word in ["off", "auto", "all", "0", "15", "0,1", "3, 1,0"] {
        config(word).validate().unwrap();
    }
    let twice = ["0,0", "1,0,1", "0,", ",", "0,auto"];
    let others = ["", "Auto", "-1", "0.5", "cuda:0", "99999999999999999999"];
    for word in others.into_iter().chain(twice) {
        let error = config(word).validate().unwrap_err();
        assert_eq!((error.field.as_str(), error.got.as_str()), ("gpu.device", word));
        let allowed = "off, auto, all, or indices of GPUs, each once, such as 0 or 0,1";
        assert_eq!(error.allowed, allowed);
        let refused = Placement::plan(&spec(), &with(vec![gpu(0, FREE)]), &config(word));
        assert_eq!(refusal(refused), (error.field, error.got, error.allowed));
    }
}

proptest! {
    #[test]
    fn no_gpu_is_overcommitted(
        free in 1u64 << 16..1 << 34,
        limit in 0u64..1 << 34,
        cache in 0u64..1 << 34,
        swap in 0u64..1 << 36,
    ) {
        let mut config = config("0");
        config.gpu.vram_limit = ByteSize(limit);
        config.kv.cache_bytes = ByteSize(cache);
        config.kv.swap_bytes = ByteSize(swap);
        if let Ok(placement) = Placement::plan(&spec(), &with(vec![gpu(0, free)]), &config) {
            let available = if limit > 0 { limit.min(free) } else { free };
            prop_assert!(placement.device_bytes() + placement.margin_bytes <= available);
            // What a stage may take in the end, and what of it is not planned.
            let (stage, plan) = (&placement.stages[0], VramPlan::of(&placement.stages[0]));
            let planned = stage.weight_bytes + plan.beside_weights_bytes;
            prop_assert!(plan.usable_bytes <= available);
            prop_assert!(planned + stage.margin_bytes / 8 <= plan.usable_bytes);
            prop_assert!(placement.host_kv_bytes <= 32 << 30);
            let tokens = placement.device_blocks * placement.block_tokens;
            prop_assert!(tokens >= placement.context_tokens);
        }
    }
}
