//! The events of a stream as they stand on the wire.

use super::ErrorObject;
use crate::request::{Event, FinishReason, Phase, Timings, TokenText, Usage};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A token with its text and natural-log probability.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct WireTop {
    /// The token.
    pub id: u32,
    /// Its own text; bytes that are no UTF-8 by themselves come as U+FFFD.
    pub text: String,
    /// Natural logarithm of its probability under the model's own distribution; `null` if that is
    /// not finite.
    pub logprob: Option<f32>,
}

/// A token of the answer or of the prompt with its most likely alternatives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct WireToken {
    /// The token.
    pub id: u32,
    /// Its own text; bytes that are no UTF-8 by themselves come as U+FFFD.
    pub text: String,
    /// Natural logarithm of its probability under the model's own distribution; `null` if that is
    /// not finite.
    pub logprob: Option<f32>,
    /// The `top_logprobs` most likely tokens, best first.
    pub top: Vec<WireTop>,
}

impl From<TokenText> for WireToken {
    fn from(token: TokenText) -> Self {
        let finite = |logprob: f32| Some(logprob).filter(|value| value.is_finite());
        let top = token.top.into_iter().map(|(top, text)| WireTop {
            id: top.id.0,
            text,
            logprob: finite(top.logprob),
        });
        Self {
            id: token.token.id.0,
            text: token.text,
            logprob: finite(token.token.logprob),
            top: top.collect(),
        }
    }
}

fn wire_tokens(tokens: Vec<TokenText>) -> Vec<WireToken> {
    tokens.into_iter().map(WireToken::from).collect()
}

/// One event of a stream: `accepted`, `progress`*, `prompt_logprobs`?, `delta`*, then `done` or
/// `error`. A subscription's stream has `stats`* and ends with `error`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum WireEvent {
    /// The request is valid and queued.
    Accepted {
        /// Requests before it.
        queue_position: usize,
        /// Tokens of its prompt.
        prompt_tokens: usize,
        /// Fields of the request that were ignored.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        warnings: Vec<String>,
    },
    /// Work before the first token.
    Progress {
        /// What is counted: bytes of weights or tokens of the prompt.
        phase: Phase,
        /// Done so far.
        done: u64,
        /// Done when finished.
        total: u64,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: usize,
    },
    /// The prompt's tokens from the second on, when `prompt_logprobs` is set.
    PromptLogprobs {
        /// In order.
        tokens: Vec<WireToken>,
    },
    /// New text. It ends on a character's boundary and never inside a possible stop string.
    Delta {
        /// Which of the `n` answers.
        index: usize,
        /// The text.
        text: String,
        /// The tokens that were decided since the last delta.
        token_ids: Vec<u32>,
        /// The same with log-probabilities, when `logprobs` is set.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tokens: Option<Vec<WireToken>>,
    },
    /// Terminal: the answer ended.
    Done {
        /// Why the first answer ended.
        finish_reason: FinishReason,
        /// Why each answer ended, when `n` is more than 1.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        finish_reasons: Vec<FinishReason>,
        /// Tokens that it cost.
        usage: Usage,
        /// Where its time went, in milliseconds.
        timings: Timings,
        /// Everything that was not done exactly as asked.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        warnings: Vec<String>,
    },
    /// Terminal: the request failed.
    Error {
        /// Why.
        error: ErrorObject,
    },
    /// Figures of a subscription.
    Stats {
        /// What `stats.get` returns.
        stats: Value,
    },
}

impl WireEvent {
    /// Whether nothing follows.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Error { .. })
    }

    /// An engine's event. `warnings` are the request's own, about its fields; they go into
    /// `accepted` and again into `done`, before the engine's.
    pub fn from_engine(event: Event, warnings: &[String]) -> Self {
        match event {
            Event::Accepted { queue_position, prompt_tokens } => {
                Self::Accepted { queue_position, prompt_tokens, warnings: warnings.to_vec() }
            }
            Event::Progress { phase, done, total, cached_tokens } => {
                Self::Progress { phase, done, total, cached_tokens }
            }
            Event::PromptLogprobs(tokens) => Self::PromptLogprobs { tokens: wire_tokens(tokens) },
            Event::Delta(delta) => Self::Delta {
                index: delta.index,
                text: delta.text,
                token_ids: delta.token_ids.into_iter().map(|token| token.0).collect(),
                tokens: delta.tokens.map(wire_tokens),
            },
            Event::Done(done) => {
                let first = done.finish_reasons.first().copied();
                let several = done.finish_reasons.len() > 1;
                Self::Done {
                    finish_reason: first.unwrap_or(FinishReason::Stop),
                    finish_reasons: if several { done.finish_reasons } else { Vec::new() },
                    usage: done.usage,
                    timings: done.timings,
                    warnings: [warnings, &done.warnings].concat(),
                }
            }
            Event::Failed(error) => Self::Error { error: error.into() },
        }
    }
}
