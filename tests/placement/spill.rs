//! Which weights are spilled, on machines whose GPUs are made up, for well-known shapes.

use super::gpu::{config, gpu, with};
use super::spec;
use proptest::prelude::*;
use tandem::config::Config;
use tandem::hardware::HardwareProfile;
use tandem::model::{ModelSpec, SyntheticModel};
use tandem::placement::{Device, ExplainRow, Placement, Spill};
use tandem::request::RequestError;
use tandem::units::ByteSize;

const GIB: u64 = 1 << 30;
/// Larger than any model here, so that limits bind.
const FREE: u64 = 140 * GIB;

fn shape(name: &str) -> ModelSpec {
    name.parse::<SyntheticModel>().unwrap().spec()
}

fn machine(host_bytes: u64) -> HardwareProfile {
    HardwareProfile { memory_available_bytes: host_bytes, ..with(vec![gpu(0, FREE)]) }
}

fn limited(limit: u64) -> Config {
    let mut config = config("0");
    config.gpu.vram_limit = ByteSize(limit);
    config
}

fn plan(spec: &ModelSpec, limit: u64) -> Result<Placement, RequestError> {
    Placement::plan(spec, &machine(64 * GIB), &limited(limit))
}

fn spilled(placement: &Placement) -> usize {
    placement.spill.as_ref().map_or(0, |spill| spill.layers.len())
}

/// Layers whose networks, and whose attention's weights, are spilled.
fn counts(placement: &Placement) -> [usize; 2] {
    let attention = placement.spill.as_ref().map_or(0, |spill| spill.attention_layers.len());
    [spilled(placement), attention]
}

/// The parts, each by itself, add up to at most what is available of both memories.
fn assert_not_overcommitted(placement: &Placement, available: u64, host_bytes: u64) {
    let stage = &placement.stages[0];
    let spill = placement.spill.clone().unwrap_or_default();
    let Spill { weight_bytes, ring_bytes, crossing_bytes, .. } = spill;
    let on_gpu = stage.weight_bytes + stage.kv_bytes + stage.activation_bytes + ring_bytes;
    let on_gpu = on_gpu + stage.graph_bytes;
    assert_eq!(on_gpu, placement.device_bytes());
    assert!(on_gpu + placement.margin_bytes <= available, "{on_gpu} of {available}");
    let on_host = weight_bytes + crossing_bytes + placement.host_kv_bytes;
    assert!(on_host <= host_bytes - host_bytes / 16, "{on_host} of {host_bytes}");
    assert!(placement.device_blocks * placement.block_tokens >= placement.context_tokens);
}

/// Gaps between neighbours, and before the first and after the last as half ones, differ by little.
pub fn assert_spread(layers: &[usize], of: usize) {
    let share = of as f64 / layers.len() as f64;
    for (index, layer) in layers.iter().enumerate() {
        let middle = (index as f64 + 0.5) * share;
        assert!((*layer as f64 + 0.5 - middle).abs() <= 1.5, "{layer} of {layers:?}");
    }
    assert!(layers.windows(2).all(|pair| pair[0] < pair[1]), "{layers:?}");
}

#[test]
fn a_model_that_fits_is_not_spilled() {
    for name in ["llama-8b:q4_0", "mixtral-8x7b:q4_0", "llama-70b:q4_k_m"] {
        let placement = plan(&shape(name), 0).unwrap();
        assert_eq!((placement.device(), &placement.spill), (&Device::Gpu(0), &None), "{name}");
    }
}

/// Networks first, attention once none is left, each spread evenly.
fn assert_in_order(placement: &Placement, layers: usize) {
    let Some(spill) = &placement.spill else { return };
    assert_spread(&spill.layers, layers);
    if !spill.attention_layers.is_empty() {
        assert_eq!(spill.layers.len(), layers);
        assert_spread(&spill.attention_layers, layers);
    }
    let note = format!("of {} of {layers} layers", spill.layers.len());
    assert!(placement.notes.iter().any(|told| told.contains(&note)), "{:?}", placement.notes);
}

#[test]
fn the_smaller_the_limit_the_more_is_spilled_evenly_until_it_is_refused() {
    for (name, least) in [
        ("llama-8b:q4_0", 1 << 30),
        ("llama-8b:q4_k_m", 9 << 27),
        ("llama-8b:bf16", 2 << 30),
        ("llama-8b:pure-e4m3_128", 2 << 30),
        ("qwen3-30b-a3b:q4_0", 5 << 28),
        ("llama-70b:q4_0", 2 << 30),
    ] {
        let spec = shape(name);
        let layers = spec.layers.len();
        let (mut last, mut seen, mut limit) = ([0; 2], [0; 2], 48 * GIB);
        let refused = loop {
            match plan(&spec, limit) {
                Ok(placement) => {
                    assert_not_overcommitted(&placement, limit, 64 * GIB);
                    assert_in_order(&placement, layers);
                    let counts = counts(&placement);
                    for part in 0..2 {
                        assert!(counts[part] >= last[part], "{counts:?} {last:?} {name} {limit}");
                        seen[part] += usize::from(counts[part] > last[part]);
                    }
                    last = counts;
                }
                Err(error) => break error,
            }
            limit -= GIB / 16;
        };
        assert!(limit < least, "{name} is refused {limit} bytes");
        assert!(seen[0] > 10 && seen[1] > 1 && last == [layers; 2], "{seen:?} {last:?} of {name}");
        let RequestError::InsufficientMemory { device, need, free, suggest } = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(device, "GPU 0 (Fake 8)");
        assert!(need > free && suggest.contains("gpu.vram_limit"), "{need} of {free}: {suggest}");
        // Nothing else is as good any more.
        let mut config = limited(limit);
        config.gpu.device = "auto".into();
        let placement = Placement::plan(&spec, &machine(64 * GIB), &config).unwrap();
        assert_eq!((placement.device(), &placement.spill), (&Device::Cpu, &None));
        assert!(placement.notes[0].starts_with("no GPU is used: GPU 0"), "{:?}", placement.notes);
    }
}

#[test]
fn attention_is_spilled_for_a_short_context_or_for_one_that_was_asked_for() {
    let spec = shape("llama-8b:q4_0");
    // Down to the last limit at which all networks make room for 2048 tokens of context.
    let mut limit = 4 * GIB;
    let mut shortest = usize::MAX;
    loop {
        let placement = plan(&spec, limit).unwrap();
        if counts(&placement)[1] > 0 {
            // The ring holds attention's weights as well then.
            assert!(counts(&placement)[1] <= 4, "{:?} at {limit}", counts(&placement));
            assert!((2048..2250).contains(&placement.context_tokens), "{placement:?}");
            break;
        }
        assert!(placement.context_tokens <= shortest, "at {limit}");
        shortest = placement.context_tokens;
        limit -= GIB / 64;
    }
    assert!((2048..2400).contains(&shortest), "{shortest}");
    let mut config = limited(limit);
    for (asked, attention) in [(512, 0..1), (2048, 1..5), (4096, 11..17)] {
        config.model.context_tokens = asked;
        let placement = Placement::plan(&spec, &machine(64 * GIB), &config).unwrap();
        assert_eq!(placement.context_tokens, asked);
        assert!(attention.contains(&counts(&placement)[1]), "{:?}", counts(&placement));
    }
    // The last that is left gets what context it can have, with the smallest ring.
    let smallest = plan(&spec, GIB).unwrap();
    let spill = smallest.spill.as_ref().unwrap();
    assert_eq!((counts(&smallest), spill.ring_slots), ([32, 32], 4));
    assert!((256..2048).contains(&smallest.context_tokens), "{}", smallest.context_tokens);
}

#[test]
fn an_explanation_tells_attention_from_networks() {
    let placement = plan(&shape("llama-8b:q4_0"), 5 << 28).unwrap();
    let row = placement.explain().into_iter().find(|row| row.what == "spilled weights").unwrap();
    let [_, attention] = counts(&placement);
    let why = format!("FFN of 32 of 32 layers: 0–31; attention of {attention}: ");
    assert!(row.why.starts_with(&why), "{}", row.why);
    let note = format!("of 32 of 32 layers, and attention's weights of {attention}, are spilled");
    assert!(placement.notes.iter().any(|told| told.contains(&note)), "{:?}", placement.notes);
}

#[test]
fn no_more_is_spilled_than_must_be() {
    let spec = shape("llama-8b:q4_0");
    let placement = plan(&spec, 4 * GIB).unwrap();
    let spill = placement.spill.as_ref().unwrap();
    // One network more on the GPU would not fit.
    let network = spill.weight_bytes / spill.layers.len() as u64;
    let taken = placement.device_bytes() + placement.margin_bytes;
    assert!(taken + network > 4 * GIB, "{taken} and {network}");
    // 4.5 bits a weight of three matrices of 14336 x 4096.
    assert_eq!(network, 3 * 14336 * 4096 * 18 / 32);
    let slot = 14336 * 4096 * 18 / 32;
    assert!((7 * slot..8 * slot).contains(&spill.ring_bytes), "{} {slot}", spill.ring_bytes);
    // Rows there and back alone.
    assert!(spill.crossing_bytes > 2 * 256 * 4096 * 4);
}

/// They lie row by row in host memory, as on the GPU, and stream as quantised weights do.
#[test]
fn floats_have_a_ring_of_the_same_number_of_layers() {
    for (name, bytes) in [("bf16", 2.0), ("f32", 4.0), ("pure-e4m3_32", 36.0 / 32.0)] {
        let spec = shape(&format!("llama-8b:{name}"));
        let matrix = (14336.0 * 4096.0 * bytes) as u64;
        let whole = plan(&spec, 0).unwrap().stages[0].weight_bytes;
        let placement = plan(&spec, whole / 2).unwrap();
        let spill = placement.spill.as_ref().unwrap();
        assert_eq!(spill.weight_bytes, spill.layers.len() as u64 * 3 * matrix, "{name}");
        // Slots for four thirds of a network, and what pieces are taken apart into.
        assert!((7 * matrix..8 * matrix).contains(&spill.ring_bytes), "{name}: {spill:?}");
        assert!(spill.crossing_bytes < 256 * 4096 * 4 * 20, "{name}: {spill:?}");
        assert_not_overcommitted(&placement, whole / 2, 64 * GIB);
    }
}

#[test]
fn experts_are_spilled_and_attention_stays() {
    let spec = shape("mixtral-8x7b:q4_0");
    let whole = plan(&spec, 0).unwrap();
    let placement = plan(&spec, 12 * GIB).unwrap();
    let spill = placement.spill.as_ref().unwrap();
    let (stage, all) = (&placement.stages[0], &whole.stages[0]);
    let share = spill.layers.len() as u64;
    let layers = spec.layers.len() as u64;
    assert_eq!(stage.expert_bytes, all.expert_bytes / layers * (layers - share));
    assert_eq!(stage.active_expert_bytes * 4, stage.expert_bytes);
    // Routers lie on both sides.
    let router = spec.layers[0].ffn.experts().unwrap().router.bytes();
    assert_eq!(spill.weight_bytes, share * (all.expert_bytes / layers + router));
    // What the GPU keeps of a spilled layer.
    let smallest = plan(&spec, 4 * GIB).unwrap();
    assert_eq!((spilled(&smallest), smallest.stages[0].expert_bytes), (32, 0));
    assert!(smallest.stages[0].weight_bytes > 32 * 4096 * 4096);
    assert!(smallest.explain().iter().all(|row| row.what != "experts"));
}

#[test]
fn host_memory_that_is_too_small_is_refused_by_name() {
    let spec = shape("llama-70b:q4_0");
    let refused = Placement::plan(&spec, &machine(8 * GIB), &limited(16 * GIB));
    let Err(RequestError::InsufficientMemory { device, need, free, suggest }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((device.as_str(), free), ("host memory", 8 * GIB - GIB / 2));
    assert!(need > 16 * GIB && suggest.contains("GPU's memory"), "{need}: {suggest}");
    // Preempted sequences get what is left.
    let placement = plan(&spec, 16 * GIB).unwrap();
    let spill = placement.spill.unwrap();
    let host = (spill.weight_bytes + spill.crossing_bytes + (64 << 20)) * 16 / 15;
    let placement = Placement::plan(&spec, &machine(host), &limited(16 * GIB)).unwrap();
    assert_not_overcommitted(&placement, 16 * GIB, host);
    assert!(placement.host_kv_bytes < 256 << 20, "{}", placement.host_kv_bytes);
}

#[test]
fn the_context_is_8192_tokens_unless_more_are_asked_for() {
    let mut spec = shape("llama-8b:q4_0");
    spec.context_tokens_max = 131_072;
    let placement = plan(&spec, 5 * GIB).unwrap();
    assert_eq!((placement.context_tokens, placement.device_blocks * 32), (8192, 8192));
    let told = "context of 8192 of the 131072 tokens trained, since weights are spilled; \
                model.context_tokens asks for more";
    assert!(placement.notes.iter().any(|note| note == told), "{:?}", placement.notes);
    let mut config = limited(5 * GIB);
    config.model.context_tokens = 16_384;
    let longer = Placement::plan(&spec, &machine(64 * GIB), &config).unwrap();
    assert_eq!((longer.context_tokens, longer.device_blocks * 32), (16_384, 16_384));
    assert!(spilled(&longer) > spilled(&placement));
    assert!(longer.notes.iter().all(|note| !note.starts_with("context of")), "{:?}", longer.notes);
    // A context that fits beside all weights is no reason to spill, whatever was trained for.
    let placement = plan(&spec, 7 * GIB).unwrap();
    assert_eq!(spilled(&placement), 0);
    assert!((8192..131_072).contains(&placement.context_tokens), "{}", placement.context_tokens);
    config.model.context_tokens = 131_072;
    let refused = Placement::plan(&spec, &machine(64 * GIB), &config);
    assert!(matches!(refused, Err(RequestError::InsufficientMemory { .. })), "{refused:?}");
}

#[test]
fn a_store_that_was_asked_for_is_paid_with_layers() {
    let spec = shape("llama-8b:q4_0");
    let with_store = |bytes| {
        let mut config = limited(5 * GIB);
        config.kv.cache_bytes = ByteSize(bytes);
        Placement::plan(&spec, &machine(64 * GIB), &config).unwrap()
    };
    let (one, two) = (with_store(0), with_store(2 * GIB));
    assert_eq!(two.stages[0].kv_bytes, 2 * GIB);
    assert!(spilled(&two) > spilled(&one));
    // More than all layers can pay for.
    let most = with_store(64 * GIB);
    assert_not_overcommitted(&most, 5 * GIB, 64 * GIB);
    assert_eq!(spilled(&most), spec.layers.len());
    assert!(most.notes.iter().any(|note| note.starts_with("kv.cache_bytes is 64.00 GiB")));
}

#[test]
fn without_spilling_a_model_fits_or_does_not() {
    let spec = shape("llama-8b:q4_0");
    let mut config = limited(4 * GIB);
    config.gpu.spill = false;
    let refused = Placement::plan(&spec, &machine(64 * GIB), &config);
    assert!(matches!(refused, Err(RequestError::InsufficientMemory { .. })), "{refused:?}");
    config.gpu.device = "auto".into();
    let placement = Placement::plan(&spec, &machine(64 * GIB), &config).unwrap();
    assert_eq!((placement.device(), &placement.spill), (&Device::Cpu, &None));
}

#[test]
fn an_explanation_keeps_the_two_memories_apart() {
    let placement = plan(&shape("llama-8b:q4_0"), 4 * GIB).unwrap();
    let spill = placement.spill.clone().unwrap();
    let rows = placement.explain();
    let at = rows.iter().position(|row| row.what == "total").unwrap();
    let (above, below) = (&rows[..at], &rows[at + 1..]);
    let names =
        |rows: &[ExplainRow]| -> Vec<String> { rows.iter().map(|row| row.what.clone()).collect() };
    let planned = ["weights", "KV cache", "activations", "graphs, kernels", "ring", "margin"];
    assert_eq!(names(above), planned);
    assert_eq!(above.iter().map(|row| row.bytes).sum::<u64>(), rows[at].bytes);
    assert!(rows[at].bytes <= 4 * GIB && above.iter().all(|row| row.device == "gpu 0"));
    assert_eq!(names(below), ["spilled weights", "crossing", "KV swap"]);
    assert!(below.iter().all(|row| row.device == "host"));
    assert_eq!((below[0].bytes, below[1].bytes), (spill.weight_bytes, spill.crossing_bytes));
    let first = format!("FFN of {} of 32 layers: {}", spill.layers.len(), spill.layers[0]);
    assert!(below[0].why.starts_with(&first), "{}", below[0].why);
    let all = plan(&shape("llama-8b:q4_0"), 3 * GIB).unwrap();
    let row = all.explain().into_iter().find(|row| row.what == "spilled weights").unwrap();
    assert_eq!(row.why, "FFN of 31 of 32 layers: 0–14, 16–31");
}

#[test]
fn a_network_smaller_than_the_ring_is_not_spilled() {
    // Two layers save less than the ring takes.
    let spec = spec();
    let whole = plan(&spec, 0).unwrap();
    let limit = whole.stages[0].weight_bytes + whole.stages[0].activation_bytes;
    assert!(matches!(plan(&spec, limit), Err(RequestError::InsufficientMemory { .. })));
}

proptest! {
    #[test]
    fn neither_memory_is_overcommitted_and_more_of_it_never_spills_more(
        limit in GIB / 2..8 * GIB,
        more in 0..2 * GIB,
        host in 1u64 << 24..8 * GIB,
        cache in 0u64..4 * GIB,
        context in 0usize..10_000,
    ) {
        let spec = shape("llama-8b:q4_k_m");
        let of = |limit| {
            let mut config = limited(limit);
            config.kv.cache_bytes = ByteSize(cache);
            config.model.context_tokens = context;
            Placement::plan(&spec, &machine(host), &config).ok()
        };
        let Some(less) = of(limit) else { return Ok(()) };
        assert_not_overcommitted(&less, limit, host);
        assert_in_order(&less, spec.layers.len());
        let more = of(limit + more).unwrap();
        // Where it allows wider steps it may go to their activations instead.
        let is_wider = more.step_tokens_max > less.step_tokens_max;
        let (less, more) = (counts(&less), counts(&more));
        let is_no_more = more[0] <= less[0] && more[1] <= less[1];
        prop_assert!(is_wider || is_no_more, "{:?} after {:?}", more, less);
    }
}

#[test]
fn workers_leave_processors_to_the_threads_that_serve_the_gpu() {
    let llama = shape("llama-8b:q4_0");
    let workers = |limit, threads| {
        let mut config = limited(limit);
        config.cpu.threads = threads;
        Placement::plan(&llama, &machine(64 * GIB), &config).unwrap().workers
    };
    let (whole, spilled) = (workers(20 * GIB, 0), workers(3 * GIB, 0));
    assert_eq!(spilled.threads, whole.threads - whole.threads / 8);
    assert!(spilled.cpus.len() <= spilled.threads);
    assert_eq!(workers(3 * GIB, 1).threads, 1);
}
