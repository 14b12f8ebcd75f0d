//! Real keys and values on their way through host memory and a file: the answers stay the same.

use super::rig::{config, prompt, read, request, tiny_model_file};
use std::path::PathBuf;
use std::sync::Arc;
use tandem::actors::{Engine, EngineError, FaultPoint, Faults};
use tandem::config::Config;
use tandem::request::Request;
use tandem::tensor::KvDType;
use tandem::units::{ByteSize, TokenId};

const CLIENTS: u32 = 32;
const TOKENS: usize = 70;
/// Bytes of 16 tokens of the tiny model's keys and values, in f16.
const BLOCK_BYTES: u64 = 1 << 14;

/// Room for about four of the clients' sequences, and little more in host memory.
fn crowded(dtype: KvDType) -> Config {
    let mut config = config();
    config.kv.block_tokens = 16;
    config.kv.dtype = dtype;
    config.model.context_tokens = 256;
    config.kv.cache_bytes = ByteSize(32 * BLOCK_BYTES);
    config.kv.swap_bytes = ByteSize(12 * BLOCK_BYTES);
    config.kv.disk_bytes = ByteSize(200 * BLOCK_BYTES);
    config.kv.disk_folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    config
}

/// Every second client begins as another one does.
fn question(number: u32) -> Request {
    let tokens: Vec<TokenId> = match number % 2 {
        0 => prompt(number, 50),
        _ => prompt(7, 40).into_iter().chain(prompt(number, 15)).collect(),
    };
    request(&tokens, TOKENS)
}

async fn answers(engine: &Engine) -> Vec<Vec<TokenId>> {
    let asked: Vec<_> =
        (0..CLIENTS).map(|number| tokio::spawn(read(engine.generate(question(number))))).collect();
    let mut answers = Vec::new();
    for answer in asked {
        answers.push(answer.await.unwrap().tokens);
    }
    answers
}

async fn engine(config: Config, arm: impl FnOnce(&Faults)) -> Engine {
    let faults = Arc::new(Faults::default());
    arm(&faults);
    let builder = Engine::builder().model(tiny_model_file()).config(config).faults(faults);
    builder.build().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_through_all_tiers_are_those_of_a_roomy_engine() {
    for dtype in [KvDType::F16, KvDType::Q8_0] {
        let mut roomy = crowded(dtype);
        roomy.kv.cache_bytes = ByteSize(2_000 * BLOCK_BYTES);
        let expected = answers(&engine(roomy, |_| {}).await).await;
        let crowded = engine(crowded(dtype), |_| {}).await;
        for round in 1..3 {
            assert!(answers(&crowded).await == expected, "{dtype}, round {round}");
        }
        let stats = crowded.stats();
        let (metrics, blocks) = (&stats.metrics, stats.blocks);
        assert!(stats.sequences.preemptions > 0, "{dtype}: {blocks:?}");
        assert!(metrics.blocks_swapped_out > 50 && metrics.blocks_swapped_in > 50, "{dtype}");
        assert!(blocks.host_cached > 0 && blocks.disk_cached > 0, "{dtype}: {blocks:?}");
        assert_eq!((metrics.block_copies_failed, blocks.disk_stopped), (0, false), "{dtype}");
        assert!(metrics.swap_time.count > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn crashes_among_the_tiers_cost_time_only() {
    let mut roomy = crowded(KvDType::F16);
    roomy.kv.cache_bytes = ByteSize(2_000 * BLOCK_BYTES);
    let expected = answers(&engine(roomy, |_| {}).await).await;
    let points = [
        FaultPoint::KvSwapBeforeCopy,
        FaultPoint::KvSwapAfterCopy,
        FaultPoint::ExecutorAfterRun,
        FaultPoint::SchedulerAfterApply,
    ];
    for point in points {
        let crowded = engine(crowded(KvDType::F16), |faults| faults.arm(point, 20)).await;
        assert!(answers(&crowded).await == expected, "{point:?}");
        let restarts = crowded.status().restarts;
        let struck = restarts.kv_swap + restarts.executor + restarts.scheduler;
        assert_eq!(struck, 1, "{point:?}: {restarts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_not_there_is_named_before_anything_is_loaded() {
    let mut config = crowded(KvDType::F16);
    config.kv.disk_folder = PathBuf::from("/no/such/folder");
    let built = Engine::builder().model(tiny_model_file()).config(config).build().await;
    match built.unwrap_err() {
        EngineError::Config(error) => assert_eq!(error.field, "kv.disk_folder"),
        other => panic!("{other}"),
    }
}
