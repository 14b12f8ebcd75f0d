//! Every way in which a request can fail, with the facts that the client is told. The table of
//! kinds, codes and HTTP statuses is `docs/protocol.md`'s.

use std::path::PathBuf;

/// The contract with clients: `data.kind` of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each variant is the protocol's word of the same name")]
pub enum ErrorKind {
    ParseError,
    InvalidRequest,
    MethodNotFound,
    InvalidParams,
    Internal,
    Cancelled,
    UnsupportedVersion,
    NotReady,
    ShuttingDown,
    Overloaded,
    ContextExceeded,
    InsufficientMemory,
    DeadlineExceeded,
    SlowConsumer,
    ModelNotFound,
    ModelInvalid,
    ModelLost,
    TokenizerInvalid,
    TemplateError,
    GrammarError,
    NumericError,
    GpuLost,
    GpuHung,
    ActorRestarted,
    PoisonRequest,
    Permission,
    FrameTooLarge,
    DuplicateId,
    SessionNotFound,
}

impl ErrorKind {
    /// Every kind with its name, JSON-RPC code, HTTP status and whether trying again can help.
    pub const TABLE: [(ErrorKind, &'static str, i32, u16, bool); 29] = [
        (ErrorKind::ParseError, "parse_error", -32700, 400, false),
        (ErrorKind::InvalidRequest, "invalid_request", -32600, 400, false),
        (ErrorKind::MethodNotFound, "method_not_found", -32601, 404, false),
        (ErrorKind::InvalidParams, "invalid_params", -32602, 400, false),
        (ErrorKind::Internal, "internal", -32603, 500, true),
        (ErrorKind::Cancelled, "cancelled", -32800, 499, false),
        (ErrorKind::UnsupportedVersion, "unsupported_version", 1001, 400, false),
        (ErrorKind::NotReady, "not_ready", 1002, 503, true),
        (ErrorKind::ShuttingDown, "shutting_down", 1003, 503, true),
        (ErrorKind::Overloaded, "overloaded", 1004, 429, true),
        (ErrorKind::ContextExceeded, "context_exceeded", 1101, 400, false),
        (ErrorKind::InsufficientMemory, "insufficient_memory", 1102, 503, true),
        (ErrorKind::DeadlineExceeded, "deadline_exceeded", 1103, 504, true),
        (ErrorKind::SlowConsumer, "slow_consumer", 1104, 499, true),
        (ErrorKind::ModelNotFound, "model_not_found", 1201, 404, false),
        (ErrorKind::ModelInvalid, "model_invalid", 1202, 422, false),
        (ErrorKind::ModelLost, "model_lost", 1203, 503, true),
        (ErrorKind::TokenizerInvalid, "tokenizer_invalid", 1204, 422, false),
        (ErrorKind::TemplateError, "template_error", 1301, 400, false),
        (ErrorKind::GrammarError, "grammar_error", 1302, 400, false),
        (ErrorKind::NumericError, "numeric_error", 1303, 500, false),
        (ErrorKind::GpuLost, "gpu_lost", 1401, 503, true),
        (ErrorKind::GpuHung, "gpu_hung", 1402, 503, true),
        (ErrorKind::ActorRestarted, "actor_restarted", 1403, 503, true),
        (ErrorKind::PoisonRequest, "poison_request", 1404, 500, false),
        (ErrorKind::Permission, "permission", 1501, 403, false),
        (ErrorKind::FrameTooLarge, "frame_too_large", 1502, 413, false),
        (ErrorKind::DuplicateId, "duplicate_id", 1503, 409, false),
        (ErrorKind::SessionNotFound, "session_not_found", 1504, 404, false),
    ];

    fn row(self) -> &'static (ErrorKind, &'static str, i32, u16, bool) {
        // TABLE is in declaration order; a unit test holds it there.
        &Self::TABLE[self as usize]
    }

    /// The protocol's word, such as `context_exceeded`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// JSON-RPC error code.
    pub fn code(self) -> i32 {
        self.row().2
    }

    /// HTTP status of the OpenAI-compatible edge.
    pub fn http_status(self) -> u16 {
        self.row().3
    }

    /// Whether the same request may succeed later.
    pub fn retryable(self) -> bool {
        self.row().4
    }
}

/// Why a request failed. The message says what came, what is allowed and what to do.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs, reason = "fields are the facts that the message spells out")]
pub enum RequestError {
    #[error("{field} is {got}; allowed: {allowed}")]
    InvalidParams { field: String, got: String, allowed: String },
    #[error(
        "the prompt has {prompt_tokens} tokens, the context holds {context_tokens}; shorten it"
    )]
    ContextExceeded { prompt_tokens: usize, context_tokens: usize },
    #[error("{device} lacks memory: {need} bytes needed, {free} free; {suggest}")]
    InsufficientMemory { device: String, need: u64, free: u64, suggest: String },
    #[error("the queue is full ({queue_depth} requests); try again in {retry_after_ms} ms")]
    Overloaded { queue_depth: usize, retry_after_ms: u64 },
    #[error("no first token within {deadline_ms} ms")]
    DeadlineExceeded { deadline_ms: u64 },
    #[error("the stream's window stayed full for {waited_ms} ms; read events faster")]
    SlowConsumer { waited_ms: u64 },
    #[error("no model {got:?} here; loaded: {}", loaded.join(", "))]
    ModelNotFound { got: String, loaded: Vec<String> },
    #[error("{}: {field} at byte {offset}: {message}", file.display())]
    ModelInvalid { file: PathBuf, offset: u64, field: String, message: String },
    #[error("the vocabulary is unusable: {field}: {message}")]
    TokenizerInvalid { field: String, message: String },
    #[error("chat template, line {line}: {message}")]
    TemplateError { line: usize, column: usize, message: String },
    #[error("the model's arithmetic gave a number that is not finite at position {position}")]
    NumericError { position: usize },
    #[error("cancelled by {by}")]
    Cancelled { by: String },
    #[error("the engine is not ready: {reason}")]
    NotReady { reason: String, retry_after_ms: u64 },
    #[error("the engine is shutting down")]
    ShuttingDown,
    #[error("the request was in flight at {crashes} crashes and is given up")]
    PoisonRequest { crashes: u32 },
    #[error("{actor} failed and could not be restarted ({restarts} restarts)")]
    ActorRestarted { actor: String, restarts: u32 },
    #[error("grammar, line {line}: {message}")]
    GrammarError { line: usize, column: usize, message: String },
    #[error("model {model} is gone: {reason}")]
    ModelLost { model: String, reason: String },
    #[error("{device} was lost ({class}); restarts so far: {restarts}")]
    GpuLost { device: String, class: String, restarts: u32 },
    #[error("{device} does not answer ({class}); restarts so far: {restarts}")]
    GpuHung { device: String, class: String, restarts: u32 },
    #[error("no session {got:?} here")]
    SessionNotFound { got: String },
    #[error("internal error: {message}")]
    Internal { message: String },
}

impl RequestError {
    /// The protocol's kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidParams { .. } => ErrorKind::InvalidParams,
            Self::ContextExceeded { .. } => ErrorKind::ContextExceeded,
            Self::InsufficientMemory { .. } => ErrorKind::InsufficientMemory,
            Self::Overloaded { .. } => ErrorKind::Overloaded,
            Self::DeadlineExceeded { .. } => ErrorKind::DeadlineExceeded,
            Self::SlowConsumer { .. } => ErrorKind::SlowConsumer,
            Self::ModelNotFound { .. } => ErrorKind::ModelNotFound,
            Self::ModelInvalid { .. } => ErrorKind::ModelInvalid,
            Self::TokenizerInvalid { .. } => ErrorKind::TokenizerInvalid,
            Self::TemplateError { .. } => ErrorKind::TemplateError,
            Self::NumericError { .. } => ErrorKind::NumericError,
            Self::Cancelled { .. } => ErrorKind::Cancelled,
            Self::NotReady { .. } => ErrorKind::NotReady,
            Self::ShuttingDown => ErrorKind::ShuttingDown,
            Self::PoisonRequest { .. } => ErrorKind::PoisonRequest,
            Self::ActorRestarted { .. } => ErrorKind::ActorRestarted,
            Self::GrammarError { .. } => ErrorKind::GrammarError,
            Self::ModelLost { .. } => ErrorKind::ModelLost,
            Self::GpuLost { .. } => ErrorKind::GpuLost,
            Self::GpuHung { .. } => ErrorKind::GpuHung,
            Self::SessionNotFound { .. } => ErrorKind::SessionNotFound,
            Self::Internal { .. } => ErrorKind::Internal,
        }
    }

    /// An [`RequestError::InvalidParams`] for a number outside its range.
    pub fn out_of_range(field: &str, got: f32, low: f32, high: f32) -> Self {
        Self::InvalidParams {
            field: field.to_owned(),
            got: got.to_string(),
            allowed: format!("{low} to {high}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_declaration_order() {
        for (index, row) in ErrorKind::TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, index, "{}", row.1);
        }
    }
}
