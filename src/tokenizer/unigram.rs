//! SentencePiece's unigram model (`t5`) through the `tokenizers` crate: the text is normalised by
//! the vocabulary's compiled rules, spaces become `▁`, and the segmentation with the best sum of
//! scores is taken.

use super::vocabulary::{TokenKind, Vocabulary};
use super::{SPACE_MARK, TokenizerError};
use crate::units::TokenId;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::Model;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;

/// Longest run of text that is segmented at once, in bytes: the search keeps 40 bytes per byte.
const RUN_BYTES_MAX: usize = 1 << 16;

pub(super) struct UnigramScores {
    model: Unigram,
    rules: Option<Precompiled>,
    space_prefix: bool,
    merge_spaces: bool,
}

impl UnigramScores {
    /// The `t5` kind.
    pub(super) fn new(vocabulary: &Vocabulary) -> Result<Self, TokenizerError> {
        if vocabulary.scores.is_empty() {
            return Err(TokenizerError::invalid("tokenizer.ggml.scores", "there are none"));
        }
        let unknown = vocabulary
            .roles
            .unknown
            .map(TokenId::index)
            .or_else(|| vocabulary.kinds.iter().position(|kind| *kind == TokenKind::Unknown));
        let Some(unknown) = unknown else {
            let message = "there is none, and a unigram model needs it";
            return Err(TokenizerError::invalid("tokenizer.ggml.unknown_token_id", message));
        };
        // Ids are places in the list, so what no text may become stays in it under a name with a
        // space, which normalised text never has.
        let mut entries: Vec<(String, f64)> =
            (0..vocabulary.tokens.len()).map(|id| (format!(" {id}"), 0.0)).collect();
        for (id, token) in vocabulary.spellable() {
            let score = f64::from(vocabulary.scores[id.index()]);
            entries[id.index()] = (token.to_owned(), score);
        }
        let model = Unigram::from(entries, Some(unknown), false)
            .map_err(|error| TokenizerError::invalid("tokenizer.ggml.tokens", error.to_string()))?;
        Ok(Self {
            model,
            rules: rules(&vocabulary.precompiled_charsmap)?,
            space_prefix: vocabulary.add_space_prefix.unwrap_or(false),
            merge_spaces: vocabulary.remove_extra_whitespaces,
        })
    }

    /// Appends the tokens of a run of plain text.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        let marked = self.mark_spaces(&self.normalise(text)?);
        for run in runs(&marked) {
            let tokens = self.model.tokenize(run).map_err(|error| {
                TokenizerError::invalid("tokenizer.ggml.tokens", error.to_string())
            })?;
            ids.extend(tokens.iter().map(|token| TokenId(token.id)));
        }
        Ok(())
    }

    fn normalise(&self, text: &str) -> Result<String, TokenizerError> {
        let Some(rules) = &self.rules else { return Ok(text.to_owned()) };
        // The rules are a double array out of the file; a bad link in it is an index out of bounds.
        catch_unwind(AssertUnwindSafe(|| rules.normalize_string(text))).map_err(|_| {
            TokenizerError::invalid("tokenizer.ggml.precompiled_charsmap", "has a broken link")
        })
    }

    /// Spaces become `▁`, one per word where runs are merged, and none at the end.
    fn mark_spaces(&self, text: &str) -> String {
        let mut marked = String::with_capacity(text.len() + SPACE_MARK.len());
        let mut in_word = false;
        let mut prefix = self.space_prefix;
        for character in text.chars() {
            if character != ' ' {
                if !in_word && (prefix || self.merge_spaces) {
                    marked.push_str(SPACE_MARK);
                }
                prefix = false;
                in_word = true;
                marked.push(character);
            } else {
                in_word = false;
                if !self.merge_spaces {
                    marked.push_str(SPACE_MARK);
                }
            }
        }
        marked
    }
}

fn rules(charsmap: &[u8]) -> Result<Option<Precompiled>, TokenizerError> {
    if charsmap.is_empty() {
        return Ok(None);
    }
    let refuse = || {
        let message = format!("{} bytes that are no normalisation rules", charsmap.len());
        TokenizerError::invalid("tokenizer.ggml.precompiled_charsmap", message)
    };
    Precompiled::from(charsmap).map(Some).map_err(|_| refuse())
}

/// The text in runs of bounded length that start at a word.
fn runs(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut end = rest.len();
        if end > RUN_BYTES_MAX {
            let limit = rest.floor_char_boundary(RUN_BYTES_MAX);
            let word = rest[..limit].rfind(SPACE_MARK).filter(|at| *at > 0);
            end = word.unwrap_or(limit);
        }
        let (run, after) = rest.split_at(end);
        rest = after;
        Some(run)
    })
}
