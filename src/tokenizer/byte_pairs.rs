//! Byte pair encoding through the `tokenizers` crate: over GPT-2's byte characters, or over raw
//! UTF-8 with byte tokens for what is not in the vocabulary (Gemma 4).

use super::byte_level;
use super::pretokenizer::Pretokenizer;
use super::vocabulary::Vocabulary;
use super::{SPACE_MARK, TokenizerError};
use crate::units::TokenId;
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Merges, Vocab};

/// How a piece of text is spelled before its characters are merged.
enum Spelling {
    /// Every byte is a character (GPT-2). `present[b]`: the vocabulary has byte `b`.
    ByteCharacters { present: Box<[bool; 256]> },
    /// As it is, with `▁` for a space; characters that are no token become byte tokens.
    Raw,
}

/// Merges characters of pretokenized pieces by the vocabulary's list of merges.
pub(super) struct BytePairs {
    pretokenizer: Pretokenizer,
    spelling: Spelling,
    model: BPE,
}

const MERGES: &str = "tokenizer.ggml.merges";

impl BytePairs {
    /// The `gpt2` kind.
    pub(super) fn byte_level(vocabulary: &Vocabulary) -> Result<Self, TokenizerError> {
        let pretokenizer = Pretokenizer::named(vocabulary.pre.as_deref())?;
        let model = build(vocabulary, pretokenizer.whole_pieces, Vocab::default())?;
        let mut present = Box::new([false; 256]);
        for (byte, slot) in (0..=u8::MAX).zip(present.iter_mut()) {
            let spelled = byte_level::char_of(byte).to_string();
            *slot = model.token_to_id(&spelled).is_some();
        }
        if !present.contains(&true) {
            let message = "no token is a single byte; wanted: GPT-2's 256 byte characters";
            return Err(TokenizerError::invalid("tokenizer.ggml.tokens", message));
        }
        Ok(Self { pretokenizer, spelling: Spelling::ByteCharacters { present }, model })
    }

    /// The `gemma4` kind.
    pub(super) fn raw(vocabulary: &Vocabulary) -> Result<Self, TokenizerError> {
        let mut bytes = Vocab::default();
        for (byte, id) in vocabulary.byte_tokens().iter().enumerate() {
            let Some(id) = id else {
                let message = format!("no byte token <0x{byte:02X}>");
                return Err(TokenizerError::invalid("tokenizer.ggml.tokens", message));
            };
            bytes.insert(format!("<0x{byte:02X}>"), id.0);
        }
        let pretokenizer = Pretokenizer::lines()?;
        let model = build(vocabulary, false, bytes)?;
        Ok(Self { pretokenizer, spelling: Spelling::Raw, model })
    }

    /// Whether BOS comes first unless the metadata says otherwise.
    pub(super) fn adds_bos(&self) -> bool {
        self.pretokenizer.add_bos
    }

    /// Appends the tokens of a run of plain text.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        match &self.spelling {
            Spelling::ByteCharacters { present } => self.encode_bytes(text, present, ids),
            Spelling::Raw => self.encode_raw(text, ids),
        }
    }

    fn encode_bytes(
        &self,
        text: &str,
        present: &[bool; 256],
        ids: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        // Vocabularies leave out bytes that their training text never had, control characters say.
        // The crate would drop them without a word.
        let absent = text.bytes().position(|byte| !present[usize::from(byte)]);
        if let Some(offset) = absent {
            return Err(TokenizerError::Unencodable { byte: text.as_bytes()[offset], offset });
        }
        let mut spelled = String::new();
        for piece in self.pretokenizer.cut(text) {
            spelled.clear();
            byte_level::spell(&text[piece], &mut spelled);
            self.merge(&spelled, ids)?;
        }
        Ok(())
    }

    fn encode_raw(&self, text: &str, ids: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        let marked = text.replace(' ', SPACE_MARK);
        for piece in self.pretokenizer.cut(&marked) {
            let piece = &marked[piece];
            // Runs of line breaks are tokens that no merge makes.
            match self.model.token_to_id(piece).filter(|_| piece.starts_with('\n')) {
                Some(id) => ids.push(TokenId(id)),
                None => self.merge(piece, ids)?,
            }
        }
        Ok(())
    }

    fn merge(&self, spelled: &str, ids: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        let tokens = self
            .model
            .tokenize(spelled)
            .map_err(|error| TokenizerError::invalid(MERGES, error.to_string()))?;
        ids.extend(tokens.iter().map(|token| TokenId(token.id)));
        Ok(())
    }
}

/// Cuts `left right` at the space between them: the first one that is not the left part's own
/// first character.
fn halves(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let at = first + merge[first..].find(' ')?;
    Some((&merge[..at], &merge[at + 1..])).filter(|(_, right)| !right.is_empty())
}

fn build(
    vocabulary: &Vocabulary,
    whole_pieces: bool,
    mut tokens: Vocab,
) -> Result<BPE, TokenizerError> {
    let byte_fallback = !tokens.is_empty();
    tokens.extend(vocabulary.spellable().map(|(id, token)| (token.to_owned(), id.0)));
    if vocabulary.merges.is_empty() {
        return Err(TokenizerError::invalid(MERGES, "there are none"));
    }
    let mut merges: Merges = Vec::with_capacity(vocabulary.merges.len());
    for (at, merge) in vocabulary.merges.iter().enumerate() {
        let refuse = |message| TokenizerError::invalid(format!("{MERGES}[{at}]"), message);
        let Some((left, right)) = halves(merge) else {
            return Err(refuse(format!("{merge:?} is not two texts with a space between")));
        };
        merges.push((left.to_owned(), right.to_owned()));
    }
    BPE::builder()
        .vocab_and_merges(tokens, merges)
        .byte_fallback(byte_fallback)
        .ignore_merges(whole_pieces)
        .build()
        .map_err(|error| TokenizerError::invalid(MERGES, error.to_string()))
}
