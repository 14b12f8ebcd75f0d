//! Layers that are cut over GPUs which do not hold them, where the machine was measured.

use super::gpu::{gpu, with};
use super::predict::{MIB, h200, limited, shape};
use proptest::prelude::*;
use tandem::config::Config;
use tandem::hardware::{GpuRates, HardwareProfile, Measured};
use tandem::placement::{Job, Placement};

/// Several H200 of one host.
fn several(count: usize) -> HardwareProfile {
    let one = h200();
    let measured = one.measured.expect("a measured machine");
    let rates = |ordinal| GpuRates { ordinal, ..measured.gpus[0].clone() };
    let gpus = (0..count).map(rates).collect();
    let devices = (0..count).map(|ordinal| gpu(ordinal, 140 << 30)).collect();
    HardwareProfile { measured: Some(Measured { gpus, ..measured }), ..with(devices) }
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
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
