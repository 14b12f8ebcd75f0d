//! What a request's stream says, in order: `accepted`, `progress`*, `delta`*, one terminal event.

use super::RequestError;
use crate::step::TokenLogprob;
use crate::units::TokenId;
use serde::{Deserialize, Serialize};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// The client cancelled.
    Cancelled,
    /// `deadline_ms` passed.
    Deadline,
    /// The model calls a tool.
    ToolCalls,
}

/// What a progress event counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Bytes of weights.
    Load,
    /// Tokens of the prompt.
    Prefill,
}

/// One generated token with its text and probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenText {
    /// The token with its log-probability.
    pub token: TokenLogprob,
    /// The token's own text; bytes that are no UTF-8 by themselves come as U+FFFD.
    pub text: String,
    /// The most likely tokens, best first, with their texts.
    pub top: Vec<(TokenLogprob, String)>,
}

/// New text of one answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Delta {
    /// Which of the `n` answers.
    pub index: usize,
    /// Text that ends on a character's and a partial stop string's boundary.
    pub text: String,
    /// The tokens that have been decided since the last delta, in order.
    pub token_ids: Vec<TokenId>,
    /// The same with log-probabilities, when asked for.
    pub tokens: Option<Vec<TokenText>>,
}

/// Tokens that a request cost.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, all answers.
    pub completion_tokens: usize,
    /// Prompt tokens whose KV was found in the prefix cache.
    pub cached_tokens: usize,
    /// Drafted tokens that the model was asked about, all answers.
    #[serde(default)]
    pub draft_tokens: usize,
    /// Of these, tokens that it would have said itself.
    #[serde(default)]
    pub draft_tokens_accepted: usize,
}

/// Where a request's time went, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Timings {
    /// Submission to the first step that works on it.
    pub queue_ms: f64,
    /// That step to the first token.
    pub prefill_ms: f64,
    /// First token to last.
    pub decode_ms: f64,
    /// Submission to the end.
    pub total_ms: f64,
}

/// The end of a healthy stream.
#[derive(Clone, Debug, PartialEq)]
pub struct DoneEvent {
    /// Per answer, why it ended (`n` entries).
    pub finish_reasons: Vec<FinishReason>,
    /// Tokens that it cost.
    pub usage: Usage,
    /// Where its time went.
    pub timings: Timings,
    /// Everything that was not done exactly as asked, in words.
    pub warnings: Vec<String>,
}

/// One event of a request's stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The request is valid and queued.
    Accepted {
        /// Requests before it.
        queue_position: usize,
        /// Tokens of its prompt.
        prompt_tokens: usize,
    },
    /// Work before the first token.
    Progress {
        /// What is counted.
        phase: Phase,
        /// Done so far.
        done: u64,
        /// Done when finished.
        total: u64,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: usize,
    },
    /// Log-probabilities of the prompt's tokens from the second on, when asked for.
    PromptLogprobs(Vec<TokenText>),
    /// New text.
    Delta(Delta),
    /// Terminal: all answers ended.
    Done(DoneEvent),
    /// Terminal: the request failed.
    Failed(RequestError),
}

impl Event {
    /// Whether nothing follows.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Done(_) | Self::Failed(_))
    }
}
