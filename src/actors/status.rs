//! What an engine says of itself: state, model, figures. Plain data that can cross a process
//! boundary.

use crate::telemetry::MetricsSnapshot;
use serde::Serialize;
use std::path::PathBuf;

/// Bytes of weights read, repacked and placed so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct LoadProgress {
    /// Done so far.
    pub done_bytes: u64,
    /// Done when the model is ready.
    pub total_bytes: u64,
}

/// Where an engine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EngineState {
    /// The model is being loaded; requests are refused as `not_ready`.
    Loading,
    /// Requests are served.
    Ready,
    /// Running requests may end, new ones are refused as `shutting_down`.
    Draining,
    /// Shut down as asked.
    Stopped,
    /// Given up: an actor failed too often, a GPU was lost or hung, or the model could not be
    /// loaded.
    Dead,
}

/// How often each kind of actor was restarted over the engine's whole life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct RestartCounts {
    /// The supervisor, and with it all of its children.
    pub supervisor: u64,
    /// Tokenizer threads.
    pub tokenizer: u64,
    /// Scheduler with its engine loop.
    pub scheduler: u64,
    /// Executor with its stage.
    pub executor: u64,
    /// The thread that copies KV blocks between tiers, and with it the lower tiers.
    pub kv_swap: u64,
    /// Turns of stream tasks that were done again.
    pub stream: u64,
}

/// One look at an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Status {
    /// Where it is in its life.
    pub state: EngineState,
    /// How far loading is.
    pub load: LoadProgress,
    /// How often actors were restarted.
    pub restarts: RestartCounts,
    /// Requests that are alive.
    pub requests_live: u64,
    /// Milliseconds since `build`.
    pub uptime_ms: u64,
    /// What runs the model: its GPUs, or the CPU and why. `None` until that is decided.
    pub runs_on: Option<String>,
    /// Why a dead engine is dead.
    pub reason: Option<String>,
}

/// What model an engine runs.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct ModelInfo {
    /// The name that clients use: the configured alias, else the file's name without its ending.
    pub name: String,
    /// The model's own name in its metadata.
    pub title: String,
    /// Its architecture, such as `llama`.
    pub architecture: String,
    /// The file.
    pub path: PathBuf,
    /// Entries of its vocabulary.
    pub vocab_tokens: usize,
    /// Longest sequence served here: prompt and answer together.
    pub context_tokens: usize,
    /// Longest sequence the model was trained for.
    pub context_tokens_max: usize,
    /// Its layers.
    pub layers: usize,
    /// Bytes of its weights in the file.
    pub weight_bytes: u64,
    /// Bytes of keys and values per token.
    pub kv_bytes_per_token: u64,
    /// What was not as the file asks, in words.
    pub warnings: Vec<String>,
}

/// The sequences of one engine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct SequenceCounts {
    /// Running: they hold KV blocks.
    pub running: usize,
    /// Waiting to be admitted.
    pub waiting: usize,
    /// Paused for a slow reader.
    pub paused: usize,
    /// Preempted since the engine's start.
    pub preemptions: u64,
}

/// The KV blocks of one engine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct BlockCounts {
    /// Blocks of the device's store.
    pub total: usize,
    /// Blocks that sequences hold.
    pub used: usize,
    /// Blocks kept only for their prefix: free when needed.
    pub cached: usize,
    /// Blocks of the host tier.
    pub host_total: usize,
    /// Blocks of the host tier that waiting sequences or copies hold.
    pub host_used: usize,
    /// Blocks of the host tier kept only for their prefix: free when needed.
    pub host_cached: usize,
    /// Blocks of the disk tier.
    pub disk_total: usize,
    /// Blocks of the disk tier that waiting sequences or copies hold.
    pub disk_used: usize,
    /// Blocks of the disk tier kept only for their prefix: free when needed.
    pub disk_cached: usize,
    /// Whether nothing more goes to the disk tier: it is full, or failed.
    pub disk_stopped: bool,
    /// Bytes of one block, in any tier.
    pub block_bytes: u64,
    /// Copies between tiers that have not ended.
    pub copies_under_way: usize,
}

/// Figures of one engine, since its start unless said otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct StatsSnapshot {
    /// State and restarts.
    pub status: Status,
    /// Counters and histograms.
    pub metrics: MetricsSnapshot,
    /// Sequences now.
    pub sequences: SequenceCounts,
    /// KV blocks now.
    pub blocks: BlockCounts,
}
