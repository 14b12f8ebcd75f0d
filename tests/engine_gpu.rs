//! The engine with its stage on a GPU and KV in three tiers: answers are those of an engine that
//! has room for all. Skips where there is no GPU; `TANDEM_REQUIRE_GPU` makes that a failure.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a failed unwrap is a failed test")]

#[path = "actors/rig.rs"]
mod rig;

use rig::tiny_model::{Family, TinyModel};
use rig::{config, prompt, read, request};
use std::path::PathBuf;
use std::sync::Arc;
use tandem::actors::{Engine, FaultPoint, Faults};
use tandem::config::Config;
use tandem::units::{ByteSize, TokenId};

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
