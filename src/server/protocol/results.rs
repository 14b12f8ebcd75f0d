//! The results of every method as they stand on the wire, and the hello.

use super::WireToken;
use crate::actors::{ModelInfo, StatsSnapshot, Status};
use crate::request::{FinishReason, Timings, Usage};
use crate::server::engine_handle::ServiceState;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A version of the protocol. Minor versions only add.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Version {
    /// Incompatible changes.
    pub major: u32,
    /// Additions.
    pub minor: u32,
}

/// What a server takes; everything beyond is refused and named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Limits {
    /// Bytes of one inbound line without its line end.
    pub frame_bytes_max: usize,
    /// Nesting of one inbound line.
    pub json_depth_max: usize,
    /// JSON values in one inbound line, all depths.
    pub json_values_max: usize,
    /// Bytes of an `id`.
    pub id_bytes_max: usize,
    /// Open connections.
    pub connections_max: usize,
    /// Live requests of one connection.
    pub requests_per_connection_max: usize,
    /// Requests waiting in the engine.
    pub queue_max: usize,
    /// Unread events of one stream before it pauses.
    pub window_bytes: u64,
    /// How long a stream may stay paused before it ends as `slow_consumer`.
    pub slow_consumer_ms: u64,
}

/// The first line of every connection, from the server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Hello {
    /// What is spoken.
    pub protocol: Version,
    /// Name and version of the server.
    pub server: String,
    /// What this server can do beyond the protocol's first version.
    pub features: Vec<String>,
    /// What it takes.
    pub limits: Limits,
    /// Its process.
    pub pid: u32,
    /// This life of the server: another one has another id.
    pub boot_id: String,
    /// Names of the models served; empty while loading.
    pub models: Vec<String>,
}

/// `ping`.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PingResult {
    /// Always true.
    pub pong: bool,
}

/// `describe`.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DescribeResult {
    /// What is spoken.
    pub protocol: Version,
    /// By name: `params` and `result` as JSON Schemas, and whether it has `events`.
    pub methods: Value,
    /// JSON Schema of an event's `params`, without `id` and `seq`.
    pub events: Value,
    /// JSON Schema of the hello.
    pub hello: Value,
    /// The error table: `kind`, `code`, `http`, `retryable`.
    pub errors: Vec<ErrorRow>,
}

/// A row of the error table.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ErrorRow {
    /// The contract.
    pub kind: String,
    /// JSON-RPC code.
    pub code: i32,
    /// HTTP status of the same error.
    pub http: u16,
    /// Whether the same request may succeed later.
    pub retryable: bool,
}

/// `status`.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct StatusResult {
    /// Where the service is in its life.
    pub state: ServiceState,
    /// Name and version of the server.
    pub server: String,
    /// Its process.
    pub pid: u32,
    /// This life of the server.
    pub boot_id: String,
    /// Milliseconds since its start.
    pub uptime_ms: u64,
    /// Names of the models served.
    pub models: Vec<String>,
    /// Open connections, this one included.
    pub connections: usize,
    /// Live requests of all connections.
    pub requests_live: usize,
    /// The engine's own words.
    #[schemars(with = "Status")]
    pub engine: Value,
}

/// Figures of the server itself, since its start unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ServerStats {
    /// Open connections now.
    pub connections: usize,
    /// Connections accepted.
    pub connections_total: u64,
    /// Connections refused: too many, or not permitted.
    pub connections_refused: u64,
    /// Live requests now.
    pub requests_live: usize,
    /// Requests taken on.
    pub requests_total: u64,
    /// Lines answered with an error.
    pub errors_total: u64,
}

/// `stats.get`, and every report of `stats.subscribe`.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct StatsResult {
    /// The server's figures.
    pub server: ServerStats,
    /// The engine's figures.
    #[schemars(with = "StatsSnapshot")]
    pub engine: Value,
}

/// `stats.subscribe`: reports follow as events until `cancel` or disconnect.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct SubscribeResult {
    /// Time between two reports.
    pub interval_ms: u64,
}

/// `models.list`.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ModelsResult {
    /// Each with at least `name`; none while loading.
    #[schemars(with = "Vec<ModelInfo>")]
    pub models: Vec<Value>,
}

/// `models.plan`.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PlanResult {
    /// What lies where, in bytes.
    pub plan: Value,
}

/// One answer of a whole result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct WholeAnswer {
    /// Which of the `n` answers.
    pub index: usize,
    /// Its text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// The same with log-probabilities, when `logprobs` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<WireToken>>,
}

/// `generate` and `chat` with `stream: false`. With `stream: true` there is no result: events end
/// the request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct GenerationResult {
    /// The first answer.
    #[serde(flatten)]
    pub answer: WholeAnswer,
    /// All answers, when `n` is more than 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<WholeAnswer>,
    /// The prompt's tokens from the second on, when `prompt_logprobs` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<WireToken>>,
    /// Tokens that it cost.
    pub usage: Usage,
    /// Where its time went, in milliseconds.
    pub timings: Timings,
    /// Everything that was not done exactly as asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// `tokenize`.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct TokenizeResult {
    /// The tokens.
    pub tokens: Vec<u32>,
}

/// `detokenize`.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DetokenizeResult {
    /// The text; bytes that are no UTF-8 come as U+FFFD.
    pub text: String,
}

/// `cancel`.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CancelResult {
    /// Whether a live request of that id was told; its terminal event still comes.
    pub cancelled: bool,
}

/// `shutdown`.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ShutdownResult {
    /// How long running requests may go on.
    pub drain_ms: u64,
}
