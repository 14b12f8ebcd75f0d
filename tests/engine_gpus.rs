//! The engine on two GPUs, where there are two: the answers of one, and a pause where its stages
//! die. `TANDEM_REQUIRE_GPUS=2` makes it a failure that there are not two.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that may skip")]

#[path = "actors/rig.rs"]
mod rig;

use rig::{config, read, tiny_model_file};
use std::sync::Arc;
use tandem::actors::{Engine, FaultPoint, Faults};
use tandem::hardware::Gpus;
use tandem::placement::Device;
use tandem::request::{Request, SamplingParams};

fn greedy(prompt: &str, tokens: usize) -> Request {
    let mut request = Request::text(prompt).max_tokens(tokens).sampling(SamplingParams::greedy());
    request.ignore_eos = true;
    request
}

/// An engine on those GPUs, if there are two.
async fn engine(device: &str, faults: Faults) -> Option<Engine> {
    if Gpus::detect().devices.len() < 2 {
        assert!(std::env::var_os("TANDEM_REQUIRE_GPUS").is_none(), "two GPUs are required");
        println!("skipped: two GPUs");
        return None;
    }
    let mut config = config();
    config.gpu.device = device.into();
    // Long prompts take steps that nobody waits for.
    config.scheduler.step_tokens_max = 64;
    let builder = Engine::builder().model(tiny_model_file()).config(config);
    Some(builder.faults(Arc::new(faults)).build().await.unwrap())
}

fn prompts() -> [String; 3] {
    ["the rain in ".repeat(40), "one two".into(), "a longer story ".repeat(20)]
}

#[tokio::test(flavor = "multi_thread")]
async fn two_gpus_answer_as_one() {
    let mut answers = Vec::new();
    for device in ["0", "1", "0,1", "1,0", "all"] {
        let Some(engine) = engine(device, Faults::default()).await else { return };
        let stages = engine.plan().unwrap().stages;
        assert_eq!(stages.len(), if device.len() == 1 { 1 } else { 2 });
        assert!(stages.iter().all(|stage| stage.device != Device::Cpu));
        let mut of_device = Vec::new();
        for prompt in prompts() {
            of_device.push(read(engine.generate(greedy(&prompt, 40))).await.tokens);
        }
        answers.push(of_device);
    }
    assert!(answers.iter().all(|of_device| *of_device == answers[0]), "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stages_on_two_gpus_that_die_are_replaced_together() {
    for point in [FaultPoint::ExecutorBeforeRun, FaultPoint::ExecutorAfterRun] {
        let faults = Faults::default();
        faults.arm(point, 20);
        let Some(dying) = engine("0,1", faults).await else { return };
        let Some(healthy) = engine("0,1", Faults::default()).await else { return };
        let prompt = &prompts()[0];
        let wanted = read(healthy.generate(greedy(prompt, 40))).await.tokens;
        let got = read(dying.generate(greedy(prompt, 40))).await.tokens;
        assert_eq!(dying.status().restarts.executor, 1);
        // What comes after the crash was computed in wider steps, which round in other ways.
        assert_eq!((got.len(), &got[..5]), (wanted.len(), &wanted[..5]));
    }
}
