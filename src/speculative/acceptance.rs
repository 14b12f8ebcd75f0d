//! Which drafted tokens count, and how likely the next ones are to.

use crate::units::TokenId;

/// Equal tokens that are told apart; more are like this many.
const MATCHED_MAX: usize = 8;
/// Of an observation that much is left when the next one of its length comes: some twenty count.
const KEPT: f64 = 0.95;
/// What is expected of a length before it was seen, and so many observations it counts as.
const EXPECTED: [f64; MATCHED_MAX] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65];
const EXPECTED_WEIGHT: f64 = 3.0;

/// The rule: how many drafted tokens are what was sampled at their positions, up to the first that
/// is not. As many rows count, and the one after them, if it is there: its token is sampled behind
/// tokens that are all the model's own.
pub fn agreeing(draft: &[TokenId], sampled: impl Iterator<Item = TokenId>) -> usize {
    draft.iter().zip(sampled).take_while(|(drafted, sampled)| **drafted == *sampled).count()
}

/// How often one sequence went on as it had before, by how many of its last tokens were equal.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Chances {
    /// (observations, those that were right), older ones counting less.
    seen: [(f64, f64); MATCHED_MAX],
}

impl Chances {
    /// How likely the token after `matched` equal ones is the same again.
    pub fn after(&self, matched: usize) -> f64 {
        let index = index_of(matched);
        let (all, right) = self.seen[index];
        (right + EXPECTED_WEIGHT * EXPECTED[index]) / (all + EXPECTED_WEIGHT)
    }

    /// A token after `matched` equal ones was the same again, or was not.
    pub fn learn(&mut self, matched: usize, outcome: Outcome) {
        let (all, right) = &mut self.seen[index_of(matched)];
        *all = KEPT * *all + 1.0;
        *right = KEPT * *right + if outcome == Outcome::Right { 1.0 } else { 0.0 };
    }
}

/// What became of a proposed token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was sampled.
    Right,
    /// Another one was.
    Wrong,
}

fn index_of(matched: usize) -> usize {
    matched.clamp(1, MATCHED_MAX) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_count_up_to_the_first_that_was_not_sampled() {
        let tokens = |ids: &[u32]| ids.iter().copied().map(TokenId).collect::<Vec<_>>();
        for (draft, sampled, wanted) in [
            (&[1, 2, 3][..], &[1, 2, 3, 4][..], 3),
            (&[1, 2, 3], &[1, 9, 3, 4], 1),
            (&[1, 2, 3], &[9, 2, 3, 4], 0),
            (&[1, 2, 3], &[1, 2], 2),
            (&[1], &[], 0),
            (&[], &[7], 0),
        ] {
            let counted = agreeing(&tokens(draft), tokens(sampled).into_iter());
            assert_eq!(counted, wanted, "{draft:?} {sampled:?}");
        }
    }

    #[test]
    fn chances_follow_what_is_seen_and_forget() {
        let mut chances = Chances::default();
        (0..60).for_each(|_| chances.learn(3, Outcome::Right));
        assert!(chances.after(3) > 0.9, "{chances:?}");
        assert_eq!(chances.after(2), Chances::default().after(2));
        (0..60).for_each(|_| chances.learn(3, Outcome::Wrong));
        assert!(chances.after(3) < 0.1, "{chances:?}");
    }

    #[test]
    fn long_runs_are_one_kind() {
        let mut chances = Chances::default();
        (0..20).for_each(|_| chances.learn(50, Outcome::Right));
        assert_eq!(chances.after(MATCHED_MAX), chances.after(1_000));
        assert!(chances.after(MATCHED_MAX) > 0.9);
    }
}
