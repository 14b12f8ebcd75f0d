//! How wide steps are where the configuration leaves it open.

use super::gpu::{config, with};
use super::predict::{MIB, h200, limited, shape};
use proptest::prelude::*;
use tandem::config::Config;
use tandem::hardware::HardwareProfile;
use tandem::placement::{Device, Job, Placement};
use tandem::request::RequestError;

const WIDTHS: [usize; 5] = [128, 256, 512, 1024, 2048];

fn expecting(limit: u64, [streams, prompt, generated]: [usize; 3]) -> Config {
    let mut config = limited(limit, 0);
    config.placement.streams = streams;
    config.placement.prompt_tokens = prompt;
    config.placement.generated_tokens = generated;
    config
}

fn plan(hardware: &HardwareProfile, config: &Config) -> Result<Placement, RequestError> {
    Placement::plan(&shape("llama-8b:q4_0"), hardware, config)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn the_width_is_the_one_with_which_expected_requests_end_first(
        limit in 1200..4000u64,
        streams in 1..64usize,
        prompt in 1..1500usize,
        generated in 1..500usize,
    ) {
        let (spec, hardware) = (shape("llama-8b:q4_0"), h200());
        let config = expecting(limit * MIB, [streams, prompt, generated]);
        let chosen = plan(&hardware, &config).unwrap();
        let of_width = |tokens: usize| {
            let mut config = config.clone();
            config.scheduler.step_tokens_max = tokens;
            plan(&hardware, &config)
        };
        prop_assert_eq!(&chosen, &of_width(chosen.step_tokens_max).unwrap());
        prop_assert_eq!(chosen.settled(&config).scheduler.step_tokens_max, chosen.step_tokens_max);
        let usual = of_width(512).unwrap();
        prop_assert!(chosen.context_tokens >= usual.context_tokens);
        let job = Job { streams, prompt, generated, depth: 0 };
        let seconds = |placed: &Placement| job.seconds(&spec, placed, &hardware).unwrap();
        for other in WIDTHS.into_iter().filter_map(|tokens| of_width(tokens).ok()) {
            let is_like = other.context_tokens >= usual.context_tokens;
            prop_assert!(!is_like || seconds(&chosen) <= seconds(&other));
        }
    }
}

#[test]
fn long_prompts_of_many_get_wide_steps_and_a_short_chat_narrow_ones() {
    let width = |requests| plan(&h200(), &expecting(3100 * MIB, requests)).unwrap().step_tokens_max;
    assert!(width([32, 2048, 16]) >= 1024);
    assert!(width([1, 64, 512]) <= 256);
}

#[test]
fn steps_are_as_usual_where_nothing_is_spilled_or_known() {
    let unknown = HardwareProfile { measured: None, ..h200() };
    let many = [32, 2048, 16];
    for (hardware, config) in [
        (h200(), expecting(0, many)),
        (unknown, expecting(3000 * MIB, many)),
        (with(Vec::new()), config("off")),
    ] {
        assert_eq!(plan(&hardware, &config).unwrap().step_tokens_max, 512);
    }
    // Nor is a width that was asked for doubted.
    let mut asked = expecting(3000 * MIB, many);
    asked.scheduler.step_tokens_max = 64;
    assert_eq!(plan(&h200(), &asked).unwrap().step_tokens_max, 64);
}

#[test]
fn where_the_usual_width_does_not_fit_a_narrower_one_does() {
    let with_limit = |limit: u64| {
        let mut config = limited(limit, 0);
        config.gpu.spill = false;
        config.model.context_tokens = 256;
        config
    };
    let need_of = |tokens: usize| {
        let mut config = with_limit(1 << 20);
        config.scheduler.step_tokens_max = tokens;
        match plan(&h200(), &config) {
            Err(RequestError::InsufficientMemory { need, .. }) => need,
            other => panic!("{other:?}"),
        }
    };
    let [least, usual] = [128, 512].map(need_of);
    assert!(least < usual);
    // The margin comes on top.
    let tight = plan(&h200(), &with_limit(least + least / 15)).unwrap();
    assert_eq!((tight.step_tokens_max, tight.device()), (128, &Device::Gpu(0)));
    assert_eq!(plan(&h200(), &with_limit(usual + usual / 15)).unwrap().step_tokens_max, 512);
    let refused = plan(&h200(), &with_limit(least / 2));
    let Err(RequestError::InsufficientMemory { need, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!(need, usual);
}
