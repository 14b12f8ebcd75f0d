//! One sequence's draft: what is proposed, how much of that is planned, what came of it.

use super::Lookup;
use super::acceptance::{Chances, Outcome};
use crate::units::TokenId;

/// What is proposed for a sequence's next tokens, and how good such proposals were.
#[derive(Clone, Debug, Default)]
pub struct Draft {
    proposed: Vec<TokenId>,
    /// Tokens before the proposal that stood before its source, too.
    matched: usize,
    /// How many of the proposed tokens are in the step.
    planned: usize,
    chances: Chances,
}

impl Draft {
    /// A draft that takes up to `tokens_max` tokens without allocating.
    pub fn with_room(tokens_max: usize) -> Self {
        Self { proposed: Vec::with_capacity(tokens_max), ..Self::default() }
    }

    /// Proposes up to `count` tokens behind `tokens`, none of which is planned.
    pub fn propose(&mut self, lookup: &Lookup, tokens: &[TokenId], count: usize) {
        self.planned = 0;
        self.matched = lookup.propose(tokens, count, &mut self.proposed);
    }

    /// Proposes nothing from the first of these tokens on: what follows an end is never said.
    pub fn end_before(&mut self, end_tokens: &[TokenId]) {
        let end = self.proposed.iter().position(|token| end_tokens.contains(token));
        self.proposed.truncate(end.unwrap_or(self.proposed.len()));
    }

    /// Proposes nothing.
    pub fn clear(&mut self) {
        self.proposed.clear();
        self.planned = 0;
    }

    /// For each proposed token in order: how likely it and all before it are what the model says.
    pub fn chances(&self) -> impl Iterator<Item = f64> {
        let matched = (0..self.proposed.len()).map(|index| self.matched + index);
        matched.scan(1.0, |all, matched| {
            *all *= self.chances.after(matched);
            Some(*all)
        })
    }

    /// Plans the first `tokens` of the proposal.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn plan(&mut self, tokens: usize) {
        assert!(tokens <= self.proposed.len(), "{tokens} of {} tokens", self.proposed.len());
        self.planned = tokens;
    }

    /// The tokens that are planned.
    pub fn planned(&self) -> &[TokenId] {
        &self.proposed[..self.planned]
    }

    /// Learns from what was sampled where the proposal stood, whether planned or not; `sampled`
    /// ends with the first token that is another one.
    pub fn learn(&mut self, sampled: impl Iterator<Item = TokenId>) {
        for (index, (proposed, sampled)) in self.proposed.iter().zip(sampled).enumerate() {
            let is_right = *proposed == sampled;
            let outcome = if is_right { Outcome::Right } else { Outcome::Wrong };
            self.chances.learn(self.matched + index, outcome);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOKUP: Lookup = Lookup { ngram_min: 2, ngram_max: 4 };

    fn tokens(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    #[test]
    fn a_draft_that_is_not_run_is_learnt_from_as_well() {
        let mut draft = Draft::with_room(4);
        let before = {
            draft.propose(&LOOKUP, &tokens(&[1, 2, 3, 4, 1, 2]), 3);
            draft.chances().collect::<Vec<_>>()
        };
        assert_eq!(before.len(), 3);
        assert!(before.windows(2).all(|pair| pair[0] > pair[1]), "{before:?}");
        assert!(draft.planned().is_empty());
        for _ in 0..30 {
            draft.learn(tokens(&[3]).into_iter());
        }
        assert!(draft.chances().next().unwrap() > 0.8);
        for _ in 0..30 {
            draft.learn(tokens(&[9]).into_iter());
        }
        assert!(draft.chances().next().unwrap() < 0.3);
    }

    #[test]
    fn nothing_is_proposed_from_an_end_on() {
        let mut draft = Draft::with_room(4);
        draft.propose(&LOOKUP, &tokens(&[1, 2, 3, 4, 1, 2]), 3);
        draft.end_before(&tokens(&[9]));
        assert_eq!(draft.chances().count(), 3);
        draft.end_before(&tokens(&[9, 4]));
        draft.plan(1);
        assert_eq!((draft.planned(), draft.chances().count()), (&tokens(&[3])[..], 1));
    }

    #[test]
    fn what_is_planned_is_the_beginning_of_the_proposal() {
        let mut draft = Draft::with_room(4);
        draft.propose(&LOOKUP, &tokens(&[1, 2, 3, 4, 1, 2]), 3);
        draft.plan(2);
        assert_eq!(draft.planned(), tokens(&[3, 4]));
        draft.propose(&LOOKUP, &tokens(&[1, 2, 3, 4, 1, 2, 3]), 3);
        assert!(draft.planned().is_empty(), "a new proposal is not planned yet");
        draft.plan(3);
        draft.clear();
        assert_eq!((draft.planned().len(), draft.chances().count()), (0, 0));
    }
}
