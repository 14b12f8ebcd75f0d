//! How the next token is chosen, as data. Ranges are checked here, once.

use super::RequestError;
use crate::units::TokenId;

/// DRY repetition penalty (p-e-w, text-generation-webui pull request 5677): a token that would
/// extend a repeat of length `n >= allowed_length` loses `multiplier * base^(n - allowed_length)`.
#[derive(Clone, Debug, PartialEq)]
pub struct DryParams {
    /// Strength in logits; 0 is off.
    pub multiplier: f32,
    /// Growth per token of repeat.
    pub base: f32,
    /// Repeats up to this length are free.
    pub allowed_length: usize,
    /// How many of the last tokens are searched; `None` is all.
    pub last_n: Option<usize>,
    /// Repeats do not reach across text that contains one of these strings.
    pub sequence_breakers: Vec<String>,
}

impl Default for DryParams {
    fn default() -> Self {
        Self {
            multiplier: 0.0,
            base: 1.75,
            allowed_length: 2,
            last_n: None,
            sequence_breakers: ["\n", ":", "\"", "*"].map(str::to_owned).to_vec(),
        }
    }
}

/// Sampling parameters of one request. The defaults sample from the model's own distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the `top_k` most likely; 0 keeps all.
    pub top_k: usize,
    /// Nucleus sampling: keep the most likely whose mass reaches `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the best; 0 keeps all.
    pub min_p: f32,
    /// Locally typical sampling (arXiv 2202.00666): mass kept; 1 keeps all.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen; 1 is off (CTRL, arXiv
    /// 1909.05858).
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence among the generated tokens; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once if the token was generated at all; 0 is off.
    pub presence_penalty: f32,
    /// How many of the last tokens `repetition_penalty` looks at; `None` is all.
    pub penalty_last_n: Option<usize>,
    /// DRY repetition penalty.
    pub dry: DryParams,
    /// Tokens that break a DRY repeat, resolved from `dry.sequence_breakers` by the tokenizer;
    /// ascending.
    pub dry_breaker_tokens: Vec<TokenId>,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Decides all random choices together with the position; `None` is drawn at submission.
    pub seed: Option<u64>,
    /// How many of the most likely tokens are reported per step.
    pub top_logprobs: usize,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_last_n: None,
            dry: DryParams::default(),
            dry_breaker_tokens: Vec::new(),
            logit_bias: Vec::new(),
            seed: None,
            top_logprobs: 0,
        }
    }
}

impl SamplingParams {
    /// Most entries of `logit_bias`.
    pub const LOGIT_BIAS_MAX: usize = 1024;
    /// Most DRY sequence breakers.
    pub const DRY_BREAKERS_MAX: usize = 32;
    /// Most bytes of a DRY sequence breaker: the automaton that looks for them in all tokens takes
    /// over 100 bytes for each.
    pub const DRY_BREAKER_BYTES_MAX: usize = 1024;

    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether the sampler has to see the sequence's tokens so far.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
            || self.dry.multiplier != 0.0
    }

    /// Whether the logits that are sampled differ from the model's.
    pub fn change_logits(&self) -> bool {
        self.needs_history() || !self.logit_bias.is_empty()
    }

    /// Whether no chance is involved.
    pub fn takes_best(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }

    /// Whether tokens are ruled out other than by their rank.
    pub fn truncates(&self) -> bool {
        self.typical_p < 1.0 || self.top_p < 1.0 || self.min_p > 0.0
    }

    /// Checks ranges and NaN.
    ///
    /// # Errors
    /// [`RequestError::InvalidParams`] naming the first offending field, what came and what is
    /// allowed.
    pub fn validate(&self) -> Result<(), RequestError> {
        let ranges: [(&str, f32, f32, f32); 9] = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, f32::MIN_POSITIVE, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("typical_p", self.typical_p, f32::MIN_POSITIVE, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("dry_multiplier", self.dry.multiplier, 0.0, 100.0),
            ("dry_base", self.dry.base, 1.0, 100.0),
        ];
        for (field, got, low, high) in ranges {
            if !(low..=high).contains(&got) {
                return Err(RequestError::out_of_range(field, got, low, high));
            }
        }
        if self.logit_bias.len() > Self::LOGIT_BIAS_MAX {
            return Err(RequestError::InvalidParams {
                field: "logit_bias".into(),
                got: format!("{} entries", self.logit_bias.len()),
                allowed: format!("at most {}", Self::LOGIT_BIAS_MAX),
            });
        }
        if let Some((_, got)) = self.logit_bias.iter().find(|(_, b)| !(-100.0..=100.0).contains(b))
        {
            return Err(RequestError::out_of_range("logit_bias", *got, -100.0, 100.0));
        }
        if self.dry.sequence_breakers.len() > Self::DRY_BREAKERS_MAX {
            return Err(RequestError::InvalidParams {
                field: "dry_sequence_breakers".into(),
                got: format!("{} strings", self.dry.sequence_breakers.len()),
                allowed: format!("at most {}", Self::DRY_BREAKERS_MAX),
            });
        }
        let long = |text: &&String| text.len() > Self::DRY_BREAKER_BYTES_MAX;
        if let Some(long) = self.dry.sequence_breakers.iter().find(long) {
            return Err(RequestError::InvalidParams {
                field: "dry_sequence_breakers".into(),
                got: format!("a string of {} bytes", long.len()),
                allowed: format!("strings of at most {} bytes", Self::DRY_BREAKER_BYTES_MAX),
            });
        }
        Ok(())
    }
}
