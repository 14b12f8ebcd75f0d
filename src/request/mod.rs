//! Words for what a client asks and what it gets back: request, sampling parameters, events,
//! errors. Knows no model, no socket and no thread. The server, the library and the actors speak
//! in it.

mod error;
mod event;
mod sampling;

pub use error::{ErrorKind, RequestError};
pub use event::{Delta, DoneEvent, Event, FinishReason, Phase, Timings, TokenText, Usage};
pub use sampling::{DryParams, SamplingParams};

use crate::units::TokenId;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// One message of a chat, in OpenAI's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or whatever the model's template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

/// What the model is to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Plain text.
    Text(String),
    /// Tokens, taken as they are.
    Tokens(Vec<TokenId>),
    /// A chat, rendered through the model's template.
    Chat(Vec<ChatMessage>),
}

/// Whether special tokens (BOS, EOS) are put around a text prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AddSpecial {
    /// As the model's metadata says.
    #[default]
    ModelDefault,
    /// Always.
    Yes,
    /// Never.
    No,
}

/// Whether text that spells a special token becomes that token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ParseSpecial {
    /// It stays text (the safe choice for what users write).
    #[default]
    No,
    /// It becomes the token.
    Yes,
}

/// Who goes first when there is not room for all.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Somebody waits.
    #[default]
    Interactive,
    /// Nobody waits: runs in the room that interactive requests leave.
    Batch,
}

/// One request to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Which model; `None` is the engine's only one.
    pub model: Option<String>,
    /// What to continue.
    pub input: Input,
    /// BOS and EOS around a text prompt.
    pub add_special: AddSpecial,
    /// Special tokens inside a text prompt.
    pub parse_special: ParseSpecial,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// At most so many new tokens; `None` is up to the context's end.
    pub max_tokens: Option<usize>,
    /// Generation ends before any of these texts, which are not part of the answer.
    pub stop: Vec<String>,
    /// Generation ends at any of these tokens, besides the model's own end tokens.
    pub stop_token_ids: Vec<TokenId>,
    /// The model's own end tokens do not end the answer.
    pub ignore_eos: bool,
    /// Number of independent answers, 1..=[`Request::ANSWERS_MAX`].
    pub n: usize,
    /// `Some(k)`: every token comes with its log-probability and those of the `k` most likely.
    pub logprobs: Option<usize>,
    /// `Some(k)`: the same for the prompt's tokens (from the second on).
    pub prompt_logprobs: Option<usize>,
    /// Queue class.
    pub priority: Priority,
    /// The whole answer is wanted within this time of submission; then it ends as `deadline`.
    pub deadline: Option<Duration>,
    /// The first token is wanted within this time, else the request fails.
    pub ttft_deadline: Option<Duration>,
}

impl Request {
    /// Most alternatives that `logprobs` reports.
    pub const TOP_LOGPROBS_MAX: usize = 20;
    /// Most answers of one request.
    pub const ANSWERS_MAX: usize = 16;
    /// Most stop strings of one request.
    pub const STOP_STRINGS_MAX: usize = 16;
    /// Most bytes of a stop string: each costs nine while the request runs.
    pub const STOP_BYTES_MAX: usize = 1 << 16;
    /// Most stop tokens of one request: every new token is held against all of them.
    pub const STOP_TOKENS_MAX: usize = 1024;

    /// A request with every other field at its default.
    pub fn new(input: Input) -> Self {
        Self {
            model: None,
            input,
            add_special: AddSpecial::default(),
            parse_special: ParseSpecial::default(),
            sampling: SamplingParams::default(),
            max_tokens: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            n: 1,
            logprobs: None,
            prompt_logprobs: None,
            priority: Priority::default(),
            deadline: None,
            ttft_deadline: None,
        }
    }

    /// A request that continues a text.
    pub fn text(prompt: impl Into<String>) -> Self {
        Self::new(Input::Text(prompt.into()))
    }

    /// A request that answers a chat.
    pub fn chat(messages: Vec<ChatMessage>) -> Self {
        Self::new(Input::Chat(messages))
    }

    /// Sets the bound on new tokens.
    pub fn max_tokens(mut self, tokens: usize) -> Self {
        self.max_tokens = Some(tokens);
        self
    }

    /// Sets the sampling parameters.
    pub fn sampling(mut self, sampling: SamplingParams) -> Self {
        self.sampling = sampling;
        self
    }

    /// Checks every field that can be checked without a model: ranges, counts, NaN.
    ///
    /// # Errors
    /// [`RequestError::InvalidParams`] naming the first offending field, what came and what is
    /// allowed.
    pub fn validate(&self) -> Result<(), RequestError> {
        self.sampling.validate()?;
        let refuse = |field: &str, got: String, allowed: String| {
            Err(RequestError::InvalidParams { field: field.to_owned(), got, allowed })
        };
        if !(1..=Self::ANSWERS_MAX).contains(&self.n) {
            return refuse("n", self.n.to_string(), format!("1 to {}", Self::ANSWERS_MAX));
        }
        for (field, value) in
            [("top_logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)]
        {
            if let Some(k) = value.filter(|k| *k > Self::TOP_LOGPROBS_MAX) {
                return refuse(field, k.to_string(), format!("0 to {}", Self::TOP_LOGPROBS_MAX));
            }
        }
        if self.stop.len() > Self::STOP_STRINGS_MAX {
            let allowed = format!("at most {} strings", Self::STOP_STRINGS_MAX);
            return refuse("stop", format!("{} strings", self.stop.len()), allowed);
        }
        if self.stop.iter().any(String::is_empty) {
            return refuse("stop", "an empty string".into(), "strings of at least one byte".into());
        }
        if let Some(long) = self.stop.iter().find(|stop| stop.len() > Self::STOP_BYTES_MAX) {
            let allowed = format!("strings of at most {} bytes", Self::STOP_BYTES_MAX);
            return refuse("stop", format!("a string of {} bytes", long.len()), allowed);
        }
        if self.stop_token_ids.len() > Self::STOP_TOKENS_MAX {
            let allowed = format!("at most {} tokens", Self::STOP_TOKENS_MAX);
            return refuse(
                "stop_token_ids",
                format!("{} tokens", self.stop_token_ids.len()),
                allowed,
            );
        }
        if self.max_tokens == Some(0) && self.prompt_logprobs.is_none() {
            return refuse("max_tokens", "0".into(), "at least 1".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(field: &str, spoil: impl FnOnce(&mut Request)) {
        let mut request = Request::text("Hello");
        request.validate().unwrap();
        spoil(&mut request);
        match request.validate() {
            Err(RequestError::InvalidParams { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }

    #[test]
    fn lists_and_texts_that_cost_memory_or_time_are_bounded() {
        let long = |bytes: usize| vec!["x".repeat(bytes + 1)];
        refused("stop", |request| request.stop = long(Request::STOP_BYTES_MAX));
        refused("stop_token_ids", |request| {
            request.stop_token_ids = vec![TokenId(0); Request::STOP_TOKENS_MAX + 1];
        });
        refused("dry_sequence_breakers", |request| {
            request.sampling.dry.sequence_breakers = long(SamplingParams::DRY_BREAKER_BYTES_MAX);
        });
    }
}
