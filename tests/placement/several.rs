//! Models whose layers are cut over several GPUs, on machines whose GPUs are made up.

use super::gpu::{config, gpu, with};
use super::spec;
use super::spill::assert_spread;
use proptest::prelude::*;
use tandem::actors::parts_of;
use tandem::config::Config;
use tandem::executor::{Inlet, Outlet};
use tandem::hardware::{Gpu, HardwareProfile};
use tandem::model::{ModelSpec, SyntheticModel};
use tandem::placement::{Device, Placement, Spill};
use tandem::request::RequestError;
use tandem::units::ByteSize;

const GIB: u64 = 1 << 30;
/// Of the machines' host memory.
const HOST: u64 = 64 << 30;

fn shape(name: &str) -> ModelSpec {
    name.parse::<SyntheticModel>().unwrap().spec()
}

fn machine(free_gib: &[u64]) -> HardwareProfile {
    let gpus = free_gib.iter().enumerate().map(|(ordinal, gib)| gpu(ordinal, gib * GIB));
    with(gpus.collect())
}

fn plan(free_gib: &[u64], device: &str) -> Result<Placement, RequestError> {
    Placement::plan(&shape("llama-8b:q4_0"), &machine(free_gib), &config(device))
}

pub fn on(placement: &Placement) -> Vec<usize> {
    let index = |device: &Device| match device {
        Device::Gpu(index) => *index,
        Device::Cpu => panic!("on the CPU: {:?}", placement.notes),
    };
    placement.stages.iter().map(|stage| index(&stage.device)).collect()
}

fn layers(placement: &Placement) -> Vec<usize> {
    placement.stages.iter().map(|stage| stage.layers.len()).collect()
}

/// All layers are somewhere, no GPU has more than it may, and the executor is told the same.
pub fn assert_sound(placement: &Placement, spec: &ModelSpec, available: impl Fn(usize) -> u64) {
    let mut next = 0;
    for (stage, index) in placement.stages.iter().zip(on(placement)) {
        assert_eq!(stage.layers.start, next);
        assert!(!stage.layers.is_empty(), "{:?}", layers(placement));
        next = stage.layers.end;
        let taken = placement.bytes_of(stage) + stage.margin_bytes;
        assert!(taken <= available(index), "{taken} of {} on {index}", available(index));
        assert_eq!(stage.memory_available_bytes, available(index));
    }
    assert_eq!(next, spec.layers.len());
    assert!(placement.device_blocks * placement.block_tokens >= placement.context_tokens);
    let of_block = spec.kv_bytes_per_token(placement.kv_dtype) * placement.block_tokens as u64;
    assert_eq!(placement.block_bytes(), of_block);
    let parts = parts_of(spec, placement);
    for (at, ((device, part), stage)) in parts.iter().zip(&placement.stages).enumerate() {
        assert_eq!((device, &part.layers), (&stage.device, &stage.layers));
        assert_eq!(part.inlet == Inlet::Embedding, at == 0);
        assert_eq!(part.outlet == Outlet::Logits, at + 1 == parts.len());
        assert_eq!(part.spilled().is_some(), stage.spill.is_some());
    }
    assert_eq!(parts.len(), placement.stages.len());
    assert_spills_are_sound(placement);
}

/// What the stages spill is of their own layers, spread evenly over them, and adds up.
fn assert_spills_are_sound(placement: &Placement) {
    let (mut all, mut attention, mut bytes) = (Vec::new(), Vec::new(), [0; 3]);
    for stage in &placement.stages {
        let Some(Spill {
            layers, attention_layers, weight_bytes, ring_bytes, crossing_bytes, ..
        }) = stage.spill.clone()
        else {
            continue;
        };
        let whose = |layers: &[usize]| {
            let start = stage.layers.start;
            assert!(layers.iter().all(|layer| stage.layers.contains(layer)), "{layers:?}");
            layers.iter().map(|layer| layer - start).collect::<Vec<_>>()
        };
        assert_spread(&whose(&layers), stage.layers.len());
        let of_attention = whose(&attention_layers);
        if !of_attention.is_empty() {
            assert_eq!(layers.len(), stage.layers.len());
            assert_spread(&of_attention, stage.layers.len());
        }
        assert!(weight_bytes > 0 && ring_bytes > 0 && crossing_bytes > 0);
        bytes = [bytes[0] + weight_bytes, bytes[1] + ring_bytes, bytes[2] + crossing_bytes];
        all.extend(layers);
        attention.extend(attention_layers);
    }
    let spill = placement.spill.clone().unwrap_or_default();
    assert_eq!((all, attention), (spill.layers, spill.attention_layers));
    assert_eq!(bytes, [spill.weight_bytes, spill.ring_bytes, spill.crossing_bytes]);
    let on_host = spill.weight_bytes + spill.crossing_bytes + placement.host_kv_bytes;
    assert!(on_host <= HOST - HOST / 16, "{on_host}");
}

#[test]
fn auto_takes_one_gpu_that_holds_the_model_before_it_takes_several() {
    for (free, taken) in [
        (&[20, 20][..], &[0][..]),
        (&[3, 20], &[1]),
        (&[3, 3], &[0, 1]),
        (&[3, 2, 3], &[0, 2]),
        (&[2, 2, 2], &[0, 1, 2]),
    ] {
        let placement = plan(free, "auto").unwrap();
        assert_eq!(on(&placement), taken, "{free:?}");
        assert!(placement.spill.is_none());
        assert_sound(&placement, &shape("llama-8b:q4_0"), |index| free[index] * GIB);
    }
}

#[test]
fn auto_spills_beside_the_gpus_with_which_the_fewest_bytes_are() {
    let spec = shape("llama-8b:q4_0");
    let spilled = |placement: &Placement| {
        placement.spill.as_ref().unwrap_or_else(|| panic!("{:?}", placement.notes)).weight_bytes
    };
    for (free, taken) in [(&[2, 2][..], &[0, 1][..]), (&[1, 3], &[0, 1]), (&[1, 1, 1], &[0, 1, 2])]
    {
        let placement = plan(free, "auto").unwrap();
        assert_eq!(on(&placement), taken, "{free:?}");
        assert_sound(&placement, &spec, |index| free[index] * GIB);
        let largest = free.iter().max().unwrap();
        assert!(spilled(&placement) < spilled(&plan(&[*largest], "auto").unwrap()), "{free:?}");
    }
    // 512 MiB hold little more than activations and a ring.
    let hardware = with(vec![gpu(0, GIB / 2), gpu(1, 3 * GIB)]);
    let placement = Placement::plan(&spec, &hardware, &config("auto")).unwrap();
    assert_eq!(on(&placement), [1]);
    let note = "GPUs other than 1 are not used: with them no less would be spilled";
    assert!(placement.notes.iter().any(|told| told == note), "{:?}", placement.notes);
}

#[test]
fn small_gpus_are_both_filled_and_the_rest_is_spilled() {
    let spec = shape("llama-70b:q4_0");
    for (free, device) in [(&[12, 12][..], "0,1"), (&[8, 16], "auto"), (&[8, 8, 8], "all")] {
        let placement = Placement::plan(&spec, &machine(free), &config(device)).unwrap();
        assert_sound(&placement, &spec, |index| free[index] * GIB);
        assert_eq!(placement.stages.len(), free.len());
        assert_eq!(placement.context_tokens, 8192);
        let spill = placement.spill.as_ref().unwrap();
        let network = spill.weight_bytes / spill.layers.len() as u64;
        for stage in &placement.stages {
            // Not even a network more has room, or a layer and the ring that it would take.
            let left =
                stage.memory_available_bytes - placement.bytes_of(stage) - stage.margin_bytes;
            assert!(left < 2 * network, "{left} of {stage:?}");
        }
        // Each GPU more takes room for its activations, and its ring where it has one.
        let one = Placement::plan(&spec, &machine(&[24]), &config("0")).unwrap();
        let of_one = one.spill.unwrap().layers.len();
        assert!((of_one..of_one + 4 * free.len()).contains(&spill.layers.len()), "{spill:?}");
    }
}

#[test]
fn each_gpu_tells_what_it_spills() {
    let spec = shape("llama-8b:q4_0");
    // So little that none can spill for both.
    let placement = plan(&[1, 1], "0,1").unwrap();
    let spills: Vec<_> = placement.stages.iter().filter_map(|stage| stage.spill.clone()).collect();
    assert_eq!(spills.len(), 2);
    let rows = placement.explain();
    let rows_of = |what: &str| rows.iter().filter(|row| row.what == what).collect::<Vec<_>>();
    for (index, spill) in spills.iter().enumerate() {
        let ring = rows_of("ring")[index];
        assert_eq!(
            (ring.device.as_str(), ring.bytes),
            (&*format!("gpu {index}"), spill.ring_bytes)
        );
        let row = rows_of("spilled weights")[index];
        assert_eq!((row.device.as_str(), row.bytes), ("host", spill.weight_bytes));
        let (count, layers) = (spill.layers.len(), placement.stages[index].layers.len());
        let why = format!("FFN of {count} of {layers} layers of gpu {index}: ");
        assert_eq!(count, layers);
        assert!(row.why.starts_with(&why), "{}", row.why);
        assert_eq!(rows_of("crossing")[index].bytes, spill.crossing_bytes);
    }
    // What the CPU makes of their rows is there once.
    assert!(spills[0].crossing_bytes > 2 * spills[1].crossing_bytes, "{spills:?}");
    let all = placement.spill.as_ref().unwrap().layers.len();
    let note = format!("of {all} of {} layers", spec.layers.len());
    let told = placement.notes.iter().find(|told| told.contains(&note)).unwrap();
    assert!(told.contains("more of the GPUs' memory would hold them all"), "{told}");
    let json = serde_json::to_value(&placement).unwrap();
    for (stage, spill) in spills.iter().enumerate() {
        let of_stage = &json["stages"][stage]["spill"];
        assert_eq!(of_stage["weight_bytes"], spill.weight_bytes);
        assert_eq!(of_stage["layers"].as_array().unwrap().len(), spill.layers.len());
    }
}

#[test]
fn gpus_that_are_asked_for_share_the_layers_by_their_room() {
    let spec = shape("llama-8b:q4_0");
    for (free, device, on_each) in [
        (&[20, 20][..], "0,1", &[0, 1][..]),
        (&[20, 20], "all", &[0, 1]),
        (&[20, 20, 20], "2, 0", &[2, 0]),
        (&[20, 20, 20, 20], "all", &[0, 1, 2, 3]),
    ] {
        let placement = plan(free, device).unwrap();
        assert_eq!(on(&placement), on_each);
        let layers = layers(&placement);
        let equal = 32 / layers.len();
        // The output takes as much as two layers.
        assert!(layers.iter().all(|count| count.abs_diff(equal) <= 2), "{layers:?}");
        assert_sound(&placement, &spec, |_| 20 * GIB);
    }
    let placement = plan(&[4, 12], "0,1").unwrap();
    let [small, large] = layers(&placement)[..] else { panic!("{:?}", placement.stages) };
    assert!(2 * small < large && small > 4, "{small} and {large}");
    let one = plan(&[20, 20], "1").unwrap();
    assert_eq!((on(&one), layers(&one)), (vec![1], vec![32]));
}

#[test]
fn several_gpus_hold_more_context_than_one() {
    let tokens = |device: &str| {
        let mut config = config(device);
        config.kv.cache_bytes = ByteSize(1 << 40);
        let spec = shape("llama-8b:q4_0");
        let placement = Placement::plan(&spec, &machine(&[8, 8]), &config).unwrap();
        placement.device_blocks * placement.block_tokens
    };
    let (one, two) = (tokens("0"), tokens("0,1"));
    // 8 GiB hold 4.6 of weights, so two have more than three times the rest.
    assert!(two > 3 * one, "{one} and {two}");
}

#[test]
fn a_limit_is_each_gpus() {
    let spec = shape("llama-8b:q4_0");
    let hardware = machine(&[140, 140]);
    for device in ["auto", "0,1", "all"] {
        let mut config = config(device);
        config.gpu.vram_limit = ByteSize(3500 << 20);
        let placement = Placement::plan(&spec, &hardware, &config).unwrap();
        assert_eq!(on(&placement), [0, 1]);
        assert_sound(&placement, &spec, |_| 3500 << 20);
        let rows = placement.explain();
        for index in 0..2 {
            let device = format!("gpu {index}");
            let rows: Vec<_> = rows.iter().filter(|row| row.device == device).collect();
            let names: Vec<&str> = rows.iter().map(|row| row.what.as_str()).collect();
            let planned =
                ["weights", "KV cache", "activations", "graphs, kernels", "margin", "total"];
            assert_eq!(names, planned);
            let (total, parts) = rows.split_last().unwrap();
            assert_eq!(parts.iter().map(|row| row.bytes).sum::<u64>(), total.bytes);
            assert!(total.why.contains("3.42 GiB that gpu.vram_limit allows"), "{}", total.why);
        }
    }
}

#[test]
fn gpus_that_do_not_hold_it_are_refused_with_the_figures_of_one() {
    let spec = shape("llama-8b:q4_0");
    for mib in [[3072, 1024], [1024, 3072], [512, 512], [3072, 256]] {
        let free = mib.map(|mib| mib << 20);
        let hardware = with(vec![gpu(0, free[0]), gpu(1, free[1])]);
        let mut config = config("all");
        // What can't be spilled is too much for two of them.
        config.gpu.spill = mib[0] < 1024 || mib[1] < 1024;
        let refused = Placement::plan(&spec, &hardware, &config);
        let Err(RequestError::InsufficientMemory { device, need, free: got, suggest }) = refused
        else {
            panic!("{refused:?}")
        };
        let of = |index: usize| (format!("GPU {index} (Fake 8)"), free[index] / 16 * 15);
        assert!([of(0), of(1)].contains(&(device, got)), "{got}");
        assert!(need > got && suggest.contains("the CPU"), "{need} of {got}: {suggest}");
    }
}

#[test]
fn gpus_that_are_not_there_or_can_not_run_the_model_are_refused_by_name() {
    let refusal = |hardware: &HardwareProfile, device: &str| match Placement::plan(
        &spec(),
        hardware,
        &config(device),
    ) {
        Err(RequestError::InvalidParams { field, got, allowed }) => {
            assert_eq!((field.as_str(), got.as_str()), ("gpu.device", device));
            allowed
        }
        other => panic!("{other:?}"),
    };
    let hardware = machine(&[8, 8, 8]);
    assert!(refusal(&hardware, "0,3").contains("the driver shows 0, 1, 2"));
    assert!(refusal(&machine(&[]), "all").contains("the driver shows none"));
    // Two layers are not enough for three.
    assert!(refusal(&hardware, "all").contains("each of 3 GPUs needs a layer, and there are 2"));
    assert_eq!(on(&Placement::plan(&spec(), &hardware, &config("1,2")).unwrap()), [1, 2]);
    let old = Gpu { compute_capability: "6.1".into(), ..gpu(1, 8 * GIB) };
    let hardware = with(vec![gpu(0, 8 * GIB), old]);
    assert!(refusal(&hardware, "0,1").contains("GPU 1 (Fake 8) has compute capability 6.1"));
    assert_eq!(on(&Placement::plan(&spec(), &hardware, &config("auto")).unwrap()), [0]);
}

proptest! {
    #[test]
    fn none_of_several_gpus_is_overcommitted(
        free in prop::collection::vec(1u64 << 28..1 << 34, 1..6),
        limit in prop_oneof![Just(0u64), 1u64 << 28..1 << 34],
        cache in 0u64..1 << 36,
        context in 0usize..20_000,
        is_auto: bool,
    ) {
        let devices = free.iter().enumerate().map(|(ordinal, free)| gpu(ordinal, *free));
        let hardware = with(devices.collect());
        let mut config: Config = config(if is_auto { "auto" } else { "all" });
        config.gpu.vram_limit = ByteSize(limit);
        config.kv.cache_bytes = ByteSize(cache);
        config.model.context_tokens = context;
        let spec = shape("llama-8b:q4_k_m");
        let available =
            |index: usize| if limit > 0 { limit.min(free[index]) } else { free[index] };
        match Placement::plan(&spec, &hardware, &config) {
            Ok(placement) if *placement.device() != Device::Cpu => {
                assert_sound(&placement, &spec, available);
                prop_assert!(is_auto || placement.stages.len() == free.len());
            }
            Ok(_) => prop_assert!(is_auto),
            Err(RequestError::InsufficientMemory { need, free, .. }) => prop_assert!(need > free),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}

proptest! {
    #[test]
    fn more_memory_of_any_gpu_never_spills_more(
        free in prop::collection::vec(GIB / 2..4 * GIB, 2..4),
        more in 0..2 * GIB,
        which in 0usize..4,
        cache in prop_oneof![Just(0u64), 0u64..4 * GIB],
        context in prop_oneof![Just(0usize), 0usize..10_000],
    ) {
        let spec = shape("llama-8b:q4_k_m");
        let of = |free: &[u64]| {
            let devices = free.iter().enumerate().map(|(ordinal, free)| gpu(ordinal, *free));
            let mut config: Config = config("all");
            config.kv.cache_bytes = ByteSize(cache);
            config.model.context_tokens = context;
            Placement::plan(&spec, &with(devices.collect()), &config).ok()
        };
        let Some(less) = of(&free) else { return Ok(()) };
        assert_sound(&less, &spec, |index| free[index]);
        let mut larger = free.clone();
        larger[which % free.len()] += more;
        let more = of(&larger).unwrap();
        assert_sound(&more, &spec, |index| larger[index]);
        let bytes = |placement: &Placement| {
            placement.spill.as_ref().map_or(0, |spill| spill.weight_bytes)
        };
        // Where it allows wider steps it may go to their activations instead.
        let is_wider = more.step_tokens_max > less.step_tokens_max;
        let is_no_more = bytes(&more) <= bytes(&less);
        prop_assert!(is_wider || is_no_more, "{:?} after {:?}", more.spill, less.spill);
    }
}
