//! Log-probabilities of a prompt's tokens, gathered by position until all are there.

use crate::request::TokenText;

/// The scores of positions `1 .. prompt_tokens`.
pub(super) struct PromptScores {
    /// `[prompt_tokens - 1]`, by position.
    scores: Vec<Option<TokenText>>,
    missing: usize,
}

impl PromptScores {
    pub(super) fn new(prompt_tokens: usize) -> Self {
        let count = prompt_tokens.saturating_sub(1);
        Self { scores: vec![None; count], missing: count }
    }

    /// Whether nothing is missing.
    pub(super) fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Keeps the score of a position. A second score of the same position, after a crash, is the
    /// same and is dropped.
    pub(super) fn put(&mut self, position: usize, score: TokenText) {
        if let Some(slot @ None) = position.checked_sub(1).and_then(|at| self.scores.get_mut(at)) {
            *slot = Some(score);
            self.missing -= 1;
        }
    }

    /// Takes all scores out, in order, if none is missing.
    pub(super) fn take(&mut self) -> Option<Vec<TokenText>> {
        self.is_complete().then(|| std::mem::take(&mut self.scores).into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::TokenLogprob;
    use crate::units::TokenId;

    fn score(id: u32) -> TokenText {
        let token = TokenLogprob { id: TokenId(id), logprob: -1.0 };
        TokenText { token, text: String::new(), top: Vec::new() }
    }

    #[test]
    fn scores_come_out_in_order_when_all_are_there() {
        let mut scores = PromptScores::new(3);
        scores.put(2, score(2));
        scores.put(2, score(2));
        scores.put(9, score(9));
        assert!(scores.take().is_none());
        scores.put(1, score(1));
        let ids: Vec<u32> = scores.take().unwrap().iter().map(|s| s.token.id.0).collect();
        assert_eq!(ids, [1, 2]);
    }

    #[test]
    fn a_prompt_of_one_token_has_no_scores() {
        assert_eq!(PromptScores::new(1).take(), Some(Vec::new()));
    }
}
