//! What the engine's tests share: a tiny model file, an engine on hash stages, ways to wait.

#![allow(dead_code, reason = "each test binary uses its part")]

#[path = "hash_stage.rs"]
pub mod hash_stage;
#[path = "../support/tiny_model.rs"]
pub mod tiny_model;

use hash_stage::{HashStages, SharedStages};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};
use tandem::actors::{Engine, Faults, Generation};
use tandem::config::Config;
use tandem::request::{Event, Input, Request, SamplingParams};
use tandem::units::TokenId;
use tiny_model::{Family, TinyModel};

static TINY: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // A test executable may run on another machine than cargo.
    std::fs::create_dir_all(folder).unwrap();
    let (path, mine) = (folder.join("tiny.gguf"), format!("tiny-{}.gguf", std::process::id()));
    // Several test binaries may write it at once: the last rename wins, all are the same.
    TinyModel::new(Family::Llama).write(&folder.join(&mine));
    std::fs::rename(folder.join(mine), &path).unwrap();
    path
});

/// A tiny llama with random weights.
pub fn tiny_model_file() -> PathBuf {
    TINY.clone()
}

/// Small queues and one tokenizer thread, so that limits are near.
pub fn config() -> Config {
    let mut config = Config::default();
    config.gpu.device = "off".into();
    config.cpu.threads = 1;
    config.cpu.pin = false;
    config.tokenizer.workers = 1;
    config.scheduler.sequences_max = 16;
    config.scheduler.queue_max = 64;
    config
}

/// An engine on hash stages, with what steers them.
pub struct Rig {
    pub engine: Engine,
    pub stages: Arc<HashStages>,
    pub faults: Arc<Faults>,
}

impl Rig {
    pub async fn new() -> Self {
        Self::with(config(), |_| {}).await
    }

    /// `arm` sees the faults before the engine starts.
    pub async fn with(config: Config, arm: impl FnOnce(&Faults)) -> Self {
        Self::with_stages(config, 0, arm).await
    }

    /// At most `starts_max` stages start, if that is not 0.
    pub async fn with_stages(config: Config, starts_max: usize, arm: impl FnOnce(&Faults)) -> Self {
        let faults = Arc::new(Faults::default());
        arm(&faults);
        let stages = Arc::new(HashStages {
            faults: Arc::clone(&faults),
            block_tokens: config.kv.block_tokens,
            starts_max,
            ..HashStages::default()
        });
        let engine = Engine::builder()
            .model(tiny_model_file())
            .config(config)
            .faults(Arc::clone(&faults))
            .stages(Arc::new(SharedStages(Arc::clone(&stages))))
            .build()
            .await
            .unwrap();
        Self { engine, stages, faults }
    }
}

/// A prompt of `count` tokens that differs by `number` from its first token on.
pub fn prompt(number: u32, count: usize) -> Vec<TokenId> {
    (0..count as u32).map(|at| TokenId((number * 31 + at * 7) % 250)).collect()
}

/// A request for exactly `count` tokens.
pub fn request(prompt: &[TokenId], count: usize) -> Request {
    let mut request = Request::new(Input::Tokens(prompt.to_vec())).max_tokens(count);
    request.ignore_eos = true;
    request.sampling(SamplingParams::greedy())
}

/// A stream read to its end.
#[derive(Debug, Default)]
pub struct Read {
    pub tokens: Vec<TokenId>,
    pub text: String,
    pub end: Option<Event>,
    pub events: Vec<Event>,
}

/// Reads a stream to its end and checks its order: accepted, progress, prompt scores, deltas, one
/// terminal event.
pub async fn read(mut generation: Generation) -> Read {
    let mut read = Read::default();
    while let Some(event) = generation.next().await {
        assert!(read.end.is_none(), "{event:?} after the end");
        match &event {
            Event::Delta(delta) => {
                read.tokens.extend(&delta.token_ids);
                read.text.push_str(&delta.text);
            }
            Event::Accepted { .. } => assert!(read.events.is_empty(), "accepted comes first"),
            Event::Progress { .. } | Event::PromptLogprobs(_) => {
                assert!(read.tokens.is_empty(), "progress comes before tokens");
            }
            Event::Done(_) | Event::Failed(_) => read.end = Some(event.clone()),
        }
        read.events.push(event);
    }
    read
}

/// Reads up to the first delta, which it returns the tokens of.
pub async fn first_tokens(generation: &mut Generation) -> Vec<TokenId> {
    loop {
        match generation.next().await.expect("a stream that goes on") {
            Event::Delta(delta) => return delta.token_ids,
            Event::Accepted { .. } | Event::Progress { .. } => {}
            other => panic!("{other:?} before any token"),
        }
    }
}

/// Waits for a condition that another thread brings about.
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let patience = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < patience, "never came: {what}");
        std::thread::yield_now();
    }
}
