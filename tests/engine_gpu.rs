//! The engine with its stage on a GPU and KV in three tiers: answers are those of an engine that
//! has room for all. Skips where there is no GPU; `TANDEM_REQUIRE_GPU` makes that a failure.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a failed unwrap is a failed test")]

#[path = "actors/rig.rs"]
mod rig;
#[path = "support/turn.rs"]
mod turn;

use rig::tiny_model::{Family, TinyModel};
use rig::{config, prompt, read, request};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tandem::actors::{Engine, EngineError, EngineState, FaultPoint, Faults};
use tandem::config::Config;
use tandem::request::RequestError;
use tandem::tensor::DType;
use tandem::units::{ByteSize, TokenId};
use tandem_kernels::{DeviceMemory, Gpu, GpuError, driver};

const CLIENTS: u32 = 24;
const TOKENS: usize = 60;
/// Bytes of 16 tokens of the tiny model's keys and values, in f16.
const BLOCK_BYTES: u64 = 1 << 14;

/// Steps of up to 8 tokens, so that a token's bits depend on nothing else in them.
fn with(blocks: [u64; 3]) -> Config {
    let mut config = config();
    config.gpu.device = "0".into();
    config.scheduler.step_tokens_max = 8;
    config.scheduler.sequences_max = 8;
    config.kv.block_tokens = 16;
    config.model.context_tokens = 256;
    let [device, host, disk] = blocks.map(|blocks| ByteSize(blocks * BLOCK_BYTES));
    (config.kv.cache_bytes, config.kv.swap_bytes, config.kv.disk_bytes) = (device, host, disk);
    config.kv.disk_folder = std::env::temp_dir();
    config
}

fn model(folder: &tempfile::TempDir) -> PathBuf {
    let path = folder.path().join("tiny.gguf");
    TinyModel::new(Family::Llama).write(&path);
    path
}

async fn answers(engine: &Engine) -> Vec<Vec<TokenId>> {
    let ask = |number: u32| request(&prompt(number % 16, 50), TOKENS);
    let asked: Vec<_> =
        (0..CLIENTS).map(|number| tokio::spawn(read(engine.generate(ask(number))))).collect();
    let mut answers = Vec::new();
    for answer in asked {
        answers.push(answer.await.unwrap().tokens);
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_through_all_tiers_of_a_gpu_are_those_of_a_roomy_engine() {
    turn::take_turn();
    let folder = tempfile::tempdir().unwrap();
    let path = model(&folder);
    let roomy = Engine::builder().model(&path).config(with([2_000, 0, 0])).build().await;
    let roomy = match roomy {
        Err(error) if std::env::var_os("TANDEM_REQUIRE_GPU").is_none() => {
            println!("skipped: {error}");
            return;
        }
        built => built.unwrap(),
    };
    let expected = answers(&roomy).await;
    assert!(expected.iter().all(|tokens| tokens.len() == TOKENS));
    drop(roomy);
    let faults = [
        None,
        Some((FaultPoint::KvSwapBeforeCopy, 20)),
        Some((FaultPoint::KvSwapAfterCopy, 20)),
        Some((FaultPoint::ExecutorAfterRun, 60)),
        Some((FaultPoint::SchedulerAfterApply, 60)),
    ];
    for fault in faults {
        let armed = Arc::new(Faults::default());
        fault.iter().for_each(|(point, pass)| armed.arm(*point, *pass));
        let builder = Engine::builder().model(&path).config(with([24, 12, 100]));
        let engine = builder.faults(armed).build().await.unwrap();
        assert!(answers(&engine).await == expected, "{fault:?}");
        let stats = engine.stats();
        let (metrics, restarts) = (&stats.metrics, stats.status.restarts);
        assert!(metrics.blocks_swapped_in > 20 && metrics.blocks_moved_to_disk > 0, "{fault:?}");
        assert_eq!(metrics.block_copies_failed, 0, "{fault:?}");
        let struck = restarts.kv_swap + restarts.executor + restarts.scheduler;
        assert_eq!(struck, u64::from(fault.is_some()), "{fault:?}: {restarts:?}");
        println!("{fault:?}: {:?}, {:?}", stats.blocks, metrics.swap_time);
    }
}

/// With a prompt that repeats itself, so that there is something to propose.
async fn repeated(engine: &Engine) -> (Vec<Vec<TokenId>>, u64) {
    let ask = |number: u32| request(&prompt(number, 20).repeat(3), TOKENS);
    let mut answers = Vec::new();
    for number in 0..6 {
        answers.push(read(engine.generate(ask(number))).await.tokens);
    }
    let asked: Vec<_> =
        (0..6).map(|number| tokio::spawn(read(engine.generate(ask(number))))).collect();
    for answer in asked {
        answers.push(answer.await.unwrap().tokens);
    }
    (answers, engine.stats().metrics.draft_tokens_accepted)
}

#[tokio::test(flavor = "multi_thread")]
async fn drafts_change_no_answer_on_a_gpu() {
    turn::take_turn();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    for dtype in [DType::Q4_0, DType::Q4_K, DType::Q8_0] {
        TinyModel::new(Family::Llama).dtype(dtype).write(&path);
        let mut wanted = None;
        for method in ["off", "ngram"] {
            let mut config = with([2_000, 0, 0]);
            config.speculative.method = method.into();
            config.speculative.ngram_min = 1;
            let engine = match Engine::builder().model(&path).config(config).build().await {
                Err(error) if std::env::var_os("TANDEM_REQUIRE_GPU").is_none() => {
                    println!("skipped: {error}");
                    return;
                }
                built => built.unwrap(),
            };
            let (answers, accepted) = repeated(&engine).await;
            println!("{dtype:?}, {method}: {accepted} drafted tokens accepted");
            assert_eq!(accepted > 0, method == "ngram", "{dtype:?}");
            let wanted = wanted.get_or_insert_with(|| answers.clone());
            assert!(*wanted == answers, "{dtype:?}");
        }
    }
}

/// Takes all free memory of a GPU, as another process might.
fn fill(gpu: &Gpu, taken: &Mutex<Vec<DeviceMemory>>) {
    let mut bytes = gpu.memory().unwrap().0;
    while bytes >= 256 {
        match gpu.alloc(bytes) {
            Ok(memory) => taken.lock().unwrap().push(memory),
            Err(GpuError::OutOfMemory { .. }) => bytes /= 2,
            Err(error) => panic!("{error}"),
        }
    }
    gpu.synchronize().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_written_to_while_it_is_loaded_is_refused() {
    turn::take_turn();
    let folder = tempfile::tempdir().unwrap();
    // On the CPU, which needs no GPU to say so, and on the GPU.
    for device in ["off", "0"] {
        let path = model(&folder);
        let mut config = with([2_000, 0, 0]);
        config.gpu.device = device.into();
        let (written, mut is_written) = (path.clone(), false);
        let builder = Engine::builder().model(&path).config(config).on_progress(move |_| {
            if !std::mem::replace(&mut is_written, true) {
                let mut file = OpenOptions::new().append(true).open(&written).unwrap();
                file.write_all(b"more").unwrap();
            }
        });
        match builder.build().await.map(|_| ()) {
            Err(EngineError::Model(RequestError::ModelInvalid { file, message, .. })) => {
                let said = "was written to since it was opened";
                assert_eq!((file, message.as_str()), (path, said), "{device}");
            }
            Err(error) if std::env::var_os("TANDEM_REQUIRE_GPU").is_none() && device == "0" => {
                println!("skipped: {error}");
            }
            other => panic!("{device}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_taken_after_the_plan_is_told_with_figures_and_without_restarts() {
    turn::take_turn();
    let gpu = driver().map_err(GpuError::from).and_then(|driver| Gpu::open(&driver, 0));
    let gpu = match gpu {
        Err(error) if std::env::var_os("TANDEM_REQUIRE_GPU").is_none() => {
            println!("skipped: {error}");
            return;
        }
        opened => Arc::new(opened.unwrap()),
    };
    let folder = tempfile::tempdir().unwrap();
    let path = model(&folder);
    for weights_are_there in [false, true] {
        let taken = Arc::new(Mutex::new(Vec::new()));
        let (taker, taken_there) = (Arc::clone(&gpu), Arc::clone(&taken));
        let builder = Engine::builder().model(&path).config(with([2_000, 0, 0]));
        let builder = builder.on_progress(move |progress| {
            if (progress.done_bytes == progress.total_bytes) == weights_are_there {
                fill(&taker, &taken_there);
            }
        });
        let engine = builder.start().unwrap();
        let Err(EngineError::Model(error)) = engine.ready().await else { panic!("an engine") };
        println!("weights are there: {weights_are_there}: {error}");
        let RequestError::InsufficientMemory { device, need, free, suggest } = &error else {
            panic!("{error}");
        };
        assert!(device.starts_with("GPU 0 (") && need > free, "{error}");
        assert!(suggest.contains("another process may have taken it"), "{suggest}");
        assert_eq!(engine.status().restarts.executor, 0);
        assert_eq!(engine.status().state, EngineState::Dead);
        engine.shutdown(Duration::ZERO).await;
        taken.lock().unwrap().clear();
        gpu.give_back_freed().unwrap();
    }
    let engine = Engine::builder().model(&path).config(with([2_000, 0, 0])).build().await.unwrap();
    assert_eq!(answers(&engine).await.len(), CLIENTS as usize);
}
