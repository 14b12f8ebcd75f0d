//! Prompt lookup: text repeats itself, above all where a text is to be changed, quoted or continued
//! in its own form.

use crate::units::TokenId;

/// Looks up what followed the same tokens before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Fewest last tokens that have to be equal, at least 1.
    pub ngram_min: usize,
    /// Most last tokens that are compared, at least `ngram_min`.
    pub ngram_max: usize,
}

impl Lookup {
    /// Writes up to `count` tokens into `draft`: those that followed the latest of the longest
    /// runs that equal the end of `tokens`. How many tokens were equal; 0 and no draft where fewer
    /// than `ngram_min` are.
    ///
    /// A run that reaches the end goes on into its own draft, so that a repetition of any period
    /// fills it. Time is proportional to `tokens`, without allocation if `draft` has the room.
    pub fn propose(&self, tokens: &[TokenId], count: usize, draft: &mut Vec<TokenId>) -> usize {
        draft.clear();
        let (end, matched) = self.longest(tokens);
        if matched == 0 {
            return 0;
        }
        for next in end..end + count {
            let token = tokens.get(next).copied().unwrap_or_else(|| draft[next - tokens.len()]);
            draft.push(token);
        }
        matched
    }

    /// Where the latest of the longest equal runs ends, and how long it is.
    fn longest(&self, tokens: &[TokenId]) -> (usize, usize) {
        let Some((last, before)) = tokens.split_last() else { return (0, 0) };
        let mut best = (0, 0);
        let mut until = before.len();
        while let Some(at) = before[..until].iter().rposition(|token| token == last) {
            let matched = 1 + self.equal_before(before, at);
            if matched > best.1 {
                best = (at + 1, matched);
            }
            if matched == self.ngram_max {
                break;
            }
            until = at;
        }
        if best.1 >= self.ngram_min { best } else { (0, 0) }
    }

    /// How many tokens before `at` equal those at the end, as far as is compared.
    fn equal_before(&self, tokens: &[TokenId], at: usize) -> usize {
        let pairs = tokens[..at].iter().rev().zip(tokens.iter().rev());
        pairs.take(self.ngram_max - 1).take_while(|(one, other)| one == other).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(text: &str) -> Vec<TokenId> {
        text.bytes().map(|byte| TokenId(byte.into())).collect()
    }

    fn propose(lookup: Lookup, text: &str, count: usize) -> (String, usize) {
        let mut draft = Vec::new();
        let matched = lookup.propose(&tokens(text), count, &mut draft);
        (draft.iter().map(|token| char::from(token.0 as u8)).collect(), matched)
    }

    const LOOKUP: Lookup = Lookup { ngram_min: 2, ngram_max: 4 };

    #[test]
    fn what_followed_the_longest_and_latest_run_is_proposed() {
        for (text, wanted) in [
            ("abc-xbc+bc", ("+b", 2)),
            ("abcd1 bcd2 abcd", ("1 ", 4)),
            ("abcd1 abcd2 zabcd", ("2 ", 4)),
            ("abc", ("", 0)),
            ("aba", ("", 0)),
            ("a", ("", 0)),
            ("", ("", 0)),
        ] {
            let wanted = (wanted.0.to_owned(), wanted.1);
            assert_eq!(propose(LOOKUP, text, 2), wanted, "{text}");
        }
    }

    #[test]
    fn a_repetition_goes_on_beyond_the_end() {
        assert_eq!(propose(LOOKUP, "xyaaa", 5), ("aaaaa".to_owned(), 2));
        assert_eq!(propose(LOOKUP, "-abcabcabc", 7), ("abcabca".to_owned(), 4));
    }

    /// The definition, without any cleverness.
    fn naive(lookup: Lookup, tokens: &[TokenId], count: usize) -> (Vec<TokenId>, usize) {
        for length in (lookup.ngram_min..=lookup.ngram_max).rev() {
            for end in (length..tokens.len()).rev() {
                if tokens[end - length..end] == tokens[tokens.len() - length..] {
                    let mut all = tokens.to_vec();
                    (0..count).for_each(|index| all.push(all[end + index]));
                    return (all.split_off(tokens.len()), length);
                }
            }
        }
        (Vec::new(), 0)
    }

    proptest! {
        #[test]
        fn proposals_are_those_of_the_definition(
            text in prop::collection::vec(0u32..4, 0..60),
            min in 1usize..4,
            more in 0usize..4,
            count in 1usize..12,
        ) {
            let text: Vec<TokenId> = text.into_iter().map(TokenId).collect();
            let lookup = Lookup { ngram_min: min, ngram_max: min + more };
            let mut draft = Vec::new();
            let matched = lookup.propose(&text, count, &mut draft);
            prop_assert_eq!((draft, matched), naive(lookup, &text, count));
        }
    }
}
