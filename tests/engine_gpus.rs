//! The engine on two GPUs, where there are two: the answers of one, and a pause where its stages
//! die. `TANDEM_REQUIRE_GPUS=2` makes it a failure that there are not two.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that may skip")]

#[path = "actors/rig.rs"]
mod rig;
#[path = "support/turn.rs"]
mod turn;

use rig::tiny_model::{Family, TinyModel};
use rig::{config, read, tiny_model_file};
use std::path::PathBuf;
use std::sync::Arc;
use tandem::actors::{Engine, FaultPoint, Faults};
use tandem::config::Config;
use tandem::formats::Checkpoint;
use tandem::hardware::{Gpus, HardwareProfile};
use tandem::model::ModelSpec;
use tandem::placement::{Device, Placement};
use tandem::request::{Request, SamplingParams};
use tandem::tensor::DType;
use tandem::units::ByteSize;
use tempfile::TempDir;

fn greedy(prompt: &str, tokens: usize) -> Request {
    let mut request = Request::text(prompt).max_tokens(tokens).sampling(SamplingParams::greedy());
    request.ignore_eos = true;
    request
}

/// An engine on those GPUs, if there are two.
async fn engine(device: &str, faults: Faults) -> Option<Engine> {
    turn::take_turn();
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

/// A model and a limit under which each of two GPUs has to spill some of its layers.
fn spilling() -> Option<(PathBuf, Config, TempDir)> {
    turn::take_turn();
    let hardware = HardwareProfile::detect();
    if hardware.gpus.devices.len() < 2 {
        assert!(std::env::var_os("TANDEM_REQUIRE_GPUS").is_none(), "two GPUs are required");
        println!("skipped: two GPUs");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let dtype = DType::Q4_0;
    TinyModel { layers: 16, n_ff: 1024, ..TinyModel::new(Family::Llama).dtype(dtype) }.write(&path);
    let spec = ModelSpec::from_checkpoint(&Checkpoint::open(&path).unwrap()).unwrap();
    let mut config = config();
    config.gpu.device = "0,1".into();
    config.scheduler.step_tokens_max = 512;
    config.model.context_tokens = 1024;
    let whole = Placement::plan(&spec, &hardware, &config).unwrap();
    let (most, step) = (whole.bytes_of(&whole.stages[0]) * 2, 64 << 10);
    let spills_everywhere = |limit: &u64| {
        let mut config = config.clone();
        config.gpu.vram_limit = ByteSize(*limit);
        let placed = Placement::plan(&spec, &hardware, &config);
        placed.is_ok_and(|placed| placed.stages.iter().all(|stage| stage.spill.is_some()))
    };
    let limit = (0..most).step_by(step).find(spills_everywhere).unwrap();
    config.gpu.vram_limit = ByteSize(limit);
    Some((path, config, folder))
}

#[tokio::test(flavor = "multi_thread")]
async fn two_gpus_that_both_spill_answer_as_one_that_holds_all() {
    let Some((path, config, _folder)) = spilling() else { return };
    let of = |device: &str, limit, streamed: &str| {
        let mut config = config.clone();
        (config.gpu.device, config.gpu.vram_limit) = (device.into(), limit);
        config.gpu.spill_streamed = streamed.into();
        Engine::builder().model(&path).config(config).build()
    };
    let whole = of("0", ByteSize(0), "auto").await.unwrap();
    assert!(whole.plan().unwrap().spill.is_none());
    for streamed in ["100", "0"] {
        let engine = of("0,1", config.gpu.vram_limit, streamed).await.unwrap();
        let stages = engine.plan().unwrap().stages;
        assert!(stages.len() == 2 && stages.iter().all(|stage| stage.spill.is_some()));
        for prompt in prompts() {
            let wanted = read(whole.generate(greedy(&prompt, 40))).await.tokens;
            let got = read(engine.generate(greedy(&prompt, 40))).await.tokens;
            assert_eq!(got.len(), 40);
            // The CPU rounds in other ways than the GPUs.
            assert!(streamed == "0" || got == wanted, "{got:?} and {wanted:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stages_that_spill_and_die_are_replaced_together() {
    let Some((path, config, _folder)) = spilling() else { return };
    for streamed in ["0", "100"] {
        let build = |faults: Faults| {
            let mut config = config.clone();
            config.gpu.spill_streamed = streamed.into();
            let builder = Engine::builder().model(&path).config(config);
            builder.faults(Arc::new(faults)).build()
        };
        let healthy = build(Faults::default()).await.unwrap();
        let wanted = read(healthy.generate(greedy(&prompts()[0], 40))).await.tokens;
        drop(healthy);
        let faults = Faults::default();
        faults.arm(FaultPoint::ExecutorAfterRun, 20);
        let dying = build(faults).await.unwrap();
        let got = read(dying.generate(greedy(&prompts()[0], 40))).await.tokens;
        assert_eq!(dying.status().restarts.executor, 1);
        // What comes after the crash was computed in wider steps, which round in other ways.
        assert_eq!((got.len(), &got[..5]), (wanted.len(), &wanted[..5]));
    }
}
