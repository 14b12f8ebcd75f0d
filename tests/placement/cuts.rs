//! Layers that are cut over GPUs which do not hold them, where the machine was measured.

use super::gpu::{gpu, with};
use super::predict::{MIB, h200, limited, shape};
use super::several::{assert_sound, on};
use proptest::prelude::*;
use tandem::config::Config;
use tandem::hardware::{GpuRates, HardwareProfile, Measured};
use tandem::placement::{Device, Job, Placement};

/// Several H200 of one host.
fn several(count: usize) -> HardwareProfile {
    let one = h200();
    let measured = one.measured.expect("a measured machine");
    let rates = |ordinal| GpuRates { ordinal, ..measured.gpus[0].clone() };
    let gpus = (0..count).map(rates).collect();
    let devices = (0..count).map(|ordinal| gpu(ordinal, 140 << 30)).collect();
    HardwareProfile { measured: Some(Measured { gpus, ..measured }), ..with(devices) }
}

/// The first of them, each with so many MiB free and some part of the speed of the others.
fn unequal(each: &[(u64, f64)]) -> HardwareProfile {
    let mut hardware = several(each.len());
    let measured = hardware.measured.as_mut().expect("a measured machine");
    let gpus = hardware.gpus.devices.iter_mut().zip(&mut measured.gpus);
    for ((device, rates), (mib, speed)) in gpus.zip(each) {
        device.memory_free_bytes = mib * MIB;
        for rate in [
            &mut rates.read_bytes_per_second,
            &mut rates.macs.per_second,
            &mut rates.pinned.to_gpu,
            &mut rates.beside_reads.to_gpu,
        ] {
            *rate *= speed;
        }
        let products = rates.products.iter_mut().flat_map(|of| &mut of.macs_per_second);
        products.for_each(|rate| *rate *= speed);
    }
    hardware
}

fn expecting(limit: u64, count: usize, [streams, prompt, generated]: [usize; 3]) -> Config {
    let mut config = limited(limit, 512);
    config.gpu.device = if count == 1 { "0".into() } else { "all".into() };
    config.placement.streams = streams;
    config.placement.prompt_tokens = prompt;
    config.placement.generated_tokens = generated;
    config
}

/// With and without what was measured.
fn placements(name: &str, count: usize, config: &Config) -> Option<[Placement; 2]> {
    let measured = several(count);
    let unknown = HardwareProfile { measured: None, ..measured.clone() };
    let plan = |hardware| Placement::plan(&shape(name), hardware, config).ok();
    Some([plan(&measured)?, plan(&unknown)?])
}

fn spilled(placement: &Placement) -> Vec<u64> {
    let stages = placement.stages.iter();
    stages.map(|stage| stage.spill.as_ref().map_or(0, |spill| spill.weight_bytes)).collect()
}

#[test]
fn gpus_share_what_is_spilled_where_long_prompts_are_expected() {
    let limit = 12_288 * MIB;
    let seconds = |job: Job, placement: &Placement| {
        job.seconds(&shape("llama-70b:q4_0"), placement, &several(2)).unwrap()
    };
    let long = Job { streams: 1, prompt: 8000, generated: 1, depth: 0 };
    let config = expecting(limit, 2, [1, long.prompt, long.generated]);
    let [even, fewest] = placements("llama-70b:q4_0", 2, &config).unwrap();
    // The fewest bytes are one GPU's alone.
    assert_eq!(spilled(&fewest).iter().filter(|bytes| **bytes > 0).count(), 1);
    let [first, second] = spilled(&even)[..] else { panic!("{:?}", even.stages) };
    assert!(first.abs_diff(second) < (first + second) / 5, "{first} and {second}");
    assert!(seconds(long, &even) < 0.7 * seconds(long, &fewest));
    assert!(even.context_tokens >= fewest.context_tokens);
    // Answers read all that is spilled, whoever has it.
    let chat = Job { streams: 1, prompt: 64, generated: 500, depth: 0 };
    let config = expecting(limit, 2, [1, chat.prompt, chat.generated]);
    let [chosen, fewest] = placements("llama-70b:q4_0", 2, &config).unwrap();
    assert!(seconds(chat, &chosen) <= 1.001 * seconds(chat, &fewest));
    assert!(seconds(chat, &chosen) < seconds(chat, &even));
}

#[test]
fn a_slow_gpu_is_left_alone_though_less_would_be_spilled_with_it() {
    let spec = shape("llama-8b:q4_0");
    let mut config = expecting(0, 2, [1, 64, 500]);
    config.gpu.device = "auto".into();
    for (speed, taken) in [(1.0, &[0, 1][..]), (0.002, &[0])] {
        let hardware = unequal(&[(3000, 1.0), (1500, speed)]);
        let unknown = HardwareProfile { measured: None, ..hardware.clone() };
        let fewest = Placement::plan(&spec, &unknown, &config).unwrap();
        assert_eq!(on(&fewest), [0, 1]);
        let placement = Placement::plan(&spec, &hardware, &config).unwrap();
        assert_eq!(on(&placement), taken, "{speed}");
        let told = placement.notes.iter().any(|note| {
            note == "GPUs other than 0 are not used: with them requests are predicted to take no \
                     less time"
        });
        assert_eq!(told, taken.len() == 1, "{:?}", placement.notes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn no_other_set_of_gpus_is_predicted_to_be_faster(
        each in prop::collection::vec((700..2500u64, 0.02..1.0f64), 2..4),
        streams in 1..16usize,
        prompt in 1..3000usize,
        generated in 1..300usize,
    ) {
        let (spec, hardware) = (shape("llama-8b:q4_0"), unequal(&each));
        let plan = |hardware: &HardwareProfile, device: &str| {
            let mut config = expecting(0, 2, [streams, prompt, generated]);
            config.gpu.device = device.into();
            Placement::plan(&spec, hardware, &config).ok()
        };
        let unknown = HardwareProfile { measured: None, ..hardware.clone() };
        let (Some(chosen), Some(fewest)) = (plan(&hardware, "auto"), plan(&unknown, "auto")) else {
            return Ok(());
        };
        prop_assume!(*chosen.device() != Device::Cpu && fewest.spill.is_some());
        prop_assume!(fewest.context_tokens > prompt + generated);
        assert_sound(&chosen, &spec, |index| each[index].0 * MIB);
        prop_assert!(chosen.context_tokens >= fewest.context_tokens);
        let job = Job { streams, prompt, generated, depth: 0 };
        let seconds = |placement: &Placement| job.seconds(&spec, placement, &hardware).unwrap();
        let mut by_room: Vec<usize> = (0..each.len()).collect();
        by_room.sort_by_key(|index| std::cmp::Reverse(each[*index].0));
        let several = (2..=each.len()).map(|count| by_room[..count].to_vec());
        for mut gpus in (0..each.len()).map(|gpu| vec![gpu]).chain(several) {
            gpus.sort_unstable();
            let names: Vec<_> = gpus.iter().map(usize::to_string).collect();
            let Some(other) = plan(&hardware, &names.join(",")) else { continue };
            // Not all cuts of three GPUs are looked at, but the same ones beside the same bound.
            let is_searched = gpus.len() < 3 || on(&fewest) == gpus;
            if is_searched && other.context_tokens >= fewest.context_tokens {
                prop_assert!(seconds(&chosen) <= 1.001 * seconds(&other), "{gpus:?}");
            }
        }
    }

    #[test]
    fn a_cut_is_predicted_to_be_no_slower_than_that_with_the_fewest_bytes(
        limit in 1000..3000u64,
        count in 1..4usize,
        streams in 1..32usize,
        prompt in 1..4000usize,
        generated in 1..400usize,
    ) {
        let config = expecting(limit * MIB, count, [streams, prompt, generated]);
        let Some([chosen, fewest]) = placements("llama-8b:q4_0", count, &config) else {
            return Ok(());
        };
        let all = |placement: &Placement| spilled(placement).iter().sum::<u64>();
        prop_assert!(chosen.context_tokens >= fewest.context_tokens);
        prop_assume!(fewest.context_tokens > prompt + generated);
        prop_assert!(all(&chosen) >= all(&fewest));
        let job = Job { streams, prompt, generated, depth: 0 };
        let seconds = |placement: &Placement| {
            job.seconds(&shape("llama-8b:q4_0"), placement, &several(count)).unwrap()
        };
        prop_assert!(seconds(&chosen) <= 1.001 * seconds(&fewest));
        // Times are compared in thousandths.
        let is_as_fast = seconds(&chosen) > 0.9995 * seconds(&fewest);
        prop_assert!(!is_as_fast || all(&chosen) == all(&fewest));
        if count == 1 || chosen.spill.is_none() {
            prop_assert_eq!(chosen.stages, fewest.stages);
        }
    }
}
