//! Predicted speeds against those that were measured on the same machine (`docs/performance.md`).

use super::gpu::{config, gpu, with};
use super::{machine, spec_of};
use crate::tiny_model::Family;
use proptest::prelude::*;
use tandem::config::Config;
use tandem::hardware::{
    BesideReads, CopyRates, GpuProductRates, GpuRates, HardwareProfile, MacRate, Measured, ReadRate,
};
use tandem::model::{ModelSpec, SyntheticModel};
use tandem::placement::{Device, Job, Placement, Prediction};
use tandem::units::ByteSize;

const GIB: u64 = 1 << 30;
pub const MIB: u64 = 1 << 20;

/// One H200 with 16 processors.
pub fn measured(numbers: &str, macs_per_second: f64) -> Measured {
    let read = |threads, rate: f64| ReadRate { threads, bytes_per_second: rate * 1e9 };
    let both = |rate: f64| CopyRates { to_gpu: rate * 1e9, from_gpu: rate * 1e9 };
    Measured {
        reads: vec![read(1, 13.5), read(8, 87.0), read(16, 102.0)],
        cpu: MacRate { numbers: numbers.into(), per_second: macs_per_second },
        gpus: vec![GpuRates {
            ordinal: 0,
            read_bytes_per_second: 4668e9,
            macs: MacRate { numbers: "f16".into(), per_second: 451e12 },
            products: Vec::new(),
            pinned: both(55.4),
            both_ways: both(50.0),
            pageable: both(18.6),
            beside_reads: BesideReads { to_gpu: 46e9, reads: 92.7e9 },
            crossing_us: 7.0,
        }],
        ..Measured::default()
    }
}

pub fn h200() -> HardwareProfile {
    let measured = Some(measured("int8", 8.27e12 / 2.0));
    HardwareProfile { measured, ..with(vec![gpu(0, 140 * GIB)]) }
}

pub fn shape(name: &str) -> ModelSpec {
    name.parse::<SyntheticModel>().unwrap().spec()
}

/// With as many workers, and a context that is as long as those of `tandem bench` are in the mean.
pub fn predicted(
    name: &str,
    (hardware, config): (&HardwareProfile, &Config),
    threads: usize,
    context: usize,
) -> (Placement, Prediction) {
    let spec = shape(name);
    let mut placement = Placement::plan(&spec, hardware, config).unwrap();
    placement.workers.threads = threads;
    let prompts = Prediction::of(&spec, &placement, hardware, config).unwrap();
    let kv_tokens = placement.device_blocks * placement.block_tokens;
    let short = Placement { context_tokens: context, ..placement.clone() };
    assert!(kv_tokens >= 32 * context, "{kv_tokens}");
    let decode = Prediction::of(&spec, &short, hardware, config).unwrap();
    (placement, Prediction { decode: decode.decode, ..prompts })
}

pub fn limited(limit: u64, step_tokens_max: usize) -> Config {
    let mut config = config("0");
    config.gpu.vram_limit = ByteSize(limit);
    config.scheduler.step_tokens_max = step_tokens_max;
    config
}

/// Each within so many percent of what was measured.
pub fn assert_near(predicted: &[f64], measured: &[f64], percent: &[f64]) {
    assert_eq!(predicted.len(), measured.len());
    for (index, (predicted, measured)) in predicted.iter().zip(measured).enumerate() {
        let off = (predicted / measured - 1.0) * 100.0;
        assert!(off.abs() <= percent[index], "{predicted} for {measured}: {off:.1} %");
    }
}

fn decode(prediction: &Prediction) -> Vec<f64> {
    prediction.decode.iter().map(|decode| decode.tokens_per_second).collect()
}

fn prompts(prediction: &Prediction) -> Vec<f64> {
    prediction.prompt.iter().map(|prompt| prompt.tokens_per_second).collect()
}

#[test]
fn a_model_on_the_gpu_is_as_fast_as_predicted() {
    for (name, one_8_32, per_cent) in [
        ("llama-8b:q4_0", [584.0, 3529.0, 7535.0], [5.0, 10.0, 10.0]),
        ("qwen3-30b-a3b:q4_0", [511.0, 1525.0, 3510.0], [15.0, 15.0, 15.0]),
    ] {
        let (hardware, config) = (h200(), limited(0, 2048));
        let (_, prediction) = predicted(name, (&hardware, &config), 16, 32);
        assert_near(&decode(&prediction), &one_8_32, &per_cent);
        assert_eq!(prediction.gib_more, None);
        if name.starts_with("llama") {
            assert_near(&prompts(&prediction), &[32_443.0, 32_449.0], &[15.0, 15.0]);
        }
    }
    let (hardware, config) = (h200(), limited(0, 512));
    let (_, large) = predicted("llama-70b:q4_0", (&hardware, &config), 16, 32);
    assert_near(&decode(&large)[..1], &[92.8], &[5.0]);
}

/// What `tandem probe` measured of another H200's products, in T multiply-accumulates per second.
fn with_products() -> HardwareProfile {
    let rates = [
        ("Q4_0", [5.53, 35.90, 77.84, 132.46, 322.90]),
        ("Q8_0", [3.09, 22.88, 63.21, 112.46, 315.25]),
        ("Q4_K", [4.55, 28.72, 67.59, 117.96, 292.52]),
        ("Q6_K", [3.81, 24.61, 57.85, 98.72, 291.49]),
    ];
    let mut hardware = h200();
    let gpu = &mut hardware.measured.as_mut().unwrap().gpus[0];
    (gpu.read_bytes_per_second, gpu.macs.per_second) = (4557e9, 445e12);
    gpu.products = rates
        .map(|(dtype, rates): (&str, [f64; 5])| GpuProductRates {
            dtype: dtype.into(),
            macs_per_second: rates.map(|rate| rate * 1e12),
        })
        .into();
    hardware
}

#[test]
fn types_on_the_gpu_are_as_fast_as_their_products_let_them_be() {
    for (name, one_8_32, of_512_2048) in [
        ("llama-8b:q4_0", [555.0, 2955.0, 5842.0], [31_791.0, 29_437.0]),
        ("llama-8b:q8_0", [380.0, 2173.0, 5117.0], [28_922.0, 26_627.0]),
        ("llama-8b:q4_k_m", [493.0, 2482.0, 5287.0], [27_693.0, 25_908.0]),
    ] {
        let (hardware, config) = (with_products(), limited(0, 512));
        let (_, prediction) = predicted(name, (&hardware, &config), 16, 512);
        assert_near(&decode(&prediction), &one_8_32, &[15.0; 3]);
        assert_near(&prompts(&prediction), &of_512_2048, &[15.0; 2]);
    }
}

#[test]
fn a_type_that_was_not_measured_takes_its_time() {
    let config = limited(0, 512);
    let of = |hardware: &HardwareProfile| {
        let (_, prediction) = predicted("llama-8b:q4_0", (hardware, &config), 16, 512);
        [decode(&prediction), prompts(&prediction)].concat()
    };
    let (all, mut some) = (with_products(), with_products());
    some.measured.as_mut().unwrap().gpus[0].products.retain(|product| product.dtype != "Q4_0");
    for (with, without) in of(&all).into_iter().zip(of(&some)) {
        assert!((0.5..2.0).contains(&(without / with)), "{without} for {with}");
    }
}

#[test]
fn several_prompts_attend_less_than_one_as_long() {
    let (spec, hardware, config) = (shape("llama-1b:q4_0"), h200(), config("off"));
    let placement = Placement::plan(&spec, &hardware, &config).unwrap();
    let seconds = |streams: usize, prompt: usize, depth: usize| {
        let job = Job { streams, prompt, generated: 0, depth };
        job.seconds(&spec, &placement, &hardware).unwrap()
    };
    let [one, eight, behind] = [seconds(1, 4096, 0), seconds(8, 512, 0), seconds(8, 512, 3584)];
    assert!(eight < one && one < behind, "{eight}, {one}, {behind}");
    // Half of a prompt is what its tokens see in the mean.
    let macs = 16.0 * 2.0 * 2048.0 * 4096.0 * (2048.0 - 256.0);
    let fewer = macs / (8.27e12 / 2.0 * 0.18 * placement.workers.threads as f64 / 16.0);
    assert!(((one - eight) / fewer - 1.0).abs() < 0.02, "{} for {fewer}", one - eight);
}

#[test]
fn a_model_half_in_host_memory_is_as_fast_as_predicted() {
    let (hardware, mut config) = (h200(), limited(2950 * MIB, 512));
    config.model.context_tokens = 1024;
    let (placement, prediction) = predicted("llama-8b:q4_0", (&hardware, &config), 14, 16);
    let spilled = placement.spill.unwrap().layers.len();
    assert!((21..=23).contains(&spilled), "{spilled}");
    assert_near(&decode(&prediction), &[57.9, 396.0, 833.0], &[15.0, 35.0, 35.0]);
    let (_, prediction) = predicted("llama-8b:q4_0", (&hardware, &config), 16, 16);
    assert_near(&prompts(&prediction), &[12_890.0], &[15.0]);

    let mut config = limited(3400 * MIB, 2048);
    config.model.context_tokens = 2048;
    let (_, prediction) = predicted("llama-8b:q4_0", (&hardware, &config), 16, 16);
    assert_near(&prompts(&prediction)[1..], &[30_326.0], &[15.0]);

    let mut config = limited(24 * GIB, 2048);
    config.model.context_tokens = 2048;
    let (_, prediction) = predicted("llama-70b:q4_0", (&hardware, &config), 16, 16);
    assert_near(&decode(&prediction)[..1], &[7.1], &[15.0]);
    assert_near(&prompts(&prediction)[1..], &[3689.0], &[15.0]);
}

/// Its prompts by what the bus brings of its weights.
#[test]
fn floats_half_in_host_memory_are_as_fast_as_predicted() {
    let (hardware, mut config) = (h200(), limited(9 * GIB, 512));
    config.model.context_tokens = 4352;
    let (placement, prediction) = predicted("llama-8b:bf16", (&hardware, &config), 14, 16);
    let spilled = placement.spill.unwrap().layers.len();
    assert_eq!(spilled, 22);
    assert_near(&decode(&prediction)[..1], &[14.9], &[15.0]);
    assert_near(&prompts(&prediction)[..1], &[3483.0], &[10.0]);
}

#[test]
fn a_model_on_the_cpu_is_as_fast_as_predicted() {
    for (numbers, macs, one_8_32, prompt) in [
        ("int8", 8.27e12 / 2.0, [25.5, 154.0, 210.0], 260.0),
        ("bf16", 11.5e12, [22.5, 161.0, 394.0], 465.0),
    ] {
        let hardware = HardwareProfile { measured: Some(measured(numbers, macs)), ..h200() };
        let config = config("off");
        let (placement, prediction) = predicted("llama-8b:q4_0", (&hardware, &config), 16, 16);
        assert_eq!(placement.device(), &Device::Cpu);
        assert_near(&decode(&prediction), &one_8_32, &[15.0, 35.0, 35.0]);
        assert_near(&prompts(&prediction)[..1], &[prompt], &[15.0]);
    }
}

#[test]
fn a_gib_more_of_vram_is_worth_what_a_larger_limit_is() {
    let (spec, hardware) = (shape("llama-8b:q4_0"), h200());
    let of = |limit| {
        let config = limited(limit, 512);
        let placement = Placement::plan(&spec, &hardware, &config).unwrap();
        Prediction::of(&spec, &placement, &hardware, &config).unwrap()
    };
    let (less, more) = (of(4 * GIB), of(5 * GIB));
    assert_eq!(less.gib_more, Some(more.decode[0].tokens_per_second));
    assert!(less.gib_more > Some(1.2 * less.decode[0].tokens_per_second));
}

#[test]
fn a_gpu_that_would_be_slower_than_the_cpu_is_not_taken() {
    let spec = shape("llama-8b:q4_0");
    let mut config = limited(5 << 28, 512);
    config.gpu.device = "auto".into();
    // Copies, and crossings, of another age; then one without a probe.
    let mut slow = h200();
    let gpu = &mut slow.measured.as_mut().unwrap().gpus[0];
    (gpu.pinned.to_gpu, gpu.beside_reads.to_gpu, gpu.crossing_us) = (0.1e9, 0.1e9, 900.0);
    let of = |hardware: &HardwareProfile, config: &Config| {
        let placement = Placement::plan(&spec, hardware, config).unwrap();
        (placement.device().clone(), placement.notes)
    };
    let (device, notes) = of(&slow, &config);
    assert_eq!(device, Device::Cpu);
    assert!(notes[0].starts_with("no GPU is used: with what must be spilled"), "{notes:?}");
    let unknown = HardwareProfile { measured: None, ..h200() };
    for hardware in [h200(), unknown] {
        assert_eq!(of(&hardware, &config).0, Device::Gpu(0));
    }
    // Nor is one that was asked for doubted, or one that holds the model.
    config.gpu.device = "0".into();
    assert_eq!(of(&slow, &config).0, Device::Gpu(0));
    assert_eq!(of(&slow, &limited(0, 512)).0, Device::Gpu(0));
}

/// What lies in host memory is the same bytes a token, wherever it is from: a curve without cliffs.
#[test]
fn speeds_fall_with_the_limit_by_what_is_read_of_host_memory_alone() {
    let (spec, hardware) = (shape("llama-8b:q4_0"), h200());
    let speeds = |mib: u64| {
        let mut config = limited(mib * MIB, 512);
        config.model.context_tokens = 1024;
        let placement = Placement::plan(&spec, &hardware, &config).unwrap();
        let spilled = placement.spill.as_ref().map_or(0, |spill| spill.weight_bytes);
        (spilled, Prediction::of(&spec, &placement, &hardware, &config).unwrap())
    };
    let (mut before, mut limit) = (speeds(4000), 4000);
    while limit > 1150 {
        limit -= 50;
        let now = speeds(limit);
        let more = now.0 as f64 / before.0 as f64;
        for (now, before) in decode(&now.1).into_iter().zip(decode(&before.1)) {
            assert!(now * more * 1.05 > before, "{before}, then {now} at {limit} MiB");
        }
        for (now, before) in prompts(&now.1).into_iter().zip(prompts(&before.1)) {
            assert!(now * more * 1.05 > before, "{before}, then {now} at {limit} MiB");
        }
        before = now;
    }
}

#[test]
fn stages_follow_each_other_and_read_a_long_prompt_at_once() {
    let mut two = with(vec![gpu(0, 140 * GIB), gpu(1, 140 * GIB)]);
    let mut rates = measured("int8", 8.27e12 / 2.0);
    rates.gpus.push(GpuRates { ordinal: 1, ..rates.gpus[0].clone() });
    two.measured = Some(rates);
    let spec = shape("llama-70b:q4_0");
    let of = |device: &str, limit: u64| {
        let mut config = limited(limit, 512);
        config.gpu.device = device.into();
        config.model.context_tokens = 2048;
        let placement = Placement::plan(&spec, &two, &config).unwrap();
        Prediction::of(&spec, &placement, &two, &config).unwrap()
    };
    // Where one GPU spills for both it has the longer part of a prompt.
    for (limit, least) in [(0, 1.3), (24 * GIB, 0.85)] {
        let (one, both) = (of("0", limit), of("0,1", limit / 2));
        let by_one = |both: &[f64], one: &[f64]| both[0] / one[0];
        // Two rings and twice the activations take the room of a few networks.
        let decoded = by_one(&decode(&both), &decode(&one));
        assert!((0.85..=1.01).contains(&decoded), "{decoded} at {limit}");
        let in_one_step = by_one(&prompts(&both), &prompts(&one));
        assert!((0.8..=1.2).contains(&in_one_step), "{in_one_step} at {limit}");
        let in_four = by_one(&prompts(&both)[1..], &prompts(&one)[1..]);
        assert!((least..=1.7).contains(&in_four), "{in_four} at {limit}");
        assert!(both.gib_more.is_some() == (limit > 0));
    }
}

#[test]
fn what_was_not_measured_is_not_predicted() {
    let (spec, config) = (shape("llama-8b:q4_0"), config("0"));
    let plan = |hardware: &HardwareProfile| {
        let placement = Placement::plan(&spec, hardware, &config).unwrap();
        Prediction::of(&spec, &placement, hardware, &config)
    };
    assert!(plan(&h200()).is_some());
    assert_eq!(plan(&HardwareProfile { measured: None, ..h200() }), None);
    let mut other = h200();
    other.measured.as_mut().unwrap().gpus[0].ordinal = 1;
    assert_eq!(plan(&other), None);
    other.measured = Some(Measured::default());
    assert_eq!(plan(&other), None);
}

#[test]
fn what_does_not_fit_is_not_predicted() {
    let spec = spec_of(Family::Mixtral);
    let hardware = HardwareProfile { measured: h200().measured, ..machine(64 * GIB) };
    let mut config = Config::default();
    config.scheduler.sequences_max = 8;
    let placement = Placement::plan(&spec, &hardware, &config).unwrap();
    let prediction = Prediction::of(&spec, &placement, &hardware, &config).unwrap();
    assert_eq!(prediction.context_tokens, placement.context_tokens.min(512));
    let streams: Vec<usize> = prediction.decode.iter().map(|decode| decode.streams).collect();
    assert_eq!(streams, [1, 8]);
    let fits = |tokens: &usize| *tokens <= placement.context_tokens;
    assert_eq!(prediction.prompt.len(), [512, 2048].iter().filter(|tokens| fits(tokens)).count());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn more_memory_is_never_slower(
        mib in prop_oneof![900u64..5_000, 1500u64..40_000],
        more in 1u64..8_000,
        name in prop::sample::select(&["llama-8b:q4_0", "llama-8b:f16", "mixtral-8x7b:q4_k_m",
            "qwen3-30b-a3b:q4_0", "llama-70b:q4_0"][..]),
    ) {
        let (spec, hardware) = (shape(name), h200());
        let of = |mib: u64| {
            let mut config = limited(mib * MIB, 512);
            // The same for both: what a longer one costs is no fault of more memory.
            config.model.context_tokens = 1024;
            let placement = Placement::plan(&spec, &hardware, &config).ok()?;
            Prediction::of(&spec, &placement, &hardware, &config)
        };
        let (Some(less), Some(more)) = (of(mib), of(mib + more)) else { return Ok(()) };
        prop_assert_eq!(less.context_tokens, more.context_tokens);
        for (less, more) in decode(&less).into_iter().zip(decode(&more)) {
            prop_assert!(more >= 0.999 * less, "{} after {}", more, less);
        }
        for (less, more) in prompts(&less).into_iter().zip(prompts(&more)) {
            prop_assert!(more >= 0.999 * less, "{} after {}", more, less);
        }
    }
}
