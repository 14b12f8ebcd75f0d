//! The most likely tokens of a row of logits that lies elsewhere, in a GPU's memory: mostly all
//! that a choice needs.

use super::softmax;
use crate::step::TokenLogprob;
use crate::units::TokenId;

/// A part of a row: every token that is not in it has a smaller logit than every one that is.
#[derive(Clone, Copy, Debug)]
pub struct Shortlist<'a> {
    /// Tokens with their logits, ascending by id; not empty.
    pub tokens: &'a [(TokenId, f32)],
    /// How far below the largest logit all other tokens' lie at least, in nats.
    pub others_below: f32,
    /// Σ exp(logit − largest) over the whole row; only looked at for a top-p without a top-k.
    pub total: f64,
}

impl Shortlist<'_> {
    /// The `count` most likely tokens, best first, if they are in it; `log_sum` is the row's.
    pub fn top(
        &self,
        count: usize,
        (vocab_size, log_sum): (usize, f32),
    ) -> Option<Vec<TokenLogprob>> {
        let suffices = self.tokens.len() >= count.min(vocab_size);
        suffices.then(|| softmax::top(self.tokens.iter().copied(), count, log_sum))
    }

    /// The logit of a token that is in it.
    pub fn logit(&self, id: TokenId) -> Option<f32> {
        let at = self.tokens.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        Some(self.tokens[at].1)
    }

    pub(super) fn largest(&self) -> f32 {
        self.tokens.iter().map(|(_, logit)| *logit).fold(f32::NEG_INFINITY, f32::max)
    }

    /// What exp(logit − largest) of no other token exceeds; 0 if there is none.
    pub(super) fn weight_of_others(&self, vocab_size: usize) -> f32 {
        if self.tokens.len() >= vocab_size {
            return 0.0;
        }
        // The exponential of either may be off by 2e-7 of it.
        softmax::exp_nonpositive(-self.others_below) * (1.0 + 1e-6)
    }
}
