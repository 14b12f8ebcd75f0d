//! The parameters of every method, as types: their JSON Schemas are what `describe` returns and
//! what requests are checked against. The text methods' become a [`Request`] here. The longest
//! time that a client can name is seven days.

use super::ErrorObject;
use super::RequestId;
use crate::request::{
    AddSpecial, ChatMessage, Input, ParseSpecial, Priority, Request, RequestError, SamplingParams,
};
use crate::units::TokenId;
use schemars::JsonSchema;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// A method that takes none.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub struct NoParams {}

/// `generate`: continues a text. Either `prompt` or `prompt_tokens`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub struct GenerateParams {
    /// The text to continue.
    pub prompt: Option<String>,
    /// Its tokens, taken as they are.
    #[schemars(length(min = 1))]
    pub prompt_tokens: Option<Vec<u32>>,
    /// How.
    #[serde(flatten)]
    pub options: GenerationParams,
}

/// `chat`: answers a chat through the model's template.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct ChatParams {
    /// The chat so far, oldest first.
    #[schemars(length(min = 1))]
    pub messages: Vec<ChatMessage>,
    /// How to answer.
    #[serde(flatten)]
    pub options: GenerationParams,
}

/// Generation ends before any of these texts.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum StopParam {
    /// One text.
    One(#[schemars(length(min = 1))] String),
    /// Several.
    Many(#[schemars(length(max = 16), inner(length(min = 1)))] Vec<String>),
}

/// What `generate` and `chat` share. An absent field or `null` is the default.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub struct GenerationParams {
    /// Which model; default: the only one.
    pub model: Option<String>,
    /// At most so many new tokens per answer; default: up to the context's end. 0 only scores the
    /// prompt, together with `prompt_logprobs`.
    #[schemars(range(max = 4_294_967_295_u64))]
    pub max_tokens: Option<usize>,
    /// Divides the logits; 0 is greedy; default 1.
    #[schemars(range(min = 0, max = 100))]
    pub temperature: Option<f32>,
    /// Keep the most likely tokens; 0 keeps all, the default.
    #[schemars(range(max = 4_294_967_295_u64))]
    pub top_k: Option<usize>,
    /// Keep the most likely tokens whose mass reaches this; default 1.
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub top_p: Option<f32>,
    /// Keep tokens at least this times as likely as the best; default 0.
    #[schemars(range(min = 0, max = 1))]
    pub min_p: Option<f32>,
    /// Locally typical sampling: mass kept; default 1.
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub typical_p: Option<f32>,
    /// Decides all random choices; default: drawn anew for every request.
    pub seed: Option<u64>,
    /// Generation ends before these texts, which are not part of the answer.
    pub stop: Option<StopParam>,
    /// Generation ends at these tokens, besides the model's own end tokens.
    #[schemars(length(max = 1024))]
    pub stop_token_ids: Option<Vec<u32>>,
    /// The model's own end tokens do not end the answer; default false.
    pub ignore_eos: Option<bool>,
    /// Divides positive and multiplies negative logits of tokens seen; default 1.
    #[schemars(range(min = 0.01, max = 100))]
    pub repetition_penalty: Option<f32>,
    /// Subtracted once per occurrence among the generated tokens; default 0.
    #[schemars(range(min = -2, max = 2))]
    pub frequency_penalty: Option<f32>,
    /// Subtracted once if a token was generated at all; default 0.
    #[schemars(range(min = -2, max = 2))]
    pub presence_penalty: Option<f32>,
    /// How many of the last tokens `repetition_penalty` looks at; default: all.
    #[schemars(range(max = 4_294_967_295_u64))]
    pub penalty_last_n: Option<usize>,
    /// Strength of the DRY repetition penalty in logits; default 0.
    #[schemars(range(min = 0, max = 100))]
    pub dry_multiplier: Option<f32>,
    /// Growth of the DRY penalty per token of repeat; default 1.75.
    #[schemars(range(min = 1, max = 100))]
    pub dry_base: Option<f32>,
    /// Repeats up to this length cost nothing; default 2.
    #[schemars(range(max = 4_294_967_295_u64))]
    pub dry_allowed_length: Option<usize>,
    /// How many of the last tokens DRY searches; default: all.
    #[schemars(range(max = 4_294_967_295_u64))]
    pub dry_penalty_last_n: Option<usize>,
    /// Repeats do not reach across these texts; default: newline, colon, quote, asterisk.
    #[schemars(length(max = 32), inner(length(min = 1)))]
    pub dry_sequence_breakers: Option<Vec<String>>,
    /// Added to the logits of single tokens: token id (decimal, as a key) to bias.
    #[schemars(extend(
        "maxProperties" = 1024,
        "additionalProperties" = {"type": "number", "minimum": -100, "maximum": 100}
    ))]
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Every token comes with its log-probability; default false.
    pub logprobs: Option<bool>,
    /// So many of the most likely tokens come with it; needs `logprobs`; default 0.
    #[schemars(range(max = 20))]
    pub top_logprobs: Option<usize>,
    /// The prompt's tokens come with log-probabilities, and so many alternatives each.
    #[schemars(range(max = 20))]
    pub prompt_logprobs: Option<usize>,
    /// Independent answers; default 1.
    #[schemars(range(min = 1, max = 16))]
    pub n: Option<usize>,
    /// Events as they happen, the default, or one `result` at the end.
    pub stream: Option<bool>,
    /// Text that spells a special token becomes that token; default false.
    pub parse_special: Option<bool>,
    /// Special tokens (BOS, EOS) around a text prompt; default: as the model's metadata says.
    pub add_special: Option<bool>,
    /// Who goes first when there is not room for all; default `interactive`.
    pub priority: Option<Priority>,
    /// The whole answer is wanted within this time; then it ends as `deadline`.
    #[schemars(range(min = 1, max = 604_800_000))]
    pub deadline_ms: Option<u64>,
    /// The first token is wanted within this time, else the request fails.
    #[schemars(range(min = 1, max = 604_800_000))]
    pub ttft_deadline_ms: Option<u64>,
    /// A session to go on with; none exists in this version: `session_not_found`.
    pub session: Option<String>,
}

/// `tokenize`.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct TokenizeParams {
    /// The text.
    pub text: String,
    /// Which model's vocabulary; default: the only one.
    pub model: Option<String>,
    /// Special tokens (BOS, EOS) around it; default: as the model's metadata says.
    pub add_special: Option<bool>,
    /// Text that spells a special token becomes that token; default false.
    pub parse_special: Option<bool>,
}

/// `detokenize`.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct DetokenizeParams {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Which model's vocabulary; default: the only one.
    pub model: Option<String>,
}

/// `models.plan`.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct PlanParams {
    /// Which model; default: the only one.
    pub model: Option<String>,
}

/// `cancel`.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct CancelParams {
    /// The live request of this connection that is to end.
    pub id: RequestId,
}

/// `stats.subscribe`.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct SubscribeParams {
    /// Time between two reports; default 1000.
    #[schemars(range(min = 100, max = 3_600_000))]
    pub interval_ms: Option<u64>,
}

/// `shutdown`.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct ShutdownParams {
    /// How long running requests may go on; default: the configured time.
    #[schemars(range(max = 604_800_000))]
    pub drain_ms: Option<u64>,
}

/// Whether a whole answer is wanted at the end, or its parts as they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Events.
    Stream,
    /// One result.
    Whole,
}

/// How special tokens are to be added, from the wire's optional boolean.
pub fn add_special(wanted: Option<bool>) -> AddSpecial {
    match wanted {
        None => AddSpecial::ModelDefault,
        Some(true) => AddSpecial::Yes,
        Some(false) => AddSpecial::No,
    }
}

/// How special tokens in a text are to be read, from the wire's optional boolean.
pub fn parse_special(wanted: Option<bool>) -> ParseSpecial {
    if wanted == Some(true) { ParseSpecial::Yes } else { ParseSpecial::No }
}

impl GenerateParams {
    /// The request, and how its answer is delivered.
    ///
    /// # Errors
    /// `invalid_params`: no input or two, or fields that contradict each other.
    pub fn into_request(self) -> Result<(Request, Delivery), ErrorObject> {
        let input = match (self.prompt, self.prompt_tokens) {
            (Some(text), None) => Input::Text(text),
            (None, Some(tokens)) => Input::Tokens(tokens.into_iter().map(TokenId).collect()),
            (None, None) => {
                let allowed = "a string, or prompt_tokens";
                return Err(ErrorObject::invalid_params("prompt", "missing", allowed));
            }
            (Some(_), Some(_)) => {
                let allowed = "one of prompt and prompt_tokens";
                return Err(ErrorObject::invalid_params("prompt_tokens", "there too", allowed));
            }
        };
        self.options.into_request(input)
    }
}

impl ChatParams {
    /// The request, and how its answer is delivered.
    ///
    /// # Errors
    /// `invalid_params`: fields that contradict each other.
    pub fn into_request(self) -> Result<(Request, Delivery), ErrorObject> {
        self.options.into_request(Input::Chat(self.messages))
    }
}

impl GenerationParams {
    fn into_request(mut self, input: Input) -> Result<(Request, Delivery), ErrorObject> {
        if let Some(got) = self.session.take() {
            return Err(RequestError::SessionNotFound { got }.into());
        }
        let delivery = if self.stream == Some(false) { Delivery::Whole } else { Delivery::Stream };
        let mut request = Request::new(input);
        request.logprobs = self.logprobs()?;
        request.sampling = self.sampling()?;
        request.model = self.model;
        request.add_special = add_special(self.add_special);
        request.parse_special = parse_special(self.parse_special);
        request.max_tokens = self.max_tokens;
        request.stop = match self.stop {
            None => Vec::new(),
            Some(StopParam::One(text)) => vec![text],
            Some(StopParam::Many(texts)) => texts,
        };
        let stop_tokens = self.stop_token_ids.unwrap_or_default();
        request.stop_token_ids = stop_tokens.into_iter().map(TokenId).collect();
        request.ignore_eos = self.ignore_eos.unwrap_or_default();
        request.n = self.n.unwrap_or(1);
        request.prompt_logprobs = self.prompt_logprobs;
        request.priority = self.priority.unwrap_or_default();
        request.deadline = self.deadline_ms.map(Duration::from_millis);
        request.ttft_deadline = self.ttft_deadline_ms.map(Duration::from_millis);
        request.validate()?;
        Ok((request, delivery))
    }

    fn logprobs(&self) -> Result<Option<usize>, ErrorObject> {
        match (self.logprobs.unwrap_or_default(), self.top_logprobs) {
            (true, top) => Ok(Some(top.unwrap_or_default())),
            (false, None | Some(0)) => Ok(None),
            (false, Some(top)) => {
                let allowed = "0, or logprobs: true with it";
                Err(ErrorObject::invalid_params("top_logprobs", &top.to_string(), allowed))
            }
        }
    }

    fn sampling(&mut self) -> Result<SamplingParams, ErrorObject> {
        let mut sampling = SamplingParams::default();
        let numbers = [
            (&mut sampling.temperature, self.temperature),
            (&mut sampling.top_p, self.top_p),
            (&mut sampling.min_p, self.min_p),
            (&mut sampling.typical_p, self.typical_p),
            (&mut sampling.repetition_penalty, self.repetition_penalty),
            (&mut sampling.frequency_penalty, self.frequency_penalty),
            (&mut sampling.presence_penalty, self.presence_penalty),
            (&mut sampling.dry.multiplier, self.dry_multiplier),
            (&mut sampling.dry.base, self.dry_base),
        ];
        for (field, wanted) in numbers {
            *field = wanted.unwrap_or(*field);
        }
        sampling.top_k = self.top_k.unwrap_or(sampling.top_k);
        sampling.penalty_last_n = self.penalty_last_n;
        let dry = &mut sampling.dry;
        dry.allowed_length = self.dry_allowed_length.unwrap_or(dry.allowed_length);
        dry.last_n = self.dry_penalty_last_n;
        if let Some(breakers) = self.dry_sequence_breakers.take() {
            dry.sequence_breakers = breakers;
        }
        sampling.seed = self.seed;
        sampling.logit_bias = logit_bias(self.logit_bias.take().unwrap_or_default())?;
        Ok(sampling)
    }
}

/// Keys are token ids as JSON writes numbers, so that no token can be named twice.
fn logit_bias(entries: BTreeMap<String, f32>) -> Result<Vec<(TokenId, f32)>, ErrorObject> {
    let read = |(key, bias): (String, f32)| match key.parse::<u32>() {
        Ok(token) if token.to_string() == key => Ok((TokenId(token), bias)),
        _ => {
            let got = format!("the key {}", super::json::brief_text(&key));
            Err(ErrorObject::invalid_params(
                "logit_bias",
                &got,
                "token ids as keys, such as \"13\"",
            ))
        }
    };
    entries.into_iter().map(read).collect()
}
