//! Owns the choice of the next token from a row of logits. It must not know models, sequences or
//! time: the same logits, parameters, tokens and position give the same token. The executor's last
//! stage calls it, one row at a time.
//!
//! The chain, in the order that llama.cpp's users know:
//! ```text
//! logits → log-probabilities that are reported (the model's own distribution)
//!        → logit bias → repetition, frequency, presence penalties → DRY
//!        → top-k → typical → top-p → min-p → temperature → draw by (seed, position)
//! ```
//! Truncations look at the distribution before temperature, each renormalised over what the ones
//! before it kept. At temperature 0 the best token after the penalties is taken.

mod penalties;
mod random;
mod shortlist;
mod softmax;
mod truncation;

pub use random::uniform;
pub use shortlist::Shortlist;

use crate::request::SamplingParams;
use crate::step::TokenLogprob;
use crate::units::TokenId;
use penalties::Penalties;
use truncation::Candidates;

/// A logit is NaN or infinite: the model's arithmetic went wrong.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the logit of token {token} is {value}")]
pub struct NonFinite {
    /// The first such token.
    pub token: TokenId,
    /// Its logit.
    pub value: f32,
}

/// A chosen or given token with what the model thought of it.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The token, with its log-probability before bias, penalties, truncation and temperature.
    pub token: TokenLogprob,
    /// The most likely tokens by that measure, best first, as many as asked for.
    pub top: Vec<TokenLogprob>,
}

/// Chooses tokens. Holds scratch for one vocabulary and allocates nothing per row besides the
/// reported alternatives; keep one per thread.
pub struct Sampler {
    vocab_size: usize,
    penalties: Penalties,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler with scratch for rows of `vocab_size` logits.
    pub fn new(vocab_size: usize) -> Self {
        Self {
            vocab_size,
            penalties: Penalties::new(vocab_size),
            candidates: Candidates::new(vocab_size),
        }
    }

    /// Chooses the next token. `logits` is `[vocab_size]` and is changed by bias and penalties.
    /// `history` is the sequence's tokens so far, the first `prompt_tokens` of them the prompt; it
    /// may be empty if no penalty is on. `position` is that of the token that is chosen; it and
    /// `params.seed` (0 if none) decide the draw.
    ///
    /// # Errors
    /// [`NonFinite`] if a logit is NaN or infinite.
    ///
    /// # Panics
    /// If `logits` has another length than the sampler was made for.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        params: &SamplingParams,
        history: &[TokenId],
        prompt_tokens: usize,
        position: usize,
    ) -> Result<SampledToken, NonFinite> {
        let row = self.measure(logits)?;
        let top = softmax::top(ids(logits), params.top_logprobs, row.log_sum);
        // The chosen token's own logit, read before bias and penalties change it.
        let logprob_of = |logits: &[f32], id: TokenId| logits[id.index()] - row.log_sum;
        if !params.change_logits() {
            let id = self.choose(logits, row.best, params, position);
            let token = TokenLogprob { id, logprob: logprob_of(logits, id) };
            return Ok(SampledToken { token, top });
        }
        let generated = history.get(prompt_tokens..).unwrap_or(&[]);
        self.penalties.apply(logits, params, history, generated);
        let best = softmax::best(logits);
        let id = self.choose(logits, best, params, position);
        let own = self.penalties.original(id).unwrap_or_else(|| logits[id.index()]);
        Ok(SampledToken { token: TokenLogprob { id, logprob: own - row.log_sum }, top })
    }

    /// The log-probability of a given token, and of the `top_logprobs` most likely ones.
    ///
    /// # Errors
    /// [`NonFinite`] if a logit is NaN or infinite.
    ///
    /// # Panics
    /// If `logits` has another length than the sampler was made for, or `target` is not in it.
    pub fn score(
        &mut self,
        logits: &[f32],
        target: TokenId,
        top_logprobs: usize,
    ) -> Result<SampledToken, NonFinite> {
        let row = self.measure(logits)?;
        let logprob = logits[target.index()] - row.log_sum;
        let top = softmax::top(ids(logits), top_logprobs, row.log_sum);
        Ok(SampledToken { token: TokenLogprob { id: target, logprob }, top })
    }

    /// Chooses the next token from the most likely ones alone, as [`Sampler::sample`] would from
    /// the whole row; none where others could matter. Bias and penalties are not applied.
    pub fn choose_listed(
        &mut self,
        list: &Shortlist<'_>,
        params: &SamplingParams,
        position: usize,
    ) -> Option<TokenId> {
        self.candidates.choose_listed(list, params, (self.vocab_size, draw(params, position)))
    }

    /// Tokens of the rows that it samples.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn measure(&self, logits: &[f32]) -> Result<softmax::Row, NonFinite> {
        assert_eq!(logits.len(), self.vocab_size, "logits of one row of the vocabulary");
        softmax::measure(logits)
    }

    fn choose(
        &mut self,
        logits: &[f32],
        best: TokenId,
        params: &SamplingParams,
        position: usize,
    ) -> TokenId {
        if params.takes_best() {
            return best;
        }
        self.candidates.choose(logits, best, params, draw(params, position))
    }
}

/// The random number, uniform in `[0, 1)`, that decides the token of a position.
pub fn draw(params: &SamplingParams, position: usize) -> f64 {
    uniform(params.seed.unwrap_or(0), position as u64)
}

fn ids(logits: &[f32]) -> impl ExactSizeIterator<Item = (TokenId, f32)> {
    logits.iter().enumerate().map(|(id, logit)| (TokenId(id as u32), *logit))
}
