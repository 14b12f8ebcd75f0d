//! The error object of the wire, and every failure in its words.

use super::json::brief;
use crate::request::{ErrorKind, RequestError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// What a client is told when something fails.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ErrorObject {
    /// JSON-RPC code of the kind.
    pub code: i32,
    /// What came, what is allowed, what to do: for people.
    pub message: String,
    /// For programs.
    pub data: ErrorData,
}

/// The part of an error that programs read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ErrorData {
    /// The contract: a word of the error table.
    pub kind: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// Facts of the kind.
    #[serde(flatten)]
    pub facts: Map<String, Value>,
}

impl ErrorObject {
    /// An error without facts.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            code: kind.code(),
            message: message.into(),
            data: ErrorData {
                kind: kind.name().to_owned(),
                retryable: kind.retryable(),
                facts: Map::new(),
            },
        }
    }

    /// The same with one fact more.
    pub fn with(mut self, fact: &str, value: impl Into<Value>) -> Self {
        self.data.facts.insert(fact.to_owned(), value.into());
        self
    }

    /// A line that is no JSON as the protocol reads it.
    pub fn parse_error(message: String) -> Self {
        Self::new(ErrorKind::ParseError, message)
    }

    /// JSON that is no request.
    pub fn invalid_request(field: &str, got: &str, allowed: &str) -> Self {
        Self::refusal(ErrorKind::InvalidRequest, field, got, allowed)
    }

    /// A parameter that is missing, of the wrong type or out of range.
    pub fn invalid_params(field: &str, got: &str, allowed: &str) -> Self {
        Self::refusal(ErrorKind::InvalidParams, field, got, allowed)
    }

    /// [`ErrorObject::invalid_params`] for a value at hand.
    pub fn invalid_value(field: &str, got: &Value, allowed: &str) -> Self {
        Self::invalid_params(field, &brief(got), allowed)
    }

    fn refusal(kind: ErrorKind, field: &str, got: &str, allowed: &str) -> Self {
        Self::new(kind, format!("{field} is {got}; allowed: {allowed}"))
            .with("field", field)
            .with("got", got)
            .with("allowed", allowed)
    }

    /// A line longer than the limit.
    pub fn frame_too_large(limit: usize) -> Self {
        let message = format!("a line is longer than {limit} bytes; the connection closes");
        Self::new(ErrorKind::FrameTooLarge, message).with("limit", limit)
    }

    /// An id that is in use on its connection.
    pub fn duplicate_id(id: &super::RequestId) -> Self {
        let message = format!("id {id} belongs to a live request of this connection");
        Self::new(ErrorKind::DuplicateId, message).with("id", id.to_json())
    }

    /// More than a limit of the server lets in.
    pub fn overloaded(what: &str, live: usize, limit: usize) -> Self {
        let message = format!("{live} {what}, at most {limit}; try again in {RETRY_AFTER_MS} ms");
        Self::new(ErrorKind::Overloaded, message)
            .with("retry_after_ms", RETRY_AFTER_MS)
            .with("queue_depth", live)
            .with("limit", limit)
    }

    /// The kind's word.
    pub fn kind(&self) -> &str {
        &self.data.kind
    }
}

/// What a client that meets a limit of the server is told to wait.
const RETRY_AFTER_MS: u64 = 1000;

impl std::fmt::Display for ErrorObject {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}: {}", self.data.kind, self.message)
    }
}

impl std::error::Error for ErrorObject {}

impl From<RequestError> for ErrorObject {
    fn from(error: RequestError) -> Self {
        let mut object = Self::new(error.kind(), error.to_string());
        if let Value::Object(facts) = facts(&error) {
            object.data.facts = facts;
        }
        object
    }
}

/// The fields of an error as the facts of `data`.
fn facts(error: &RequestError) -> Value {
    match error {
        RequestError::InvalidParams { field, got, allowed } => {
            json!({"field": field, "got": got, "allowed": allowed})
        }
        RequestError::ContextExceeded { prompt_tokens, context_tokens } => {
            json!({"prompt_tokens": prompt_tokens, "context_tokens": context_tokens})
        }
        RequestError::InsufficientMemory { device, need, free, suggest } => {
            json!({"device": device, "need": need, "free": free, "suggest": suggest})
        }
        RequestError::Overloaded { queue_depth, retry_after_ms } => {
            json!({"queue_depth": queue_depth, "retry_after_ms": retry_after_ms})
        }
        RequestError::DeadlineExceeded { deadline_ms } => json!({"deadline_ms": deadline_ms}),
        RequestError::SlowConsumer { waited_ms } => json!({"waited_ms": waited_ms}),
        RequestError::ModelNotFound { got, loaded } => json!({"got": got, "loaded": loaded}),
        RequestError::ModelInvalid { file, offset, field, message } => json!({
            "file": file.to_string_lossy(), "offset": offset, "field": field, "reason": message,
        }),
        RequestError::TokenizerInvalid { field, message } => {
            json!({"field": field, "reason": message})
        }
        RequestError::TemplateError { line, column, message }
        | RequestError::GrammarError { line, column, message } => {
            json!({"line": line, "column": column, "reason": message})
        }
        RequestError::NumericError { position } => json!({"position": position}),
        RequestError::Cancelled { by } => json!({"by": by}),
        RequestError::NotReady { reason, retry_after_ms } => {
            json!({"reason": reason, "retry_after_ms": retry_after_ms})
        }
        RequestError::ShuttingDown | RequestError::Internal { .. } => json!({}),
        RequestError::PoisonRequest { crashes } => json!({"crashes": crashes}),
        RequestError::ActorRestarted { actor, restarts } => {
            json!({"actor": actor, "restarts": restarts})
        }
        RequestError::ModelLost { model, reason } => json!({"model": model, "reason": reason}),
        RequestError::GpuLost { device, class, restarts }
        | RequestError::GpuHung { device, class, restarts } => {
            json!({"device": device, "class": class, "restarts": restarts})
        }
        RequestError::SessionNotFound { got } => json!({"got": got}),
    }
}
