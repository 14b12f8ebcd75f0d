//! Finds the tokens that are taken whole before anything else is cut: the longest of those that
//! start leftmost.

use super::TokenizerError;
use super::vocabulary::{TokenKind, Vocabulary};
use crate::request::ParseSpecial;
use crate::units::TokenId;
use aho_corasick::{AhoCorasick, MatchKind};

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
    /// Those and the ones that steer the model.
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
            all: Finder::new(of(&[
                TokenKind::UserDefined,
                TokenKind::Control,
                TokenKind::Unknown,
            ]))?,
        })
    }

    /// Cuts a text into tokens found whole and the text between them.
    pub(super) fn split<'a>(&self, text: &'a str, parse: ParseSpecial) -> Vec<Fragment<'a>> {
        let finder = match parse {
            ParseSpecial::No => &self.user_defined,
            ParseSpecial::Yes => &self.all,
        };
        let mut fragments = Vec::new();
        let mut done = 0;
        for found in finder.automaton.find_iter(text) {
            if found.start() > done {
                fragments.push(Fragment::Text(&text[done..found.start()]));
            }
            fragments.push(Fragment::Token(finder.ids[found.pattern().as_usize()]));
            done = found.end();
        }
        if done < text.len() {
            fragments.push(Fragment::Text(&text[done..]));
        }
        fragments
    }
}
