//! Finds the tokens that are taken whole before anything else is cut: the longest of those that
//! start leftmost.

use super::TokenizerError;
use super::vocabulary::{TokenKind, Vocabulary};
use crate::request::ParseSpecial;
use crate::units::TokenId;
use aho_corasick::{AhoCorasick, Input, MatchKind};
use std::ops::Range;

/// A part of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fragment<'a> {
    /// Plain text, not empty.
    Text(&'a str),
    /// A token that the text spells.
    Token(TokenId),
}

struct Finder {
    automaton: AhoCorasick,
    ids: Vec<TokenId>,
}

/// Tokens that are found whole.
pub(super) struct SpecialTokens {
    /// Pieces of text that the vocabulary's makers added.
    user_defined: Finder,
    /// Tokens that steer the model.
    steering: Finder,
    /// Both.
    all: Finder,
}

impl Finder {
    fn new<'a>(found: impl Iterator<Item = (TokenId, &'a str)>) -> Result<Self, TokenizerError> {
        let (ids, texts): (Vec<_>, Vec<_>) = found.unzip();
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map_err(|error| TokenizerError::invalid("tokenizer.ggml.tokens", error.to_string()))?;
        Ok(Self { automaton, ids })
    }

    fn split<'a>(&self, text: &'a str, excluded: &[Range<usize>]) -> Vec<Fragment<'a>> {
        let mut fragments = Vec::new();
        let mut excluded = excluded.iter().peekable();
        // `done`: what is in fragments; `from`: where the search goes on.
        let (mut done, mut from) = (0, 0);
        while let Some(found) = self.automaton.find(Input::new(text).range(from..)) {
            while excluded.next_if(|span| span.end <= found.start()).is_some() {}
            if let Some(span) = excluded.peek().filter(|span| span.start < found.end()) {
                from = span.end;
                continue;
            }
            if found.start() > done {
                fragments.push(Fragment::Text(&text[done..found.start()]));
            }
            fragments.push(Fragment::Token(self.ids[found.pattern().as_usize()]));
            (done, from) = (found.end(), found.end());
        }
        if done < text.len() {
            fragments.push(Fragment::Text(&text[done..]));
        }
        fragments
    }
}

impl SpecialTokens {
    /// Of a vocabulary.
    pub(super) fn new(vocabulary: &Vocabulary) -> Result<Self, TokenizerError> {
        let tokens = || {
            let texts = vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate();
            texts.filter(|(_, (text, _))| !text.is_empty()).map(|(id, (text, kind))| {
                let id = TokenId(id as u32);
                (id, text.as_str(), *kind)
            })
        };
        let of = |wanted: &'static [TokenKind]| {
            tokens().filter(|(_, _, kind)| wanted.contains(kind)).map(|(id, text, _)| (id, text))
        };
        Ok(Self {
            user_defined: Finder::new(of(&[TokenKind::UserDefined]))?,
            steering: Finder::new(of(&[TokenKind::Control, TokenKind::Unknown]))?,
            all: Finder::new(of(&[
                TokenKind::UserDefined,
                TokenKind::Control,
                TokenKind::Unknown,
            ]))?,
        })
    }

    /// Finds the tokens that steer the model.
    pub(super) fn steering(&self) -> &AhoCorasick {
        &self.steering.automaton
    }

    /// The token that a text spells as a whole.
    pub(super) fn named(&self, name: &str) -> Option<TokenId> {
        let found = self.all.automaton.find(name).filter(|found| found.range() == (0..name.len()));
        found.map(|found| self.all.ids[found.pattern().as_usize()])
    }

    /// Cuts a text into tokens found whole and the text between them.
    pub(super) fn split<'a>(&self, text: &'a str, parse: ParseSpecial) -> Vec<Fragment<'a>> {
        match parse {
            ParseSpecial::No => self.user_defined.split(text, &[]),
            ParseSpecial::Yes => self.all.split(text, &[]),
        }
    }

    /// The same with all tokens, but none that touches one of the spans (ascending, in bytes).
    pub(super) fn split_chat<'a>(
        &self,
        text: &'a str,
        spans: &[Range<usize>],
    ) -> Vec<Fragment<'a>> {
        self.all.split(text, spans)
    }
}
